"""A controller on a fake fleet and a manual clock, driven step by step."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

from cluster.controller import Controller
from cluster.core.actions import ImportExperts
from cluster.core.descriptors import Manifest
from cluster.core.health import LinkReport, Wrong
from cluster.core.ids import CopyId, ExpertId, Incarnation
from cluster.core.launch import Launch
from cluster.core.placement import wanted_copies
from cluster.core.routing_table import RoutingTable, newer
from cluster.core.spec import ActorsSpec, ClusterSpec, ModelSpec
from cluster.core.status import ActorState
from cluster.store import ControlStore
from kit.fleet import FakeFleet, ManualClock, make_manifest

STEP_S = 0.25
MAX_STEPS = 800
LAUNCH = Launch(Path("/store"), code_digest="code-1", control_address="127.0.0.1:7777")


def make_spec(*names: str, actors: ActorsSpec | None = None, replicas: int = 1) -> ClusterSpec:
    """Models `names` (default `m`), each in /models/NAME."""
    models = tuple(ModelSpec(name=name, path=Path(f"/models/{name}"), replicas=replicas) for name in names or ("m",))
    return ClusterSpec(name="test", models=models, actors=actors or ActorsSpec())


class ModelRouter:
    """A router as far as the control path is concerned: the newest table it was sent, and what it tells the controller."""

    def __init__(self, router_id: str) -> None:
        self.router_id = router_id
        self.table: RoutingTable | None = None
        self.generation = 0
        self.controller_generation = 0
        self._connected_to: Controller | None = None
        self.out: dict[Incarnation, LinkReport] = {}
        self.queue_age_s: dict[str, float] = {}
        self.tokens: dict[ExpertId, int] = {}
        self.window_s = 0.0
        self.wrong: list[Wrong] = []

    def links(self) -> list[LinkReport]:
        """One for each actor in the table; `out` says which are not as they should be, `queue_age_s` how long rows wait for an actor."""
        if self.table is None:
            return []
        lives = [endpoint.incarnation for endpoint in self.table.actors.values()]
        return [self.out.get(life) or LinkReport(life, oldest_age_s=self.queue_age_s.get(life.actor_id, 0.0)) for life in lives]

    def hear(self, controller: Controller) -> None:
        """Connect where needed, take a newer table, report. What a real router refuses, breaks the test."""
        if self._connected_to is not controller:
            self._connected_to = controller
            self.generation = controller.register_router(self.generation, self.table.epoch if self.table is not None else 0)
        table = controller.table
        if table is None:
            return
        assert controller.generation >= self.controller_generation, "an older controller is heard"
        self.controller_generation = controller.generation
        known = self.table
        self.table = newer(known, table)
        assert known is None or table.epoch > known.epoch or table == known, "one epoch stands for two tables"
        controller.report_health(self.router_id, self.table.epoch, self.links(), self.tokens, self.window_s, self.wrong)
        self.wrong = []


class ControlRig:
    """A deployment that can be stepped, broken, crashed and restarted. `spec.models` are known to the fleet as 2 layers x 4 experts."""

    def __init__(self, state_dir: Path, spec: ClusterSpec | None = None, *, nodes: int = 4, gpus: float = 1.0, launch: Launch = LAUNCH) -> None:
        self.clock = ManualClock()
        self.fleet = FakeFleet(self.clock, nodes=nodes, gpus=gpus)
        self.spec = spec or make_spec()
        self.launch, self.state_dir = launch, state_dir
        for model in self.spec.models:
            self.fleet.models[model.path] = make_manifest(model.name, source=str(model.path))
        self.controller = self.restart()
        self.routers: dict[str, ModelRouter] = {}
        self.routers_hear = True
        self.after_step: Callable[[], None] = lambda: None

    def restart(self) -> Controller:
        """A new controller process on the same store; the old one is forgotten as it stands."""
        self.controller = Controller(self.fleet, ControlStore(self.state_dir), self.launch, clock=self.clock)
        return self.controller

    async def crash(self) -> None:
        """The controller's process dies: what it had under way is cut off; then a new one starts."""
        await self.controller._cancel_under_way()
        self.controller._store.close()
        self.restart()

    async def deploy(self) -> None:
        await self.controller.apply(self.spec)
        await self.until(lambda: self.state == "SERVING" and not self.is_importing)

    async def step(self) -> None:
        await self.controller.step()
        for _ in range(4):
            await asyncio.sleep(0)
        if self.routers_hear:
            self.hear()
        self.after_step()
        self.clock.advance(STEP_S)

    def hear(self) -> None:
        """Every router that runs hears the controller."""
        self.routers = {name: self.routers.get(name) or ModelRouter(name) for name in self.fleet.routers}
        for name, router in self.routers.items():
            if self.fleet.router_state(name) is ActorState.READY:
                router.hear(self.controller)

    async def lose_store(self) -> None:
        """The controller ends, and its records with it; a new one starts and is given the goal."""
        await self.controller._cancel_under_way()
        self.controller._store.close()
        shutil.rmtree(self.state_dir)
        self.restart()

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(MAX_STEPS):
            if condition():
                return
            await self.step()
        snapshot = self.controller.snapshot()
        message = f"not reached in {MAX_STEPS} steps: {snapshot.decision.state if snapshot.decision else None}: {self.message}\n" + "\n".join(
            self.fleet.log[-20:]
        )
        raise AssertionError(message)

    @property
    def state(self) -> str:
        decision = self.controller.snapshot().decision
        return decision.state if decision is not None else ""

    @property
    def is_importing(self) -> bool:
        """Whether some node's store is being filled, or is about to be."""
        decision = self.controller.snapshot().decision
        return bool(self.controller._under_way) or decision is None or any(isinstance(action, ImportExperts) for action in decision.actions)

    @property
    def message(self) -> str:
        decision = self.controller.snapshot().decision
        return decision.message if decision is not None else ""

    def manifest(self, name: str = "m") -> Manifest:
        return self.fleet.models[Path(f"/models/{name}")]

    def copies(self, name: str = "m") -> list[CopyId]:
        return wanted_copies(self.manifest(name))

    def incarnation(self, actor_id: str) -> Incarnation:
        return self.controller.snapshot().memory.actors[actor_id].incarnation

    def published_on(self, copy: CopyId) -> list[str]:
        table = self.controller.table
        return [] if table is None else [str(entry.incarnation) for entry in table.copies_of(copy.expert)]
