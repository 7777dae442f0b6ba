"""The router's end of one expert link: connect, prove, send frames, hear results and heartbeats. One life only; `actor_lane` reconnects."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from typing import Self

from cluster.core.errors import InvalidRequest, MoeError, ReplicaUnavailable
from cluster.core.link_frames import NONCE_BYTES, Cancel, Challenge, Cool, Forward, Frame, Goodbye, Ping, Pong, Refusal, Result, Warm, Welcome
from cluster.core.link_handshake import COOL_PROTOCOL, TETHER_PROTOCOL, RouterSide, error_of, refusal_of
from cluster.core.link_limits import LinkLimits
from cluster.core.link_values import printable
from cluster.core.routing_table import ActorEndpoint
from cluster.link_transport import Buffers, FrameStream
from router_service.link_tether import LinkTether


class LinkPhase(StrEnum):
    """Where one link stands: `connecting`, `ready`, `draining` (the actor said Goodbye), `closed`."""

    CONNECTING = "connecting"
    READY = "ready"
    DRAINING = "draining"
    CLOSED = "closed"


class LinkClient:
    """One connection to one incarnation.

    `on_result(result, body)` gets every Result; the body is the receiver's to keep. `on_progress(pong)` gets every Pong.
    `on_goodbye(reason)`: send nothing more, close when idle.
    `on_lost(error)` is called once when an established link ends for any reason but `close`.
    """

    def __init__(
        self,
        endpoint: ActorEndpoint,
        *,
        limits: LinkLimits,
        on_result: Callable[[Result, memoryview], None],
        on_lost: Callable[[MoeError], None],
        on_goodbye: Callable[[str], None],
        on_progress: Callable[[Pong], None],
    ) -> None:
        self.endpoint = endpoint
        self.phase = LinkPhase.CONNECTING
        self.welcome: Welcome | None = None
        self.progress: Pong | None = None
        self._limits = limits
        self._on_result = on_result
        self._on_lost = on_lost
        self._on_goodbye = on_goodbye
        self._on_progress = on_progress
        self._loop = asyncio.get_running_loop()
        self._stream: FrameStream | None = None
        self._side: RouterSide | None = None
        self._opened: asyncio.Future[Welcome] = self._loop.create_future()
        self._num_pings = 0
        self._num_silent_beats = 0
        self._last_beat_s = 0.0
        self._beat: asyncio.TimerHandle | None = None
        self._tether: LinkTether | None = None
        self._doubt: asyncio.TimerHandle | None = None

    @classmethod
    async def connect(
        cls,
        endpoint: ActorEndpoint,
        key: bytes,
        *,
        router_id: str,
        limits: LinkLimits,
        on_result: Callable[[Result, memoryview], None],
        on_lost: Callable[[MoeError], None],
        on_goodbye: Callable[[str], None],
        on_progress: Callable[[Pong], None] = lambda _: None,
    ) -> Self:
        """Connect and shake hands within `connect_timeout_s`.

        Raises ReplicaUnavailable (nobody answers), ReplicaRejected (another generation lives there), Unauthenticated, ProtocolMismatch, Overloaded.
        """
        link = cls(endpoint, limits=limits, on_result=on_result, on_lost=on_lost, on_goodbye=on_goodbye, on_progress=on_progress)
        link._side = RouterSide(endpoint.incarnation, key, secrets.token_bytes(NONCE_BYTES), router_id)
        try:
            async with asyncio.timeout(limits.connect_timeout_s):
                await link._open()
        except TimeoutError:
            link.close()
            message = f"{endpoint.incarnation} at {endpoint.host}:{endpoint.port} did not answer within {limits.connect_timeout_s} s (link.connect_timeout_s)"
            raise ReplicaUnavailable(message) from None
        except BaseException:
            link.close()
            raise
        return link

    @property
    def last_heard_age_s(self) -> float:
        """Seconds since the actor gave a sign of life."""
        return self._stream.silence_s() if self._stream is not None else 0.0

    @property
    def knows_cool(self) -> bool:
        """Whether the actor is new enough to be told that a shadow's replica is back; an older one would end the link."""
        return self._side is not None and self._side.protocol >= COOL_PROTOCOL

    @property
    def bytes_sent(self) -> int:
        """Bytes this link took."""
        return self._stream.bytes_sent if self._stream is not None else 0

    @property
    def bytes_received(self) -> int:
        """Bytes this link brought."""
        return self._stream.bytes_received if self._stream is not None else 0

    def send(self, frame: Forward | Cancel | Warm | Cool, buffers: Buffers = ()) -> None:
        """Send a frame; on a closed link nothing happens, `on_lost` has said it. The buffers must keep their content until the Result."""
        if self._stream is not None:
            self._stream.send(frame, buffers)

    def probe(self) -> None:
        """Ask for progress now, without waiting for the next heartbeat."""
        if self._stream is not None and self.phase in (LinkPhase.READY, LinkPhase.DRAINING):
            self._num_pings += 1
            self._stream.send(Ping(self._num_pings))

    def leave(self, reason: str) -> None:
        """Say Goodbye and close once everything is sent."""
        if self._stream is not None and self.phase is not LinkPhase.CLOSED:
            self._end_watch()
            self.phase = LinkPhase.CLOSED
            self._stream.send(Goodbye(reason))
            self._stream.finish()

    def close(self, error: MoeError | None = None) -> None:
        """Close now; with an error `on_lost` is told."""
        self._end_watch()
        if self._stream is None:
            self.phase = LinkPhase.CLOSED
        else:
            if error is None:
                self.phase = LinkPhase.CLOSED
            self._stream.close(error)

    async def _open(self) -> None:
        sock = await self._dial()
        try:
            self._stream = FrameStream(
                sock,
                on_frame=self._on_frame,
                on_closed=self._on_closed,
                max_body_bytes=self._limits.max_frame_bytes,
                max_pending_bytes=self._limits.max_pending_bytes,
            )
        except OSError as error:
            sock.close()
            raise self._unreachable(error) from error
        await self._opened

    async def _dial(self) -> socket.socket:
        try:
            found = await self._loop.getaddrinfo(self.endpoint.host, self.endpoint.port, type=socket.SOCK_STREAM)
            family, kind, protocol, _, address = found[0]
            sock = socket.socket(family, kind, protocol)
        except (OSError, UnicodeError) as error:
            raise self._unreachable(error) from error
        try:
            sock.settimeout(0)
            await self._loop.sock_connect(sock, address)
        except OSError as error:
            sock.close()
            raise self._unreachable(error) from error
        except BaseException:
            sock.close()
            raise
        return sock

    def _unreachable(self, error: Exception) -> ReplicaUnavailable:
        place = f"{self.endpoint.host}:{self.endpoint.port}"
        return ReplicaUnavailable(f"{self.endpoint.incarnation} at {place} cannot be reached ({getattr(error, 'strerror', None) or type(error).__name__})")

    def _on_frame(self, frame: Frame, body: memoryview) -> None:
        match frame:
            case Result():
                self._on_result(frame, body)
            case Pong():
                self.progress = frame
                self._on_progress(frame)
            case Goodbye():
                self.phase = LinkPhase.DRAINING
                self._on_goodbye(printable(frame.reason))
            case Challenge():
                self._on_challenge(frame)
            case Welcome():
                self._on_welcome(frame)
            case Refusal():
                raise error_of(frame)
            case _:
                message = f"a router takes no {type(frame).__name__}"
                raise InvalidRequest(message, field="link.kind")

    def _on_challenge(self, challenge: Challenge) -> None:
        assert self._side is not None  # noqa: S101  (connect sets it before anything can arrive)
        assert self._stream is not None  # noqa: S101  (only its own stream brings a frame)
        try:
            self._stream.send(self._side.prove(challenge))
        except MoeError as error:
            self._stream.send(refusal_of(error))
            raise

    def _on_welcome(self, frame: Welcome) -> None:
        assert self._side is not None  # noqa: S101  (connect sets it before anything can arrive)
        assert self._stream is not None  # noqa: S101  (only its own stream brings a frame)
        self.welcome = self._side.accept(frame)
        self._stream.max_pending_bytes = replace(self._limits, max_frame_bytes=frame.max_frame_bytes, frames_in_flight=frame.frames_in_flight).max_pending_bytes
        self._stream.open_gate()
        self.phase = LinkPhase.READY
        if not self._opened.done():
            self._opened.set_result(frame)
        self._heartbeat()
        if self._side.protocol >= TETHER_PROTOCOL:
            self._tether = LinkTether(self._dial, self._side, timeout_s=self._limits.connect_timeout_s, on_ended=self._on_tether_ended)

    def _on_tether_ended(self) -> None:
        """Its process has ended, or something between the two cut an idle connection: an answer tells which. There is no other one before the next link."""
        self._tether = None
        if self._stream is not None and not self._stream.is_closed:
            self.probe()
            self._doubt = self._loop.call_later(self._limits.tether_grace_s, self._judge, self._stream, self._stream.bytes_received)

    def _judge(self, stream: FrameStream, num_bytes_before: int) -> None:
        """What came while this process itself was held up is still unread, and speaks for the actor."""
        if stream.bytes_received == num_bytes_before and not stream.has_unread():
            stream.close(ReplicaUnavailable(f"{self.endpoint.incarnation} said nothing for {self._limits.tether_grace_s} s after its tether had ended"))

    def _heartbeat(self) -> None:
        """Ask for progress; a silent actor loses its link, since a frozen process never resets one.

        Silence is counted in beats, not read off the clock: when this process itself was held up, its actors did nothing wrong.
        """
        if self._stream is None or self._stream.is_closed:
            return
        now_s = self._loop.time()
        is_alive = self._stream.silence_s() < now_s - self._last_beat_s
        self._num_silent_beats = 0 if is_alive else self._num_silent_beats + 1
        self._last_beat_s = now_s
        if self._num_silent_beats * self._limits.heartbeat_s > self._limits.silence_timeout_s:
            self._stream.close(ReplicaUnavailable(f"{self.endpoint.incarnation} was silent for {self._limits.silence_timeout_s} s"))
            return
        self._num_pings += 1
        self._stream.send(Ping(self._num_pings))
        self._beat = self._loop.call_later(self._limits.heartbeat_s, self._heartbeat)

    def _end_watch(self) -> None:
        for timer in (self._beat, self._doubt):
            if timer is not None:
                timer.cancel()
        self._beat = self._doubt = None
        if self._tether is not None:
            self._tether.close()
            self._tether = None

    def _on_closed(self, error: MoeError | None) -> None:
        self._end_watch()
        was_open = self.phase in (LinkPhase.READY, LinkPhase.DRAINING)
        self.phase = LinkPhase.CLOSED
        if not self._opened.done():
            self._opened.set_exception(error or ReplicaUnavailable("the link was closed during its handshake"))
            self._opened.exception()  # seen: nobody may be waiting any more
        elif was_open:
            self._on_lost(error or ReplicaUnavailable("the link was closed"))
