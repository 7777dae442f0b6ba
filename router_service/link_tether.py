"""The router's end of a link's tether: a second connection on which nothing is said, and which ends with the actor's process before its links do."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

from cluster.core.errors import InvalidRequest, MoeError
from cluster.core.link_frames import Challenge, Frame, Welcome
from cluster.core.link_handshake import RouterSide
from cluster.link_transport import FrameStream

_MAX_PENDING_BYTES = 4096


class LinkTether:
    """One tether. It is asked for once, when it is made; an actor that has nobody to hold it closes it, and its link goes on without.

    `on_ended` is called once when it ends for any reason but `close` after the actor said that it is held.
    """

    def __init__(self, dial: Callable[[], Awaitable[socket.socket]], side: RouterSide, *, timeout_s: float, on_ended: Callable[[], None]) -> None:
        self._dial = dial
        self._side = side
        self._timeout_s = timeout_s
        self._on_ended = on_ended
        self._stream: FrameStream | None = None
        self._is_held = False
        self._opening = asyncio.get_running_loop().create_task(self._open(), name="link-tether")

    def close(self) -> None:
        """Close it now; nobody is told."""
        self._is_held = False
        self._opening.cancel()
        if self._stream is not None:
            self._stream.close()

    async def _open(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._dial()
        except (MoeError, TimeoutError):
            return
        try:
            self._stream = FrameStream(connection, on_frame=self._on_frame, on_closed=self._on_closed, max_body_bytes=0, max_pending_bytes=_MAX_PENDING_BYTES)
        except OSError:
            connection.close()

    def _on_frame(self, frame: Frame, _body: memoryview) -> None:
        assert self._stream is not None  # noqa: S101  (only its own stream brings a frame)
        match frame:
            case Challenge():
                self._stream.send(self._side.tether(frame))
            case Welcome():
                self._side.accept(frame)
                self._is_held = True
            case _:
                message = f"a tether takes no {type(frame).__name__}"
                raise InvalidRequest(message, field="link.kind")

    def _on_closed(self, _error: MoeError | None) -> None:
        if self._is_held:
            self._is_held = False
            self._on_ended()
