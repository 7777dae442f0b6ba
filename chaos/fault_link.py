"""One fault frame to one expert actor, over a link of our own: connect, prove the link key, send, hear the answer, leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
from dataclasses import dataclass
from typing import Any

from cluster.core.errors import FleetError, MoeError
from cluster.core.ids import Incarnation
from cluster.core.link_frames import NONCE_BYTES, Challenge, Fault, FaultReply, Frame, Goodbye, Refusal, Welcome, derive_fault_token, derive_link_key
from cluster.core.link_handshake import RouterSide, error_of
from cluster.link_transport import FrameStream

MAX_PENDING_BYTES = 1 << 20
MAX_BODY_BYTES = 256 << 20
LIMIT_S = 5.0


@dataclass(frozen=True, slots=True)
class FaultPort:
    """An actor's fault port: where it listens, which life of it, and the deployment's link secret."""

    incarnation: Incarnation
    address: str
    link_secret: bytes

    async def ask(self, fault: str, settings: dict[str, Any], *, limit_s: float = LIMIT_S) -> str:
        """Send one fault; what the actor said it did. Raises FleetError when it refuses, or does not answer within the limit."""
        call = _Call(self, Fault(derive_fault_token(self.link_secret, self.incarnation), fault, json.dumps(settings)))
        try:
            async with asyncio.timeout(limit_s):
                reply = await call.answer()
        except TimeoutError:
            message = f"{self.incarnation} at {self.address}: no answer to fault {fault} within {limit_s:g} s"
            raise FleetError(message) from None
        except (OSError, MoeError) as error:
            message = f"{self.incarnation} at {self.address}: fault {fault} not sent: {error}"
            raise FleetError(message) from error
        if not reply.ok:
            message = f"{self.incarnation} refused fault {fault}: {reply.message}"
            raise FleetError(message)
        return reply.message


class _Call:
    """One connection, for one fault."""

    def __init__(self, port: FaultPort, fault: Fault) -> None:
        self._port = port
        self._fault = fault
        self._reply: asyncio.Future[FaultReply] = asyncio.get_running_loop().create_future()
        self._side = RouterSide(port.incarnation, derive_link_key(port.link_secret, port.incarnation), secrets.token_bytes(NONCE_BYTES), "chaos")
        self._stream: FrameStream | None = None

    async def answer(self) -> FaultReply:
        """Connect and wait for the reply; the connection is closed on every way out."""
        host, _, number = self._port.address.rpartition(":")
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.settimeout(0)
            await asyncio.get_running_loop().sock_connect(sock, (host.strip("[]"), int(number)))
            self._stream = FrameStream(
                sock, on_frame=self._on_frame, on_closed=self._on_closed, max_body_bytes=MAX_BODY_BYTES, max_pending_bytes=MAX_PENDING_BYTES
            )
        except BaseException:
            sock.close()
            raise
        try:
            return await self._reply
        finally:
            self._stream.send(Goodbye("fault sent"))
            self._stream.finish()
            self._stream.close()
            with contextlib.suppress(BaseException):
                await asyncio.sleep(0)  # the close is told from the loop

    def _on_frame(self, frame: Frame, _body: memoryview) -> None:
        assert self._stream is not None  # noqa: S101  (only its own stream brings a frame)
        match frame:
            case Challenge():
                self._stream.send(self._side.prove(frame))
            case Welcome():
                self._side.accept(frame)
                self._stream.open_gate()
                self._stream.send(self._fault)
            case FaultReply():
                if not self._reply.done():
                    self._reply.set_result(frame)
            case Refusal():
                raise error_of(frame)
            case _:
                pass  # a router's frames are not for us

    def _on_closed(self, error: MoeError | None) -> None:
        if not self._reply.done():
            self._reply.set_exception(error or FleetError("the actor closed the link before it answered; does its spec say `chaos: allowed`?"))
