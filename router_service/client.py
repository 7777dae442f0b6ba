"""The router's clients, blocking and async: tensor in, tensor out, a deadline on every call, typed errors, retries that end in time.

    client = RouterClient("127.0.0.1:50051", token=...)
    reply = client.dispatch(hidden_states, model="tiny-moe-lm", layer=0, timeout_s=0.2)
    reply.hidden_states, reply.report.degraded_tokens, reply.report.epoch

Numpy in, numpy out (bf16 as ml_dtypes.bfloat16); torch in, torch out; this module imports neither torch nor ray. Errors are those of
`cluster.core.errors`. One client keeps one connection, or as many as `connections` says, and may be used by many threads (blocking) or tasks (async).
Channels do not survive a fork: make a client in the process that uses it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, Self, TypeVar, Unpack

import grpc

from cluster.core.errors import MessageTooLarge
from protos.moelastic.router.v1 import router_pb2 as pb
from router_service.client_attempts import Attempts
from router_service.client_core import ClientCore, Settings
from router_service.client_errors import error_of
from router_service.client_request import ROUTER_PATH, Array, DispatchMessages, DispatchOptions, ReplyChunks
from router_service.client_types import ModelInfo, Reply, RouterStatus, RoutingReport, RoutingTableInfo, model_of, status_of, table_of

__all__ = ["AsyncRouterClient", "DispatchOptions", "ModelInfo", "Reply", "RouterClient", "RouterStatus", "RoutingReport", "RoutingTableInfo", "Settings"]

SMALL_BYTES: Final = 4096
_R = TypeVar("_R")


class RouterClient:
    """The blocking client; thread-safe."""

    def __init__(self, address: str, **settings: Unpack[Settings]) -> None:
        """`address` is HOST:PORT of the router; nothing is sent before the first call."""
        self._core = ClientCore(address, settings)
        self._lines = [_Line(_blocking_channel(self._core)) for _ in range(self._core.num_connections)]
        self._turn = itertools.cycle(self._lines)

    def dispatch(self, hidden_states: Array, *, timeout_s: float | None = None, **options: Unpack[DispatchOptions]) -> Reply:
        """Run one MoE layer over hidden states [T, D]; the reply's are alike in shape, library and element type.

        Raises InvalidRequest, NotFound, Unauthenticated, Overloaded, ExpertUnavailable, DataLoss, NotReady (no router answered) or DeadlineExceeded.
        What another attempt may cure is tried again until `timeout_s` is over.
        """
        messages, attempts = DispatchMessages(hidden_states, options), self._core.attempts(timeout_s)
        with self._core.span() as traceparent:
            if messages.fits(self._core.limit_bytes):
                try:
                    return self._retried(lambda limit_s: self._send_whole(messages, limit_s, traceparent), attempts)
                except MessageTooLarge as error:
                    self._core.learn_limit(error)
            return self._retried(lambda limit_s: self._send_chunks(messages, limit_s, traceparent), attempts)

    def model(self, name: str = "", *, timeout_s: float | None = None) -> ModelInfo:
        """What to send for a model; without a name, the only one served. Raises NotFound, or InvalidRequest where several are served."""
        return model_of(self._ask("GetModel", pb.GetModelRequest(model=name), pb.GetModelResponse, timeout_s))

    def status(self, *, timeout_s: float | None = None) -> RouterStatus:
        """How well the router can serve, from what it knows itself."""
        return status_of(self._ask("GetStatus", pb.GetStatusRequest(), pb.GetStatusResponse, timeout_s))

    def routing_table(self, *, timeout_s: float | None = None) -> RoutingTableInfo:
        """The table that the router uses. Raises NotReady before it has one."""
        return table_of(self._ask("GetRoutingTable", pb.GetRoutingTableRequest(), pb.GetRoutingTableResponse, timeout_s))

    def close(self) -> None:
        """Close the connections; calls under way end."""
        for line in self._lines:
            line.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _retried(self, send: Callable[[float], _R], attempts: Attempts) -> _R:
        while True:
            try:
                return send(attempts.remaining_s(time.monotonic()))
            except grpc.RpcError as failure:
                error = error_of(failure, address=self._core.address)
                failure.__traceback__ = None  # a call is its own failure: with the frames it went through it would keep itself
            try:
                time.sleep(attempts.pause_s(error, time.monotonic()))
            finally:
                del error  # kept by its own traceback, it would keep the call's message

    def _send_whole(self, messages: DispatchMessages, limit_s: float, traceparent: str) -> Reply:
        metadata = self._core.metadata(len(messages.whole), traceparent)
        return messages.reply_of(next(self._turn).whole(messages.whole, timeout=limit_s, metadata=metadata))

    def _send_chunks(self, messages: DispatchMessages, limit_s: float, traceparent: str) -> Reply:
        chunks, metadata = ReplyChunks(messages), self._core.metadata(messages.num_bytes, traceparent)
        call = next(self._turn).stream(messages.chunks(self._core.limit_bytes), timeout=limit_s, metadata=metadata)
        try:
            for message in call:
                chunks.take(message)
        finally:
            call.cancel()
        return chunks.reply()

    def _ask(self, method: str, request: Any, response: type[_R], timeout_s: float | None) -> _R:  # noqa: ANN401
        metadata = self._core.metadata(SMALL_BYTES)

        def ask(limit_s: float) -> _R:
            call: Callable[..., _R] = next(self._turn).channel.unary_unary(f"{ROUTER_PATH}/{method}", _bytes_of, response.FromString)  # type: ignore[attr-defined]
            return call(request, timeout=limit_s, metadata=metadata)

        return self._retried(ask, self._core.attempts(timeout_s))


class AsyncRouterClient:
    """The async client; it belongs to the event loop of its first call."""

    def __init__(self, address: str, **settings: Unpack[Settings]) -> None:
        """`address` is HOST:PORT of the router; nothing is sent before the first call."""
        self._core = ClientCore(address, settings)
        self._channels: list[grpc.aio.Channel] = []
        self._turn: Iterator[grpc.aio.Channel] = iter(())

    async def dispatch(self, hidden_states: Array, *, timeout_s: float | None = None, **options: Unpack[DispatchOptions]) -> Reply:
        """Run one MoE layer over hidden states [T, D], as `RouterClient.dispatch` does."""
        messages, attempts = DispatchMessages(hidden_states, options), self._core.attempts(timeout_s)
        with self._core.span() as traceparent:
            if messages.fits(self._core.limit_bytes):
                try:
                    return await self._retried(lambda limit_s: self._send_whole(messages, limit_s, traceparent), attempts)
                except MessageTooLarge as error:
                    self._core.learn_limit(error)
            return await self._retried(lambda limit_s: self._send_chunks(messages, limit_s, traceparent), attempts)

    async def model(self, name: str = "", *, timeout_s: float | None = None) -> ModelInfo:
        """What to send for a model; without a name, the only one served. Raises NotFound, or InvalidRequest where several are served."""
        return model_of(await self._ask("GetModel", pb.GetModelRequest(model=name), pb.GetModelResponse, timeout_s))

    async def status(self, *, timeout_s: float | None = None) -> RouterStatus:
        """How well the router can serve, from what it knows itself."""
        return status_of(await self._ask("GetStatus", pb.GetStatusRequest(), pb.GetStatusResponse, timeout_s))

    async def routing_table(self, *, timeout_s: float | None = None) -> RoutingTableInfo:
        """The table that the router uses. Raises NotReady before it has one."""
        return table_of(await self._ask("GetRoutingTable", pb.GetRoutingTableRequest(), pb.GetRoutingTableResponse, timeout_s))

    async def close(self) -> None:
        """Close the connections; calls under way end."""
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _retried(self, send: Callable[[float], Awaitable[_R]], attempts: Attempts) -> _R:
        while True:
            try:
                return await send(attempts.remaining_s(time.monotonic()))
            except grpc.RpcError as failure:
                error = error_of(failure, address=self._core.address)
                failure.__traceback__ = None
            try:
                await asyncio.sleep(attempts.pause_s(error, time.monotonic()))
            finally:
                del error

    async def _send_whole(self, messages: DispatchMessages, limit_s: float, traceparent: str) -> Reply:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, pb.DispatchResponse]
        call = self._opened().unary_unary(f"{ROUTER_PATH}/Dispatch", None, pb.DispatchResponse.FromString)
        metadata = self._core.metadata(len(messages.whole), traceparent)
        return messages.reply_of(await call(messages.whole, timeout=limit_s, metadata=metadata))

    async def _send_chunks(self, messages: DispatchMessages, limit_s: float, traceparent: str) -> Reply:
        stream = self._opened().stream_stream(f"{ROUTER_PATH}/DispatchStream", _bytes_of, pb.DispatchStreamResponse.FromString)
        chunks, metadata = ReplyChunks(messages), self._core.metadata(messages.num_bytes, traceparent)
        call, parts = stream(timeout=limit_s, metadata=metadata), messages.chunks(self._core.limit_bytes)
        try:
            await call.write(next(parts))
            # The router answers this once it has accepted the start. What it refuses, it refuses before the data is sent: grpc.aio loses the
            # status of a call that ends while it writes.
            await call.initial_metadata()
            for part in parts:
                if call.done():
                    break
                await call.write(part)
            await call.done_writing()
            while isinstance(message := await call.read(), pb.DispatchStreamResponse):
                chunks.take(message)
        finally:
            call.cancel()
        return chunks.reply()

    async def _ask(self, method: str, request: Any, response: type[_R], timeout_s: float | None) -> _R:  # noqa: ANN401
        metadata = self._core.metadata(SMALL_BYTES)

        def ask(limit_s: float) -> Awaitable[_R]:
            call = self._opened().unary_unary(f"{ROUTER_PATH}/{method}", _bytes_of, response.FromString)  # type: ignore[attr-defined]
            return call(request, timeout=limit_s, metadata=metadata)

        return await self._retried(ask, self._core.attempts(timeout_s))

    def _opened(self) -> grpc.aio.Channel:
        """The connection whose turn it is."""
        if not self._channels:
            address, options, secure = self._core.address, self._core.options(), self._core.credentials
            for _ in range(self._core.num_connections):
                self._channels.append(grpc.aio.insecure_channel(address, options) if secure is None else grpc.aio.secure_channel(address, secure, options))
            self._turn = itertools.cycle(self._channels)
        return next(self._turn)


class _Line:
    """One channel, with the calls that are made often."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.whole: grpc.UnaryUnaryMultiCallable[bytes, pb.DispatchResponse] = channel.unary_unary(
            f"{ROUTER_PATH}/Dispatch", None, pb.DispatchResponse.FromString
        )
        self.stream = channel.stream_stream(f"{ROUTER_PATH}/DispatchStream", _bytes_of, pb.DispatchStreamResponse.FromString)


def _blocking_channel(core: ClientCore) -> grpc.Channel:
    if core.credentials is None:
        return grpc.insecure_channel(core.address, core.options())
    return grpc.secure_channel(core.address, core.credentials, core.options())


def _bytes_of(message: Any) -> bytes:  # noqa: ANN401  (any protobuf message)
    data: bytes = message.SerializeToString()
    return data
