"""A router on an event loop of its own, for a host whose loop is not ours to keep: Ray stops an actor's loop before the process may say goodbye.

The same three calls as `RouterActor`. Requests never share a loop with the host's calls, and when the process exits in order (SIGTERM of a Ray
worker is such an exit) requests under way are finished first, within `router.drain_timeout_s`. A router that can follow the routing table no more
drains and ends its process, so that the host starts another.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Final, TypeVar

import uvloop

from cluster.core.actor_config import RouterConfig
from cluster.core.status import RouterObservation
from cluster.heap import settle_heap
from cluster.scheduling import SHORT_SLICE_NS, ask_for_slices, come_forward
from router_service.models import GateStore
from router_service.server import RouterActor, RouterSecrets

logger = logging.getLogger(__name__)

EXIT_MARGIN_S: Final = 5.0
FAULT_EXIT_CODE: Final = 70
_R = TypeVar("_R")


class RouterHost:
    """A RouterActor in a thread of its own. Its methods may be awaited on any loop."""

    def __init__(
        self, config: RouterConfig, secrets: RouterSecrets, *, store: GateStore | None = None, leave_process: Callable[[int], object] = os._exit
    ) -> None:
        """Cheap: the thread starts with `start`."""
        self._router = RouterActor(config, secrets, store=store, on_fault=self._leave)
        self._leave_process = leave_process
        self._drain_timeout_s = config.spec.router.drain_timeout_s
        self._scheduling = config.spec.scheduling
        self._loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="router-loop", daemon=True)

    async def start(self, node_id: str) -> RouterObservation:
        """As `RouterActor.start`."""
        if self._thread.ident is None:
            for niceness in (self._scheduling.niceness, self._scheduling.answering_niceness):  # who may go to the first may be refused the second
                come_forward(niceness)
            self._thread.start()
            _before_exit(self._stop_at_exit)
        observation = await self._there(self._router.start(node_id))
        settle_heap()
        return observation

    async def report(self) -> RouterObservation:
        """As `RouterActor.report`; answered here while the router has no loop."""
        return await (self._there(self._router.report()) if self._thread.is_alive() else self._router.report())

    async def stop(self, timeout_s: float) -> None:
        """As `RouterActor.stop`; then the thread ends."""
        if self._thread.is_alive():
            await self._there(self._router.stop(timeout_s))
            self._loop.call_soon_threadsafe(self._loop.stop)
            await asyncio.to_thread(self._thread.join, EXIT_MARGIN_S)

    def _run(self) -> None:
        if self._scheduling.short_slices:  # and so have the threads that gRPC and the executor start from here
            ask_for_slices(SHORT_SLICE_NS)
        self._loop.run_forever()

    async def _there(self, work: Coroutine[Any, Any, _R]) -> _R:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def _leave(self) -> None:
        logger.error("the router cannot go on; its process ends with code %d", FAULT_EXIT_CODE)
        self._leave_process(FAULT_EXIT_CODE)

    def _stop_at_exit(self) -> None:
        if self._thread.is_alive() and self._loop.is_running():
            stopping = asyncio.run_coroutine_threadsafe(self._router.stop(self._drain_timeout_s), self._loop)
            with contextlib.suppress(FutureTimeoutError):
                stopping.result(self._drain_timeout_s + EXIT_MARGIN_S)


def _before_exit(work: Callable[[], None]) -> None:
    # Executors refuse work once the interpreter's own exit hooks have run, and requests under way may still need them: this hook runs before those.
    register = getattr(threading, "_register_atexit", atexit.register)
    register(work)
