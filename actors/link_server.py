"""The actor's end of the expert link: listens, proves and checks keys, hands frames to the compute thread and sends its replies back.

Runs on the actor's event loop and computes nothing. Whatever a peer does wrong ends that peer's link only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Callable
from functools import partial

from actors.body_pool import BodyPool
from actors.loop_inbox import LoopInbox
from actors.progress import Progress
from actors.tether import HeldTether, Hold
from cluster.core.errors import DeadlineExceeded, InvalidRequest, MoeError, NotReady, Overloaded, ReplicaUnavailable
from cluster.core.ids import Incarnation
from cluster.core.link_frames import (
    NONCE_BYTES,
    Cancel,
    Cool,
    Fault,
    FaultReply,
    Forward,
    Frame,
    FrameStatus,
    Goodbye,
    Ping,
    Pong,
    Proof,
    Refusal,
    Result,
    SegmentResult,
    SegmentStatus,
    Tether,
    Warm,
)
from cluster.core.link_handshake import ActorSide, error_of, refusal_of
from cluster.core.link_limits import LinkLimits
from cluster.link_transport import Buffers, FrameStream

Reply = Callable[[Result, Buffers], None]
Submit = Callable[[Forward, memoryview, Reply], None]
_SWEEP_S = 0.25
_LOG_EVERY_S = 1.0
_ACCEPT_PAUSE_S = 0.1
_log = logging.getLogger(__name__)


class LinkServer:
    """Listens for routers and serves their frames.

    `submit(frame, body, reply)` hands a frame to the compute thread; it must not block. `reply(result, buffers)` may be called from any thread, once.
    `body` and `buffers` (which may alias it) belong to the link again after that call. `cancel(frame, segment_ids)` says that nobody waits any more;
    the frame still needs its reply. When `submit` raises, every segment is answered with OVERLOADED or FAULTED. `hint(frame)` must not block;
    `fault(frame)` may: it runs in a thread of its own. Without it every fault frame is refused. `guard(socket)` is shown every link's socket.
    Without `hold`, or when it returns None, links have no tethers.
    """

    def __init__(
        self,
        incarnation: Incarnation,
        link_key: bytes,
        limits: LinkLimits,
        submit: Submit,
        progress: Callable[[], tuple[int, float, int] | Progress],
        *,
        cancel: Callable[[Forward, tuple[int, ...]], None] | None = None,
        hint: Callable[[Warm | Cool], None] | None = None,
        fault: Callable[[Fault], FaultReply] | None = None,
        guard: Callable[[socket.socket], None] | None = None,
        hold: Hold | None = None,
    ) -> None:
        self.incarnation = incarnation
        self.limits = limits
        self.submit = submit
        self.progress = progress
        self.cancel = cancel
        self.hint = hint
        self.fault = fault
        self.guard = guard
        self.hold = hold
        self.is_draining = False
        self.num_faults = 0
        self._link_key = link_key
        self._inbox: LoopInbox | None = None
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._links: set[_ServerLink] = set()
        self._all_closed = asyncio.Event()
        self._logged_s = 0.0

    @property
    def num_links(self) -> int:
        """Links of routers that have proven themselves."""
        return sum(link.is_proven for link in self._links)

    @property
    def num_tethers(self) -> int:
        """Links whose tether is held."""
        return sum(link.tether is not None and link.tether.is_held for link in self._links)

    async def start(self, host: str, port: int = 0) -> tuple[str, int]:
        """Listen on an address of this node; port 0 picks a free one. Returns the address. Raises OSError when it is taken."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
            listener.settimeout(0)
        except OSError:
            listener.close()
            raise
        self._inbox = LoopInbox()
        self._listener = listener
        self._accepting = loop.create_task(self._accept(listener), name="link-accept")
        self._sweeper = loop.call_later(_SWEEP_S, self._sweep)
        bound: tuple[str, int] = listener.getsockname()[:2]
        return bound

    async def stop(self, reason: str, timeout_s: float) -> None:
        """Say Goodbye, answer what is under way, refuse what is new, and close; by force after `timeout_s`. Idempotent."""
        self.is_draining = True
        await self._stop_listening()
        for link in tuple(self._links):
            link.say_goodbye(reason)
        self._all_closed.clear()
        if self._links:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_closed.wait(), timeout_s)
        for link in tuple(self._links):
            link.stream.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._inbox is not None:
            self._inbox.close()

    async def _stop_listening(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._accepting
            self._accepting = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def call_soon(self, call: Callable[[], None]) -> None:
        """Run this on the loop, from any thread; nothing when the server has stopped, for then nobody waits."""
        if self._inbox is not None:
            self._inbox.put(call)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listener)
            except OSError as error:  # out of descriptors, or the peer is gone already: neither may end the server
                self.note_fault("listener", NotReady(f"accept failed ({error.strerror})"))
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            try:
                self._welcome(sock, f"{address[0]}:{address[1]}")
            except OSError:
                sock.close()

    def _welcome(self, sock: socket.socket, peer: str) -> None:
        num_unproven = len(self._links) - self.num_links
        if num_unproven >= self.limits.max_handshakes:
            sock.close()
            self.note_fault(peer, Overloaded(f"{num_unproven} handshakes are under way already"))
            return
        side = ActorSide(self.incarnation, self._link_key, secrets.token_bytes(NONCE_BYTES), self.limits, has_tethers=self.hold is not None)
        self._links.add(_ServerLink(self, sock, peer, side))

    def link_of(self, nonce: bytes) -> _ServerLink | None:
        """The link that was proven with a nonce."""
        return next((link for link in self._links if link.is_proven and link.nonce == nonce), None)

    def forget(self, link: _ServerLink) -> None:
        """A link is closed."""
        self._links.discard(link)
        if not self._links:
            self._all_closed.set()

    def note_fault(self, peer: str, error: MoeError) -> None:
        """Count a peer's fault and log it, at most once a second: a flood of bad peers must not become a flood of log lines."""
        self.num_faults += 1
        now_s = asyncio.get_running_loop().time()
        if now_s - self._logged_s >= _LOG_EVERY_S:
            self._logged_s = now_s
            _log.warning("link from %s: %s: %s (%d faults so far)", peer, error.reason, error, self.num_faults)

    def _sweep(self) -> None:
        for link in tuple(self._links):
            link.check_deadlines()
        self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)


