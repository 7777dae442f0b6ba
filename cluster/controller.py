"""The control path, top to bottom: observe -> reconcile (pure) -> durable record -> publish table -> perform actions; and again, level-triggered.

Nothing here decides: `core.reconcile` does. Nothing here is on a token's way: a router that hears nothing keeps serving on the table it has.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.clock import Clock, SystemClock
from cluster.core.actions import Action, ImportExperts, ImportModel, target_of, verb_of
from cluster.core.devices import found_device, released
from cluster.core.doubts import recorded_links
from cluster.core.errors import ConfigError, FleetError, StaleTable
from cluster.core.health import LinkReport, Wrong
from cluster.core.ids import ExpertId
from cluster.core.launch import Launch
from cluster.core.lifecycle import SUSPECT_LIMIT_S
from cluster.core.memory import Memory, read_model, with_goal, with_model, with_outcome
from cluster.core.placement import lay_out, shape_of
from cluster.core.reconcile import Decision, Told, adopt, reconcile
from cluster.core.routing_table import RoutingTable
from cluster.core.spec import ClusterSpec
from cluster.core.status import ActorState, FleetObservation
from cluster.core.table_draft import TableDraft
from cluster.fleet import Fleet
from cluster.fleet_actions import Outcome, perform
from cluster.router_reports import RouterReports
from cluster.store import ControlStore, NewDecision
from cluster.teardown import stop_actors, stop_routers

LOG = logging.getLogger(__name__)
TROUBLE_PAUSE_S = 1.0
IDLE_PAUSE_S = 0.25
URGENT_PAUSE_S = 0.03
STOP_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One coherent view, for status: all parts belong to the same look."""

    spec: ClusterSpec | None
    memory: Memory
    status: FleetObservation
    decision: Decision | None
    controller_generation: int
    imports: Mapping[str, tuple[int, int]]
    trouble: str
    told: Told
    store_was_damaged: bool = False


