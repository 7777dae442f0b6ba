"""The controller's core on a simulated fleet: look, decide, record, publish, act; it can pause, and crash to what it had recorded."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from cluster.core.actions import Action
from cluster.core.actor_config import ExpertActorConfig
from cluster.core.errors import FleetError
from cluster.core.health import Health, LinkReport, Wrong, taken_up, with_report
from cluster.core.ids import Incarnation
from cluster.core.launch import Launch
from cluster.core.memory import Memory, ModelRecord, with_goal, with_model, with_outcome
from cluster.core.reconcile import Decision, Told, reconcile
from cluster.core.routing_table import RoutingTable
from cluster.core.spec import ClusterSpec
from cluster.core.status import ActorObservation, FleetObservation
from cluster.fleet_actions import Outcome, perform
from kit.fleet import FakeActor, FakeFleet
from kit.sim_actors import SimActors, device_of

DURABLE = (
    "generation", "epoch", "spec_revision", "reached_revision", "replace", "replacing", "models", "actors", "routers", "published", "quarantined", "accused"
)  # fmt: skip


class LoopClock:
    """The fleet's clock is the loop's."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    @property
    def time_s(self) -> float:
        return self._loop.time()

    def now_s(self) -> float:
        return self._loop.time()

    def unix_s(self) -> float:
        return 1.7e9 + self._loop.time()

    async def sleep(self, for_s: float) -> None:
        if for_s > 0:
            await asyncio.sleep(for_s)


class SimFleet(FakeFleet):
    """Actors on two devices of each node; whoever is stopped is gone for the routers, too."""

    world: SimActors

    async def stop_actor(self, incarnation: Incarnation, *, timeout_s: float) -> None:
        await super().stop_actor(incarnation, timeout_s=timeout_s)
        self.world.bury(self.world.of(incarnation), with_reset=True)

    async def start_actor(self, config: ExpertActorConfig, *, node_id: str, num_gpus: float, num_cpus: float) -> None:
        await super().start_actor(config, node_id=node_id, num_gpus=num_gpus, num_cpus=num_cpus)
        self.world.of(config.incarnation)

    def _observation(self, incarnation: Incarnation, actor: FakeActor) -> ActorObservation:
        seen = super()._observation(incarnation, actor)
        if seen.report is None:
            return seen
        alive = self.world.of(incarnation)
        oldest_s = max(0.0, self.clock.time_s - alive.queue[0].arrived_s) if alive.queue else 0.0
        report = replace(seen.report, device=device_of(incarnation), frames_done=alive.frames_done, oldest_age_s=oldest_s)
        return replace(seen, report=report)


class SimController:
    """One deployment's controller. `is_paused`: it does not run; routers hear nothing."""

    def __init__(self, fleet: SimFleet, spec: ClusterSpec, launch: Launch) -> None:
        self.fleet, self.spec, self.launch = fleet, spec, launch
        self.memory = with_goal(Memory(), 1, replace_differing=False)
        self.health = Health()
        self.table: RoutingTable | None = None
        self.decision: Decision | None = None
        self.is_paused = False
        self.num_crashes = 0
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._outcomes: list[Outcome] = []
        self._status: FleetObservation | None = None

    async def step(self) -> None:
        """One look, one decision; what takes long goes on beside later steps."""
        if self.is_paused:
            return
        self._fold_outcomes()
        try:
            status = await self.fleet.observe()
        except FleetError:
            return
        now_s = self.fleet.clock.time_s
        if self._is_at_rest(status) and self.health.is_calm(now_s):
            return
        self._status = status
        told = Told(health=self.health)
        self.decision = reconcile(self.spec, self.launch, self.memory, status, told)
        self.memory = self.decision.memory
        self.health = taken_up(self.health, now_s)
        self._publish()
        for action in self.decision.actions:
            if action.key not in self._under_way:
                self._under_way[action.key] = asyncio.create_task(self._perform(action))

    def report(self, router_id: str, epoch: int, links: list[LinkReport], wrong: list[Wrong]) -> bool:
        """A router tells how actors fare; False: nobody hears it."""
        if self.is_paused:
            return False
        if self.memory.router_epochs.get(router_id) != epoch:
            self.memory = replace(self.memory, router_epochs={**self.memory.router_epochs, router_id: epoch})
        self.health = with_report(self.health, router_id, links, wrong, self.fleet.clock.time_s)
        return True

    def crash(self) -> None:
        """Its process ends; a new one begins from the records, under a higher epoch."""
        self.num_crashes += 1
        for task in self._under_way.values():
            task.cancel()
        self._under_way.clear()
        self._outcomes.clear()
        durable = {name: getattr(self.memory, name) for name in DURABLE}
        self.memory = replace(Memory(), **{**durable, "epoch": self.memory.epoch + 1})
        self.health = Health()
        self._publish()

    @property
    def is_settled(self) -> bool:
        """Whether every copy is ready where it belongs and routed to."""
        return self.decision is not None and self.decision.state == "SERVING"

    def _is_at_rest(self, status: FleetObservation) -> bool:
        """Whether the last decision still stands, as the controller judges it."""
        last = self.decision
        if last is None or not last.is_at_rest or last.memory is not self.memory or self._under_way or self._status is None:
            return False
        return status.has_same_facts(self._status)

    def _fold_outcomes(self) -> None:
        outcomes, self._outcomes = self._outcomes, []
        for outcome in outcomes:
            if outcome.manifest is not None:
                model = self.spec.models[0]
                self.memory = with_model(self.memory, model.name, ModelRecord(outcome.manifest, str(model.path), str(model.dtype), model.shadow))
            self.memory = with_outcome(self.memory, outcome.action, outcome.error, self.fleet.clock.time_s, final=outcome.final)

    def _publish(self) -> None:
        memory = self.memory
        if memory.published.models and memory.epoch and (self.table is None or self.table.epoch != memory.epoch):
            self.table = memory.published.at_epoch(memory.epoch)

    async def _perform(self, action: Action) -> None:
        self._outcomes.append(await perform(action, self.fleet, self.spec, self.launch, self.memory))
        self._under_way.pop(action.key, None)