class _ServerLink:
    """One router's link, from accept to close."""

    def __init__(self, server: LinkServer, sock: socket.socket, peer: str, side: ActorSide) -> None:
        limits = server.limits
        self.is_proven = False
        self.nonce = b""
        self.tether: HeldTether | None = None
        self._server = server
        self._sock = sock
        self._peer = peer
        self._side = side
        self._loop = asyncio.get_running_loop()
        self._opened_s = self._loop.time()
        self._in_flight: set[int] = set()
        self._unanswered: dict[int, Forward] = {}
        self._is_leaving = False
        self._faulting: asyncio.Task[None] | None = None
        self._pool = BodyPool(num_kept=limits.frames_in_flight)
        self.stream = FrameStream(
            sock,
            on_frame=self._on_frame,
            on_closed=self._on_closed,
            max_body_bytes=limits.max_frame_bytes,
            max_pending_bytes=limits.max_pending_bytes,
            allocate=self._pool.take,
        )
        self.stream.send(side.challenge)

    def say_goodbye(self, reason: str) -> None:
        """Tell the router to leave; it does so after its last reply."""
        if self.is_proven:
            self.stream.send(Goodbye(reason))
        else:
            self.stream.close()

    def check_deadlines(self) -> None:
        """Close the link when its handshake takes too long, its router is silent, or its router does not read."""
        limits = self._server.limits
        if not self.is_proven and self._loop.time() - self._opened_s > limits.connect_timeout_s:
            self.stream.close(DeadlineExceeded(f"no handshake within {limits.connect_timeout_s} s"))
        elif self.stream.stalled_s() > limits.stall_timeout_s:
            self.stream.close(Overloaded(f"the router took nothing for {limits.stall_timeout_s} s"))
        elif self.stream.silence_s() > limits.idle_timeout_s:
            self.stream.close(DeadlineExceeded(f"the router was silent for {limits.idle_timeout_s} s"))

    def _on_frame(self, frame: Frame, body: memoryview) -> None:
        match frame:
            case Forward():
                self._on_forward(frame, body)
            case Ping():
                progress = Progress(*self._server.progress())
                self.stream.send(Pong(frame.sequence, self._server.incarnation.generation, *progress))
            case Cancel():
                self._on_cancel(frame)
            case Warm() | Cool():
                self._on_hint(frame)
            case Fault():
                self._on_fault(frame)
            case Goodbye():
                self._is_leaving = True
                self._leave_when_idle()
            case Proof():
                self._on_proof(frame)
            case Tether():
                self._on_tether(frame)
            case Refusal():
                raise error_of(frame)
            case _:
                message = f"an actor takes no {type(frame).__name__}"
                raise InvalidRequest(message, field="link.kind")

    def _on_proof(self, proof: Proof) -> None:
        try:
            welcome = self._side.welcome(proof)
            if self._server.num_links >= self._server.limits.max_links:
                message = f"the actor serves {self._server.num_links} links already; the limit is {self._server.limits.max_links} (link.max_links)"
                raise Overloaded(message)
            if self._server.is_draining:
                message = "the actor is draining"
                raise NotReady(message)
        except MoeError as error:
            self._server.note_fault(self._peer, error)
            self.stream.send(refusal_of(error))
            self.stream.finish()
            return
        self.is_proven, self.nonce = True, proof.nonce
        if self._server.guard is not None:
            self._server.guard(self._sock)
        self.stream.open_gate()
        self.stream.send(welcome)

    def _on_tether(self, tether: Tether) -> None:
        """This connection is no link but the tether of one: it is handed to whoever holds it, once for each link."""
        link, hold = self._server.link_of(tether.nonce), self._server.hold
        welcome = self._side.welcome_tether(tether)
        if hold is None or link is None or link.tether is not None:
            self.stream.close()
        else:
            link.tether = HeldTether(hold, self.stream.detach(), welcome)

    def _on_forward(self, frame: Forward, body: memoryview) -> None:
        limits = self._server.limits
        if frame.frame_id in self._in_flight or len(self._in_flight) >= limits.frames_in_flight:
            message = f"frame {frame.frame_id} is one too many: {len(self._in_flight)} are in flight, the limit is {limits.frames_in_flight}"
            raise InvalidRequest(message, field="link.frames_in_flight")
        num_tokens = sum([segment.num_rows for segment in frame.segments])
        if num_tokens > limits.max_tokens_per_frame:
            message = f"a frame of {num_tokens} rows is over the limit of {limits.max_tokens_per_frame} (actors.max_tokens_per_frame)"
            raise InvalidRequest(message, field="link.max_tokens_per_frame")
        self._in_flight.add(frame.frame_id)
        self._unanswered[frame.frame_id] = frame
        generation = self._server.incarnation.generation
        if frame.generation != generation:
            self._answer(frame, body, Result(frame.frame_id, generation, FrameStatus.WRONG_GENERATION, 0.0, 0.0, ()), ())
        elif self._server.is_draining or self._is_leaving:
            self._refuse(frame, body, SegmentStatus.DRAINING, "draining")
        else:
            self._submit(frame, body)

    def _submit(self, frame: Forward, body: memoryview) -> None:
        def reply(result: Result, buffers: Buffers) -> None:
            self._server.call_soon(partial(self._answer, frame, body, result, buffers))

        try:
            self._server.submit(frame, body, reply)
        except Overloaded:
            self._refuse(frame, body, SegmentStatus.OVERLOADED, "queue full")
        except Exception as error:  # noqa: BLE001  (whatever the runtime raises ends this frame, not the link)
            _log.exception("a frame could not be submitted")
            self._refuse(frame, body, SegmentStatus.FAULTED, type(error).__name__)

    def _refuse(self, frame: Forward, body: memoryview, status: SegmentStatus, message: str) -> None:
        segments = tuple(SegmentResult(item.segment_id, item.attempt, status, item.dtype, item.dim, 0, (), message) for item in frame.segments)
        self._answer(frame, body, Result(frame.frame_id, frame.generation, FrameStatus.OK, 0.0, 0.0, segments), ())

    def _answer(self, frame: Forward, body: memoryview, result: Result, buffers: Buffers) -> None:
        """Send a reply once; the frame leaves the window, and its body is reused, when the last byte is out."""
        if self._unanswered.pop(frame.frame_id, None) is None:
            return

        def sent() -> None:
            self._in_flight.discard(frame.frame_id)
            self._pool.release(body)
            self._leave_when_idle()

        try:
            self.stream.send(result, buffers, sent)
        except MoeError as error:
            self.stream.close(error)

    def _on_cancel(self, cancel: Cancel) -> None:
        frame = self._unanswered.get(cancel.frame_id)
        if frame is not None and self._server.cancel is not None:
            self._server.cancel(frame, cancel.segment_ids)

    def _on_hint(self, hint: Warm | Cool) -> None:
        if self._server.hint is not None:
            self._server.hint(hint)

    def _on_fault(self, frame: Fault) -> None:
        play = self._server.fault
        if play is None:
            self.stream.send(FaultReply(ok=False, message="CHAOS_REFUSED: this actor plays no faults; deploy a spec with `chaos: allowed`"))
        elif self._faulting is not None:
            self.stream.send(FaultReply(ok=False, message="OVERLOADED: a fault of this link is being applied; wait for its reply"))
        else:
            self._faulting = self._loop.create_task(self._play(play, frame), name="link-fault")

    async def _play(self, play: Callable[[Fault], FaultReply], frame: Fault) -> None:
        try:
            reply = await asyncio.to_thread(play, frame)
        except Exception as error:  # noqa: BLE001  (whatever a fault does to the port, its sender gets an answer)
            _log.exception("a fault could not be played")
            reply = FaultReply(ok=False, message=f"FAULTED: {type(error).__name__}")
        self._faulting = None
        self.stream.send(reply)

    def _leave_when_idle(self) -> None:
        if self._is_leaving and not self._in_flight:
            self.stream.finish()

    def _on_closed(self, error: MoeError | None) -> None:
        if error is not None and not isinstance(error, ReplicaUnavailable):
            self._server.note_fault(self._peer, error)
        self._unanswered.clear()
        if self.tether is not None:
            self.tether.end()
        self._server.forget(self)
