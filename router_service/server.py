"""The router as a process: it follows the routing table, tells the controller what it sees, and serves RouterService until it is stopped.

A plain async class; whoever hosts it (Ray, a test) calls `start`, `report` and `stop`. No call of it is on the token path.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import psutil
import torch

from actors.expert_store import ExpertStore
from cluster.core.actor_config import RouterConfig
from cluster.core.routing_table import RoutingTable
from cluster.core.status import ActorState, RouterObservation
from router_service.address import RouterAddress
from router_service.link_client import LinkPhase
from router_service.models import GateStore
from router_service.router_parts import RouterParts, RouterSecrets, tls_of

__all__ = ["RouterActor", "RouterSecrets"]

logger = logging.getLogger(__name__)

METRICS_HOST: Final = "127.0.0.1"
LOOK_S: Final = 0.1
MIN_PAUSE_S: Final = 0.02
REPORT_S: Final = 1.0
SETTLE_S: Final = 1.0
CLOSE_S: Final = 0.5
JOIN_S: Final = 5.0


class RouterActor:
    """One router. `start` once, then `report` at any time, then `stop`; SIGTERM is a `stop` where the process can hear it."""

    def __init__(self, config: RouterConfig, secrets: RouterSecrets, *, store: GateStore | None = None, on_fault: Callable[[], None] | None = None) -> None:
        """Cheap: nothing is opened before `start`. `store` is the node's, at `config.store_dir`, unless given.

        `on_fault` is called when the router has stopped by itself, because it could follow the table no more; the process should end then.
        """
        self._config = config
        self._secrets = secrets
        self._store = store
        self._on_fault = on_fault
        self._giving_up: asyncio.Task[None] | None = None
        self._parts: RouterParts | None = None
        self._observation = RouterObservation(
            config.router_id,
            ActorState.STARTING,
            "",
            host=config.spec.router.host,
            pid=os.getpid(),
            process_start_s=psutil.Process().create_time(),
        )
        self._adopting = asyncio.Lock()
        self._has_table = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping: asyncio.Task[None] | None = None
        self.stopped = asyncio.Event()

    async def start(self, node_id: str) -> RouterObservation:
        """Listen and begin to follow the table; requests are answered from the first table on. Idempotent. Raises ConfigError."""
        if self._parts is not None:
            return await self.report()
        # torch's own threads would fight the event loop for its core.
        torch.set_num_threads(1)
        store: GateStore = await asyncio.to_thread(ExpertStore, self._config.store_dir) if self._store is None else self._store
        parts = RouterParts(self._config, self._secrets, store, node_id=node_id, adopt=self._adopt)
        router = self._config.spec.router
        self._parts = parts
        try:
            await parts.health.update((), ())
            self._follow(parts)
            if router.shares_address:
                await self._wait_for_table()
            port = await self._listen(parts)
            metrics_port = parts.metrics.serve(METRICS_HOST, self._config.metrics_port)
        except BaseException:
            self._parts = None
            await parts.front.stop(0)
            await self._end_tasks()
            await parts.close(CLOSE_S)
            raise
        self._observation = replace(self._observation, state=ActorState.READY, node_id=node_id, port=port, metrics_port=metrics_port)
        self._listen_for_sigterm(router.drain_timeout_s)
        logger.info("router %s serves on %s:%d", self._config.router_id, router.host, port)
        return await self.report()

    async def report(self) -> RouterObservation:
        """How this router is, for the fleet."""
        generation = 0 if self._parts is None else self._parts.feed.router_generation
        return replace(self._observation, generation=generation)

    async def stop(self, timeout_s: float) -> None:
        """NOT_SERVING, refuse new requests, finish those under way within the limit, close everything. Idempotent: later calls wait for the first."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(timeout_s), name="router-stop")
        await asyncio.shield(self._stopping)

    async def _stop(self, timeout_s: float) -> None:
        self._observation = replace(self._observation, state=ActorState.DRAINING)
        parts, until_s = self._parts, time.monotonic() + timeout_s
        if parts is not None:
            parts.is_draining = True
            await parts.health.drain()
            # Callers of a shared address leave at once: new connections reach a sibling, where here their requests would only be refused.
            leaving = asyncio.create_task(parts.front.stop(timeout_s)) if self._config.spec.router.shares_address else None
            await parts.servicer.wait_until_idle(timeout_s)
            await parts.front.stop(CLOSE_S)
            if leaving is not None:
                await leaving
            await self._end_tasks()
            await parts.close(max(CLOSE_S, until_s - time.monotonic()))
        self._observation = replace(self._observation, state=ActorState.DEAD, reason=self._observation.reason or "stopped")
        self.stopped.set()

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _wait_for_table(self) -> None:
        """A router joins its siblings with a table, or callers that the kernel sends here would be refused while those could answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(JOIN_S):
                await self._has_table.wait()

    async def _listen(self, parts: RouterParts) -> int:
        """The port it listens on. The life before may need its time to drain to leave it."""
        router, tls = self._config.spec.router, tls_of(self._config.spec)
        address = RouterAddress(self._config)
        return await address.listen(lambda port: parts.front.start(router.host, port, tls), patience_s=router.drain_timeout_s + CLOSE_S)

    def _follow(self, parts: RouterParts) -> None:
        parts.actor_health.start()
        self._tasks = [asyncio.create_task(parts.feed.run(), name="table-feed"), asyncio.create_task(self._look(parts), name="router-look")]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """These tasks end only when cancelled; anything else is a bug. A router that follows no table would serve a stale one for ever: it drains and ends."""
        if task.cancelled():
            return
        error = task.exception()
        logger.error("%s of the router ended", task.get_name(), exc_info=error)
        self._observation = replace(self._observation, reason=f"{task.get_name()} ended with {type(error).__name__}; see the router's log")
        self._giving_up = self._giving_up or asyncio.create_task(self._give_up(), name="router-give-up")

    async def _give_up(self) -> None:
        try:
            await self.stop(self._config.spec.router.drain_timeout_s)
        finally:
            if self._on_fault is not None:
                self._on_fault()

    async def _adopt(self, table: RoutingTable) -> None:
        """Use a table: its models' gates first, then its links, then table and gates in one step, then what health says."""
        async with self._adopting:
            parts = self._parts
            if parts is None or (parts.table is not None and table.epoch < parts.table.epoch):
                return
            models = await parts.models.load(table)
            await parts.lanes.apply(table)
            if parts.table is None:
                await parts.lanes.wait_until_settled(SETTLE_S)
            parts.models.put(models)
            parts.adopt(table)
            self._has_table.set()
            await parts.health.update(table.models, parts.complete_models())

    async def _look(self, parts: RouterParts) -> None:
        """Tell the controller what is seen: lost and ejected actors at once, loads every REPORT_S; and try again models that could not be loaded."""
        reported_s, known_lost, changed = time.monotonic(), frozenset[str](), parts.actor_health.changed
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), LOOK_S)
            links = parts.links()
            parts.measure_links(links)
            lost = frozenset(str(link.endpoint.incarnation) for link in links if link.phase is LinkPhase.CLOSED)
            now_s = time.monotonic()
            if now_s - reported_s < REPORT_S and lost <= known_lost and not changed.is_set():
                continue
            changed.clear()
            if parts.feed.is_connected:
                await parts.feed.report(links, parts.counted.take_loads(), now_s - reported_s, parts.trust.take_accusations())
                await asyncio.sleep(MIN_PAUSE_S)
            reported_s, known_lost = now_s, lost
            if parts.table is not None and set(parts.table.models) - set(parts.models.current):
                await self._adopt(parts.table)

    def _listen_for_sigterm(self, timeout_s: float) -> None:
        """Only a process whose main thread runs this loop can hear the signal; elsewhere the host calls `stop`."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):
            loop.add_signal_handler(signal.SIGTERM, lambda: loop.create_task(self.stop(timeout_s)))
