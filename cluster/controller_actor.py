"""The controller as a fleet hosts it: one process with the store, the control service and the loop. A restarted process goes on by itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.cluster_view import status_json
from cluster.control_service import ControlServer, parse_spec
from cluster.controller import Controller
from cluster.core.errors import StaleTable
from cluster.core.launch import Launch
from cluster.core.spec import ControlSpec, StoreSpec
from cluster.fleet import Fleet
from cluster.scheduling import CONTROL_NICENESS, come_forward
from cluster.store import ControlStore

LOG = logging.getLogger(__name__)
EXIT_SUPERSEDED = 75
EXIT_NOT_STARTED = 76
START_BACKOFFS_S = (0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    """What the controller needs before it has a goal: where it listens and keeps its records, and the deployment's secrets.

    `port` 0 takes the recorded port, else a free one. `control` and `store` are the spec's sections that all this was made from: a later goal
    that has them otherwise is told so. `niceness` is that of processes that serve; this one stays a little behind. The secrets reach the process as constructor
    arguments and appear in no log.
    """

    deployment: str
    host: str
    state_dir: Path
    store_dir: Path
    link_secret: bytes
    control_token: bytes
    port: int = 0
    code_digest: str = ""
    observe_timeout_s: float = 5.0
    control: ControlSpec | None = None
    store: StoreSpec | None = None
    niceness: int | None = None

    def __repr__(self) -> str:
        return f"ControllerSettings({self.deployment!r}, {self.host!r}, port={self.port}, state_dir={str(self.state_dir)!r}, secrets=...)"


@dataclass(slots=True)
class _Running:
    controller: Controller
    server: ControlServer
    loop: asyncio.Task[None]


class ControllerActor:
    """Plain class: Ray hosts it with `max_restarts=-1`. Construction inside a running event loop starts it, so that a restart needs no caller."""

    def __init__(self, settings: ControllerSettings, fleet_factory: Callable[[ControllerSettings], Fleet]) -> None:
        self._settings, self._fleet_factory = settings, fleet_factory
        self._starting = asyncio.Lock()
        self._running: _Running | None = None
        self._first_start: asyncio.Task[None] | None = None
        with contextlib.suppress(RuntimeError):
            self._first_start = asyncio.get_running_loop().create_task(self._start_by_itself(), name="first start")

    async def start(self) -> str:
        """Open the store, take over, listen, reconcile. Returns the control service's HOST:PORT; starting again only returns it."""
        async with self._starting:
            if self._running is None:
                self._running = await self._start()
        return self._running.server.address

    async def _start(self) -> _Running:
        settings = self._settings
        if settings.niceness is not None:
            come_forward(max(settings.niceness, CONTROL_NICENESS))
        async with contextlib.AsyncExitStack() as opened:  # what was opened is closed again when a later part fails
            store = ControlStore(settings.state_dir)
            opened.callback(store.close)
            server = ControlServer(settings.host, settings.port or store.port(), fixed=settings.port != 0)
            opened.push_async_callback(server.stop)
            fleet = self._fleet_factory(settings)
            opened.push_async_callback(fleet.close)
            controller = Controller(fleet, store, Launch(settings.store_dir, settings.code_digest, server.address, settings.control, settings.store))
            store.put_port(server.port)
            await server.start(controller, settings.control_token)
            opened.pop_all()
        return _Running(controller, server, asyncio.create_task(self._reconcile(controller), name="reconcile"))

    async def _start_by_itself(self) -> None:
        """Start without a caller, as after a restart by Ray. What keeps failing ends the process: Ray starts a fresh one."""
        for attempt, pause_s in enumerate((*START_BACKOFFS_S, None), start=1):
            try:
                await self.start()
            except Exception:
                LOG.exception("controller: start %d of %d failed", attempt, len(START_BACKOFFS_S) + 1)
            else:
                return
            if pause_s is not None:
                await asyncio.sleep(pause_s)
        os._exit(EXIT_NOT_STARTED)

    async def _reconcile(self, controller: Controller) -> None:
        try:
            await controller.run()
        except StaleTable as error:
            LOG.critical("controller: %s", error)
            os._exit(EXIT_SUPERSEDED)

    async def apply(self, spec_json: str, replace_differing: bool = False) -> tuple[int, list[str]]:
        """Record a goal. Returns its revision and what differs and was not replaced. Raises InvalidRequest or ConfigError."""
        running = await self._up()
        revision, differences = await running.controller.apply(parse_spec(spec_json), replace_differing=replace_differing)
        return revision, list(differences)

    async def status_json(self) -> str:
        """One coherent view as JSON; the fields are GetClusterStatusResponse's."""
        return status_json((await self._up()).controller)

    async def down(self, timeout_s: float = 60.0) -> None:
        """End everything of this deployment but this process. Raises FleetError, by name of what is left, when the limit is reached."""
        await (await self._up()).controller.down(timeout_s=timeout_s)

    async def stop(self) -> None:
        """Stop looking and listening; what runs keeps running."""
        if self._first_start is not None:
            self._first_start.cancel()
            await asyncio.gather(self._first_start, return_exceptions=True)
        async with self._starting:
            running, self._running = self._running, None
        if running is None:
            return
        running.loop.cancel()
        await asyncio.gather(running.loop, return_exceptions=True)
        await running.server.stop()
        await running.controller.close()

    async def _up(self) -> _Running:
        await self.start()
        if self._running is None:
            message = "the controller was stopped"
            raise StaleTable(message)
        return self._running
