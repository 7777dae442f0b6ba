"""Calls of one method, taken in many at a time.

grpc.aio asks its core for one call, and for the next one five turns of the loop and a thread's wake-up later. On a busy loop calls then wait in the core's
own queue, where nobody can refuse them: for a second, at three times of what a router can take. So a few takers ask the core, too. One that gets a call
lets another ask in its place and carries the call, so that the call begins a turn earlier as well.

They use parts of grpcio that it promises to nobody. Where those are not as they are known here, only grpc.aio itself takes calls.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Sequence
from typing import Any, Final

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

MAX_WAITING: Final = 64
END_S: Final = 2.0
_PARTS: Final = {
    "_handle_rpc": ("method_name", "method_resolver", "interceptors", "rpc_state", "loop", "concurrency_exceeded"),
    "_schedule_rpc_coro": ("rpc_coro", "rpc_state", "loop", "method_name"),
}


class Takers:
    """Take the calls of one method of a server, from its start to its end."""

    def __init__(self, server: grpc.aio.Server, method: str, handler: Any, interceptors: Sequence[grpc.aio.ServerInterceptor], *, max_calls: int) -> None:  # noqa: ANN401  (grpc's)
        """`method` is /SERVICE/METHOD. With more than `max_calls` under way the transport refuses one; what grpc.aio takes itself counts apart."""
        self._core: Any = getattr(server, "_server", None)
        self._method = method
        self._handler = handler
        self._interceptors = tuple(interceptors)
        self._max_calls = max_calls
        self._num_calls = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_known = is_known() and isinstance(self._core, cygrpc.AioServer)
        if self._is_known:
            _, service, name = method.split("/")
            server.add_registered_method_handlers(service, {name: handler})

    def start(self) -> None:
        """Take calls; the server has started."""
        if not self._is_known:
            logger.warning("grpcio %s is not as it is known here: calls are taken in one at a time, so an overload is refused late", grpc.__version__)
            return
        for _ in range(MAX_WAITING):
            self._wait_for_one()

    async def ended(self) -> None:
        """Wait until the last call has ended, for END_S at most: the server has stopped and cancelled what was left."""
        if self._tasks:
            _, left = await asyncio.wait(set(self._tasks), timeout=END_S)
            if left:
                logger.warning("%d calls did not end within %g s of the server's end; they are given up", len(left), END_S)
            for task in left:
                task.cancel()

    def resolve_handler(self, _: grpc.HandlerCallDetails) -> Any:  # noqa: ANN401
        """The method's handler, as grpc.aio asks for it."""
        return self._handler

    def _wait_for_one(self) -> None:
        task = asyncio.get_running_loop().create_task(self._take(), name="call")
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:  # a taker that is lost is not replaced: fewer wait for calls from here on
            logger.error("a call of %s could not be taken", self._method, exc_info=error)

    async def _take(self) -> None:
        state = await self._next()
        if state is None:
            return
        self._wait_for_one()
        loop, is_full = asyncio.get_running_loop(), self._num_calls >= self._max_calls
        self._num_calls += 1
        try:
            handled = cygrpc._handle_rpc(self._method, self, self._interceptors, state, loop, is_full)  # noqa: SLF001
            await cygrpc._schedule_rpc_coro(handled, state, loop, self._method)  # noqa: SLF001
        finally:
            self._num_calls -= 1

    async def _next(self) -> Any:  # noqa: ANN401
        """The next call; None when the server stops."""
        method = self._method.encode()
        while self._core.is_running():
            try:
                return await self._core._request_registered_call(method)  # noqa: SLF001
            except cygrpc._RequestCallError:  # noqa: SLF001  (what waits when the server stops, and a call that was gone before it was taken)
                continue
        return None


def is_known() -> bool:
    """Whether this grpcio has the parts that are used here."""
    try:
        found = {name: tuple(inspect.signature(getattr(cygrpc, name)).parameters) for name in _PARTS}
        return found == _PARTS and issubclass(cygrpc._RequestCallError, Exception) and callable(cygrpc.AioServer._request_registered_call)  # noqa: SLF001
    except (AttributeError, ValueError, TypeError):
        return False