class Controller:
    """One deployment's controller. Call `run` once; everything else may be called while it runs, from the same event loop."""

    def __init__(self, fleet: Fleet, store: ControlStore, launch: Launch, *, clock: Clock | None = None) -> None:
        self._fleet, self._store, self._launch = fleet, store, launch
        self._clock: Clock = clock or SystemClock()
        self._memory = store.memory()
        self._is_blank = not self._memory.actors and not self._memory.published.models
        # Routers may have heard a controller whose records are lost: the clock is above its generation.
        self.generation = store.take_over(above=int(self._clock.unix_s()) if self._is_blank else 0)
        self._blank_since_s = self._clock.now_s()
        goal = store.goal()
        self._spec = ClusterSpec.model_validate_json(goal) if goal else None
        self._is_going_down = goal == ""
        self._reports = RouterReports()
        self._status = FleetObservation(self._clock.now_s())
        self._decision: Decision | None = None
        self._decided_for: ClusterSpec | None = None
        self._table: RoutingTable | None = None
        self._newer_table = asyncio.Event()
        self._wake = asyncio.Event()
        self._stepping = asyncio.Lock()
        self._under_way: dict[str, tuple[Action, asyncio.Task[None]]] = {}
        self._outcomes: list[Outcome] = []
        self._imports: Mapping[str, tuple[int, int]] = {}
        self._agents_up: set[str] = set()
        self._trouble, self._num_failed_looks, self._has_moved = "", 0, False
        self._raise_epoch()

    async def run(self) -> None:
        """Reconcile until cancelled. Raises StaleTable when another controller has taken over the store: this one must end then."""
        while True:
            pause_s = IDLE_PAUSE_S
            try:
                if self._is_going_down:
                    await self.down()
                await self.step()
                pause_s = self._pause_s()
                self._trouble, self._num_failed_looks = "", 0
            except StaleTable:
                raise
            except Exception as error:  # noqa: BLE001 - a look that fails must not end the loop; it is logged and shown in the status
                self._note_failed_look(error)
                pause_s = TROUBLE_PAUSE_S
            await self._pause(pause_s)

    async def step(self) -> None:
        """One look, one decision: recorded, published, begun. Actions that take long go on beside later steps."""
        async with self._stepping:
            self._fold_outcomes()
            status = await self._fleet.observe(out=self._reports.out(self._clock.now_s()))
            self._imports = await self._fleet.import_progress() if any(key.startswith("import") for key in self._under_way) else {}
            self._agents_up.update(place.partition("/")[0] for place in self._imports)
            was_at_rest = self._is_at_rest(status)
            self._status = status
            if self._spec is not None:
                self._reports.judge_heat(self._spec.replication, self._memory.published, status.observed_s)
            if self._spec is None or was_at_rest or (self._is_blank and not self._rebuild(self._spec, status)):
                return
            told = self._reports.told
            decision = reconcile(self._spec, self._launch, self._memory, status, told)
            self._decided_for = self._spec
            actions = self._to_begin(decision.actions, self._spec)
            self._record(decision, actions)
            self._reports.note_decided(told, status.observed_s)
            self._publish()
            for action in actions:
                self._begin(action)

    async def apply(self, spec: ClusterSpec, *, replace_differing: bool = False) -> tuple[int, tuple[str, ...]]:
        """Record a new goal. Returns its revision and what differs and is not replaced. Raises ConfigError for a goal that contradicts itself."""
        if self._spec is not None and spec.name != self._spec.name:
            message = f"name: this controller serves {self._spec.name}; deploy {spec.name} with a controller of its own"
            raise ConfigError(message)
        manifests = {name: record.manifest for name, record in self._memory.models.items()}
        lay_out(spec, manifests, shape_of(spec, manifests), {})
        is_same = spec == self._spec and self._memory.spec_revision > 0
        revision = self._memory.spec_revision + (0 if is_same else 1)
        self._memory = with_goal(self._memory, revision, replace_differing=replace_differing or (is_same and self._memory.replace))
        self._store.save(self._memory)
        self._store.put_goal(spec.model_dump_json())
        self._spec, self._is_going_down = spec, False
        try:
            await self.step()
        except FleetError as error:
            self._trouble = f"the last look failed: {error}"
        self._wake.set()
        differences = self._decision.differences if self._decision is not None else ()
        return revision, () if replace_differing else differences

    async def down(self, *, timeout_s: float = 60.0) -> None:
        """End everything of this deployment, routers first, and forget it. Raises FleetError when something still runs after the limit."""
        async with self._stepping:
            self._is_going_down = True
            spec, self._spec = self._spec, None
            self._store.put_goal("")
            await self._cancel_under_way()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._stop_everything(spec)
            except TimeoutError as error:
                left = [str(actor.incarnation) for actor in self._status.actors] + [router.router_id for router in self._status.routers]
                message = f"still running after {timeout_s:g} s: {', '.join(left[:8])}; run down again, or look at these actors with `ray list actors`"
                raise FleetError(message) from error
            memory = self._memory
            self._memory = replace(Memory(), generation=memory.generation, epoch=memory.epoch, spec_revision=memory.spec_revision)
            self._store.save(self._memory)
            self._decision, self._is_going_down = None, False

    def snapshot(self) -> Snapshot:
        """What the last look saw and what was decided."""
        told, was_damaged = self._reports.told, self._store.was_damaged
        return Snapshot(self._spec, self._memory, self._status, self._decision, self.generation, self._imports, self._trouble, told, was_damaged)

    @property
    def table(self) -> RoutingTable | None:
        """The published table; None before the first."""
        return self._table

    @property
    def store(self) -> ControlStore:
        """The durable records."""
        return self._store

    def observed_age_s(self) -> float:
        """How old the snapshot's facts are."""
        return self._clock.now_s() - self._status.observed_s

    async def wait_until_newer(self, epoch: int, *, timeout_s: float) -> RoutingTable | None:
        """The table once its epoch is above `epoch`; None when the time is up first."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._table is None or self._table.epoch <= epoch:
                    await self._newer_table.wait()
        except TimeoutError:
            return None
        return self._table

    def register_router(self, generation: int, last_epoch: int) -> int:
        """The generation of a router that connects: a new one for 0. An epoch that it has seen is lifted above.

        Also one equal to ours: it may be of a controller whose records were lost, and then stands for another table.
        """
        memory = self._memory
        given = generation or memory.generation + 1
        memory = replace(memory, generation=max(memory.generation, given))
        if last_epoch and last_epoch >= memory.epoch:
            memory = replace(memory, epoch=last_epoch + 1)
        self._memory = memory
        self._store.save(memory)
        self._publish()
        return given

    def report_health(
        self,
        router_id: str,
        epoch: int,
        links: Iterable[LinkReport] = (),
        tokens: Mapping[ExpertId, int] | None = None,
        window_s: float = 0.0,
        wrong: Sequence[Wrong] = (),
    ) -> int:
        """Fold in what a router sees; what is news of actors that are out, or of wrong numbers, is looked into at once. Returns our epoch."""
        known = epoch if epoch <= self._memory.epoch else 0  # a higher one is another controller's, whose table may hold anything
        if self._memory.router_epochs.get(router_id) != known:
            self._memory = replace(self._memory, router_epochs={**self._memory.router_epochs, router_id: known})
        if self._reports.fold(router_id, recorded_links(self._memory, links), tokens or {}, window_s, wrong, self._clock.now_s()):
            self._wake.set()
        return self._memory.epoch

    def release_device(self, device: str) -> bool:
        """Trust a quarantined device (NODE/DEVICE) again; False when it is not quarantined."""
        if (name := found_device(self._memory, self._status, device)) is None:
            return False
        self._memory = released(self._memory, name, self._status, self._clock.unix_s())
        news = [NewDecision("release_device", name, "an operator trusts it again", self._memory.epoch)]
        self._store.save(self._memory, news, unix_time_s=self._clock.unix_s())
        self._wake.set()
        return True

    async def close(self) -> None:
        """Stop acting; what runs keeps running."""
        await self._cancel_under_way()
        await self._fleet.close()
        self._store.close()

    def _note_failed_look(self, error: Exception) -> None:
        """Log the first failure in a row, then at growing intervals: the second, fourth, eighth ..."""
        self._trouble = f"the last look failed: {type(error).__name__}: {error}"
        self._num_failed_looks += 1
        if self._num_failed_looks.bit_count() == 1:
            LOG.error("controller: %d looks in a row failed", self._num_failed_looks, exc_info=error)

    def _is_at_rest(self, status: FleetObservation) -> bool:
        """Whether the last decision still stands: same goal, same memory, same facts, and nothing in it that waits for time to pass."""
        last = self._decision
        if last is None or not last.is_at_rest or last.memory is not self._memory or self._decided_for is not self._spec:
            return False
        return self._reports.is_calm(status.observed_s) and not self._under_way and status.has_same_facts(self._status)

    def _pause_s(self) -> float:
        """A moment only while experts have no copy and something was just done about it."""
        pause_s = self._spec.control.reconcile_s if self._spec is not None else IDLE_PAUSE_S
        is_urgent = self._has_moved and self._memory.inexact_since_s is not None and self._memory.reached_revision > 0
        return min(URGENT_PAUSE_S, pause_s) if is_urgent else pause_s

    def _rebuild(self, spec: ClusterSpec, status: FleetObservation) -> bool:
        """With an empty store: take over what runs, once all of it has answered or had the time to. False: not yet."""
        self._memory = adopt(self._memory, spec, status)
        if self._memory.actors or self._memory.routers or self._memory.epoch:
            # Lives that ended had higher numbers than those seen; routers may still know them.
            self._memory = replace(self._memory, generation=max(self._memory.generation, int(self._clock.unix_s())))
        living = [actor.incarnation.actor_id for actor in status.actors if actor.state is not ActorState.DEAD]
        has_waited = self._clock.now_s() - self._blank_since_s >= SUSPECT_LIMIT_S
        self._is_blank = not has_waited and any(name not in self._memory.actors for name in living)
        return not self._is_blank

    def _to_begin(self, actions: Sequence[Action], spec: ClusterSpec) -> list[Action]:
        """What is not under way yet; of imports that start a node's agent, as few at a time as actors: every start of a process is heavy."""
        importing = (action for action, _ in self._under_way.values() if isinstance(action, ImportExperts))
        starting = {action.node_id for action in importing} - self._agents_up
        chosen: list[Action] = []
        for action in actions:
            if action.key in self._under_way:
                continue
            if isinstance(action, ImportExperts) and action.node_id not in self._agents_up | starting:
                if len(starting) >= spec.actors.start_parallelism:
                    continue
                starting.add(action.node_id)
            chosen.append(action)
        return chosen

    def _raise_epoch(self) -> None:
        """Number the recorded table anew: commands of a controller before this one are older from here on."""
        if self._memory.epoch:
            self._memory = replace(self._memory, epoch=self._memory.epoch + 1)
            self._store.save(self._memory)
            self._publish()

    def _fold_outcomes(self) -> None:
        """Fold in how actions ended: before the look, so that the look is younger than what it is compared with."""
        outcomes, self._outcomes = self._outcomes, []
        for outcome in outcomes:
            if isinstance(outcome.action, ImportModel | ImportExperts) and outcome.error is None:
                self._agents_up.add(outcome.action.node_id)
            if not self._is_outdated(outcome.action):
                self._fold(outcome if outcome.manifest is None else self._with_model(outcome))
        if any(outcome.manifest is not None for outcome in outcomes):
            self._store.save(self._memory)

    def _fold(self, outcome: Outcome) -> None:
        self._memory = with_outcome(self._memory, outcome.action, outcome.error, self._clock.now_s(), final=outcome.final)
        if outcome.error is not None:
            LOG.warning("controller: %s failed: %s", outcome.action.key, outcome.error)

    def _with_model(self, outcome: Outcome) -> Outcome:
        """Note what an import read, unless it contradicts what was recorded for the model."""
        action, manifest = outcome.action, outcome.manifest
        if manifest is None or not isinstance(action, ImportModel):
            return outcome
        record = read_model(self._memory.models.get(action.model), action, manifest)
        if record is None:
            message = f"model {action.model}: {action.source} holds other weights than those being served; take the model out first, or give it a new name"
            return replace(outcome, error=message, final=True)
        self._memory = with_model(self._memory, action.model, record)
        return outcome

    def _is_outdated(self, action: Action) -> bool:
        """Whether this read a model from where the goal no longer has it: what it found, or missed, says nothing of the goal."""
        if not isinstance(action, ImportModel):
            return False
        model = self._spec.model(action.model) if self._spec is not None else None
        return model is None or (model.path, model.dtype, model.shadow) != (action.source, action.dtype, action.shadow)

    def _record(self, decision: Decision, actions: Sequence[Action]) -> None:
        """Make the decision durable; from here on it is what happens, crash or not."""
        memory, epoch = decision.memory, decision.memory.epoch
        news = [NewDecision(verb_of(action), target_of(action), action.reason, epoch) for action in actions]
        news += [NewDecision("quarantine", device, why, epoch) for device, why in memory.quarantined.items() if device not in self._memory.quarantined]
        if decision.memory.published is not self._memory.published:
            news.append(NewDecision("publish", f"{len(decision.table.copies)} experts", f"{decision.num_copies_ready} copies ready", epoch))
        self._store.save(decision.memory, news, unix_time_s=self._clock.unix_s())
        self._has_moved = bool(actions) or decision.memory.published is not self._memory.published or self._status.is_loading
        self._memory, self._decision = decision.memory, decision

    def _publish(self) -> None:
        """Hand the recorded table, under its recorded number, to whoever waits for a newer one.

        Before the first one that is decided here there is none: an empty table would take from routers the one that they have.
        """
        is_decided = bool(self._memory.published.models) or self._table is not None
        if is_decided and self._memory.epoch and (self._table is None or self._table.epoch != self._memory.epoch):
            self._table = self._memory.published.at_epoch(self._memory.epoch)
            self._newer_table.set()
            self._newer_table = asyncio.Event()

    def _begin(self, action: Action) -> None:
        """Perform an action beside the loop; its end wakes the loop."""
        spec = self._spec
        if spec is None:
            return

        async def run() -> None:
            try:
                outcome = await perform(action, self._fleet, spec, self._launch, self._memory)
            except Exception as error:  # a defect in an adapter: told like any failure, and logged whole
                LOG.exception("controller: %s raised", action.key)
                outcome = Outcome(action, f"{action.key} raised {type(error).__name__}: {error}")
            self._outcomes.append(outcome)
            self._under_way.pop(action.key, None)
            self._wake.set()

        self._under_way[action.key] = action, asyncio.create_task(run(), name=action.key)

    async def _pause(self, pause_s: float) -> None:
        """Until something happened, or it is time to look anyway."""
        try:
            async with asyncio.timeout(pause_s):
                await self._wake.wait()
        except TimeoutError:
            return
        finally:
            self._wake.clear()

    async def _cancel_under_way(self) -> None:
        tasks, self._under_way = [task for _, task in self._under_way.values()], {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._outcomes.clear()

    async def _stop_everything(self, spec: ClusterSpec | None) -> None:
        """Routers first, so that nothing is dispatched any more; then the table; then actors, a few at a time; then the nodes' agents."""
        await stop_routers(self._fleet, self._look, timeout_s=spec.router.drain_timeout_s if spec is not None else STOP_LIMIT_S)
        if self._memory.published.copies:
            self._memory = replace(self._memory, published=TableDraft(), epoch=self._memory.epoch + 1)
            self._store.save(self._memory)
            self._publish()
        await stop_actors(self._fleet, self._look, timeout_s=spec.actors.drain_timeout_s if spec is not None else STOP_LIMIT_S)
        await self._fleet.stop_agents(timeout_s=STOP_LIMIT_S)

    async def _look(self) -> FleetObservation:
        self._status = await self._fleet.observe()
        return self._status
