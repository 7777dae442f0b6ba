"""One decision from the whole observed world: what to remember, what to publish, what to do. Pure: the same inputs give the same decision.

`_Step.decide` reads top to bottom like the control path: models, actors, copies, table, routers, farewells. Nothing here is done; the controller
records the decision, publishes its table and only then performs its actions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.core.actions import Action, ImportExperts, ImportModel
from cluster.core.descriptors import Manifest
from cluster.core.devices import with_strike_of
from cluster.core.errors import ConfigError
from cluster.core.health import Health
from cluster.core.ids import CopyId, ExpertId, Role
from cluster.core.judgement import judge, with_exactness
from cluster.core.launch import Launch, controller_differences
from cluster.core.lifecycle import ActorView, Life, above_seen, running_routers, track, views
from cluster.core.load import Load
from cluster.core.memory import ActorRecord, Memory, RouterRecord, Withdrawal, load_key, with_failure, without_stored_copy
from cluster.core.notes import is_ready_at, joined, standing, unsettled
from cluster.core.placement import Layout, Shape, copy_bytes, lay_out, shape_of, stock_missing, wanted_copies
from cluster.core.plan import assumptions, draft_table, let_go, note_unpublished, plan_copies
from cluster.core.replication import Warmth, place_further
from cluster.core.roster import Roster, differing, farewells, plan_roster
from cluster.core.routers import plan_routers, routers_missing
from cluster.core.spec import ClusterSpec, ModelSpec
from cluster.core.status import ActorState, FleetObservation, NodeObservation, SlotState
from cluster.core.table_draft import Held, TableDraft


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows from one look. `memory` is to be recorded before `table` is published and `actions` are performed.

    `is_at_rest`: the same facts later give the same decision; nothing in it waits for time to pass.
    """

    memory: Memory
    actions: tuple[Action, ...]
    table: TableDraft
    state: str
    message: str
    differences: tuple[str, ...] = ()
    num_copies_wanted: int = 0
    num_copies_ready: int = 0
    actors: Mapping[str, ActorView] = field(default_factory=dict)
    is_at_rest: bool = False


@dataclass(frozen=True, slots=True)
class Told:
    """What routers told: how busy experts are, how actors fare, and which experts the replication policy wants more of."""

    load: Load = field(default_factory=Load)
    health: Health = field(default_factory=Health)
    hot: Mapping[ExpertId, Warmth] = field(default_factory=dict)


def reconcile(spec: ClusterSpec, launch: Launch, memory: Memory, status: FleetObservation, told: Told) -> Decision:
    """Decide; `status.observed_s` is now. A goal that contradicts itself starts and moves nothing; what is lost still leaves the table."""
    if is_adopted(memory):
        memory = adopt(memory, spec, status)  # those that answer only now
    memory = _forget_models(spec, track(above_seen(memory, status), status))
    memory, notes = judge(spec, memory, status, told.health)
    actors = views(spec, memory, status)
    try:
        return _Step(spec, launch, memory, status, told, actors, notes).decide()
    except ConfigError as error:
        table = _without_lost(memory.published, actors)
        memory = _published(memory, table, status.observed_s)
        return Decision(memory, (), table, "DEGRADED" if memory.reached_revision else "FAILED", str(error), actors=actors)


def adopt(memory: Memory, spec: ClusterSpec, status: FleetObservation) -> Memory:
    """Rebuild the records from what runs, for a controller whose store is empty: numbers go on above the highest seen."""
    records, routers = dict(memory.actors), dict(memory.routers)
    generation, epoch = memory.generation, memory.epoch
    for actor in sorted(status.actors, key=lambda actor: actor.incarnation):
        generation = max(generation, actor.incarnation.generation)
        if actor.report is not None and actor.state is ActorState.READY:
            epoch = max(epoch, actor.report.max_epoch)
            record = ActorRecord(actor.incarnation, actor.node_id, spec.actors.num_gpus, actor.report.num_slots, was_ready=True)
            records[actor.incarnation.actor_id] = record
    for router in status.routers:
        generation = max(generation, router.generation)
        routers.setdefault(router.router_id, RouterRecord(router.router_id, router.node_id, "", shares_address=spec.router.shares_address))
    return replace(memory, actors=records, routers=routers, generation=generation, epoch=epoch)


def is_adopted(memory: Memory) -> bool:
    """Whether the records were rebuilt from what runs, and nothing was published since: routers hold a table that is not known here."""
    return bool(memory.actors) and not memory.published.models


class _Step:
    """One decision in the making: the facts, and what has been decided so far."""

    def __init__(
        self,
        spec: ClusterSpec,
        launch: Launch,
        memory: Memory,
        status: FleetObservation,
        told: Told,
        actors: Mapping[str, ActorView],
        notes: Sequence[str],
    ) -> None:
        self.spec, self.launch, self.memory, self.status, self.told = spec, launch, memory, status, told
        self.actors: Mapping[str, ActorView] = actors
        self.now_s = status.observed_s
        self.head: NodeObservation | None = next((node for node in status.nodes if node.is_head and node.alive), None)
        self.actions: list[Action] = []
        self.notes: list[str] = list(notes)

    def decide(self) -> Decision:
        """All of it, in order."""
        manifests = self._models()
        unknown = [model for model in self.spec.models if model.name not in manifests]
        is_partial = not all(self._import_failed(model) for model in unknown)
        if self._must_wait(manifests, is_partial=is_partial):
            return self._decision(self.memory.published, Layout(Shape((), (), 0, 0)), ())
        shape = shape_of(self.spec, manifests)
        different = differing(self.spec, self.launch, shape, self.actors) if manifests else {}
        if not is_partial:
            self._choose_replaced(shape, manifests, different)
        wanted = {copy for manifest in manifests.values() for copy in wanted_copies(manifest)}
        self.memory, is_repairing = with_exactness(self.memory, self.actors, wanted, self.now_s)
        roster = plan_roster(self.spec, shape, self.memory, self.status, self.actors, is_partial=is_partial, is_repairing=is_repairing)
        self._adopt_roster(roster)
        layout = lay_out(self.spec, manifests, shape, roster.node_of)
        layout = place_further(layout, self.told.hot, self.memory.further, self.actors, self.spec.replication.reserve_actors)
        if layout.further != self.memory.further:
            self.memory = replace(self.memory, further=layout.further)
        self._copies(layout, manifests, roster)
        table = draft_table(self.spec, layout, self.actors, self.memory)
        self.memory = note_unpublished(self.actors, table, self.memory, self.now_s)
        names = {model.name for model in unknown}
        self.actions += let_go(self.actors, table, self.memory, self.now_s, routers=running_routers(self.status), unknown=names)
        router_differences = self._routers(table, replace_differing=self.memory.replace and not different)
        stops = farewells(roster, self.status, table, self.now_s)
        self.actions += stops
        self.memory = replace(self.memory, issued=self.memory.issued - {stop.incarnation for stop in stops})
        is_replaced = not (is_partial or different or router_differences or self.memory.replacing)
        if self.memory.replace and is_replaced and self._is_settled(layout) and self._is_routed():
            self.memory = replace(self.memory, replace=False)
        return self._decision(table, layout, (*different.values(), *router_differences))

    def _must_wait(self, manifests: Mapping[str, Manifest], *, is_partial: bool) -> bool:
        """Whether to start, move, publish and let go of nothing yet: before all wanted models are known, and while what was taken over is not.

        What was taken over waits for every model, also one that cannot be read: without its manifest its copies would leave the routers' table.
        A first deployment does not wait for a model that can only be had after a new `apply`, if there are others.
        """
        if is_adopted(self.memory):
            in_doubt = any(view.life is Life.SUSPECT for view in self.actors.values())
            return len(manifests) < len(self.spec.models) or in_doubt
        return not self.memory.actors and (is_partial or not manifests)

    def _models(self) -> dict[str, Manifest]:
        """Manifests of the wanted models that are known; imports of the others, and of those whose source changed."""
        for model in self.spec.models:
            record = self.memory.models.get(model.name)
            if record is not None and (record.path, record.dtype, record.shadow) == (str(model.path), str(model.dtype), model.shadow):
                continue
            if self.head is None:
                self.notes.append("no head node is alive to read checkpoints on")
                continue
            reason = "not imported yet" if record is None else "its path, dtype or shadow section changed; it must hold what is being served"
            action = ImportModel(model.name, self.head.node_id, model.path, model.dtype, reason, model.shadow)
            if self.memory.may_try(action.key, self.now_s):
                self.actions.append(action)
            if record is None:
                self.notes.append(f"model {model.name} is being read from {model.path}")
        return {model.name: self.memory.models[model.name].manifest for model in self.spec.models if model.name in self.memory.models}

    def _import_failed(self, model: ModelSpec) -> bool:
        """Whether it can only be had after a new `apply`."""
        held = self.memory.backoff.get(ImportModel(model.name, "", model.path, model.dtype, shadow=model.shadow).key)
        return held is not None and held.final

    def _choose_replaced(self, shape: Shape, manifests: Mapping[str, Manifest], different: Mapping[str, str]) -> None:
        """The next actor to replace, when nothing else is amiss: one at a time, so that its copies find free slots."""
        if self.memory.replacing and self.memory.replacing not in self.memory.actors:
            self.memory = replace(self.memory, replacing="")
        if not self.memory.replace or self.memory.replacing or not different:
            return
        node_of = {name: view.record.node_id for name, view in self.actors.items()}
        if self._is_settled(lay_out(self.spec, manifests, shape, node_of)):
            self.memory = replace(self.memory, replacing=min(different))

    def _adopt_roster(self, roster: Roster) -> None:
        self.memory, self.actors = roster.memory, roster.actors
        self.actions += roster.actions
        self.notes += roster.notes

    def _copies(self, layout: Layout, manifests: Mapping[str, Manifest], roster: Roster) -> None:
        """Loads where the node's store has what is needed; imports where it has not, ahead of actors that are still starting."""
        self._note_failed_slots()
        plan = plan_copies(layout, self.actors, self.memory, sizes_of(manifests), self.told.load, self.now_s)
        self.notes += plan.troubles
        if layout.homeless:
            self.notes.append(f"{len(layout.homeless)} shadows fit on no actor beside their replicas; raise actors.slots_per_actor or actors.count")
        assumes, missing = assumptions(plan, self.actors, self.memory, layout, self.told.hot)
        self.actions += [action for action in assumes if self.memory.may_try(action.key, self.now_s)]
        for copy, homes in layout.wanted():
            for home in homes:
                node_id = roster.node_of.get(home, "")
                if node_id and not self.memory.has_stored(node_id, copy):
                    missing[node_id, copy.expert.model].add(copy)
        why = "its actors will serve them"
        if self.spec.repair.stock and self.spec.store.max_bytes is None and self.memory.inexact_since_s is None and not missing:
            stock = stock_missing(layout, roster.node_of, self.memory)
            why = "kept there so that free slots can take them without an import" if stock else why
            missing.update({place: stock[place] for place in sorted(stock)[: self.spec.actors.start_parallelism]})
        if self.head is not None:
            for name in manifests:
                if (self.head.node_id, name) not in self.memory.stored:
                    missing[self.head.node_id, name] |= set()
        self._imports(missing, why)

    def _note_failed_slots(self) -> None:
        published = set(self.memory.published.held()) if any(slot.state is SlotState.FAILED for view in self.actors.values() for slot in view.slots) else set()
        for view in self.actors.values():
            for slot in view.slots:
                key = load_key(view.incarnation, slot.copy)
                if slot.state is SlotState.FAILED and self.memory.may_try(key, self.now_s):
                    was_ready = Held(view.incarnation, slot.copy) in published
                    message = f"{slot.copy.expert} {'went bad in' if was_ready else 'could not be loaded by'} {view.incarnation}: {slot.reason}"
                    memory = with_failure(self.memory, key, message, self.now_s)
                    memory = with_strike_of(memory, view.incarnation, self.now_s) if was_ready else memory
                    self.memory = without_stored_copy(memory, view.record.node_id, slot.copy)

    def _imports(self, missing: Mapping[tuple[str, str], set[CopyId]], why: str) -> None:
        alive, doubtful = {node.node_id for node in self.status.nodes if node.alive}, frozenset(self.memory.distrusted)
        for (node_id, model), copies in sorted(missing.items()):
            experts = frozenset((copy.expert.layer, copy.expert.index) for copy in copies if copy.role is Role.REPLICA)
            shadows = frozenset(copy for copy in copies if copy.role is Role.SHADOW)
            distrusted = frozenset(copy.version for copy in copies if (node_id, copy.version) in doubtful)
            action = ImportExperts(node_id, model, experts, why, shadows, distrusted)
            if node_id in alive and self.memory.may_try(action.key, self.now_s):
                self.actions.append(action)

    def _routers(self, table: TableDraft, *, replace_differing: bool) -> tuple[str, ...]:
        """After the actors when they are to be replaced."""
        has_copies = bool(table.copies)
        plan = plan_routers(self.spec, self.launch, self.memory, self.status, self.head, has_copies=has_copies, replace_differing=replace_differing)
        self.memory = plan.memory
        self.actions += plan.actions
        self.notes += plan.notes
        return plan.differences

    def _decision(self, table: TableDraft, layout: Layout, differences: tuple[str, ...]) -> Decision:
        wanted = sum(len(homes) for homes in layout.homes.values())
        published = dict.fromkeys(layout.homes, 0)
        out = {view.incarnation for view in self.actors.values() if view.doubt}
        for held in table.held():
            if held.copy in published and held.incarnation not in out:
                published[held.copy] += 1
        ready = sum(min(published[copy], len(homes)) for copy, homes in layout.homes.items())
        routed = self._is_routed()
        complete = wanted > 0 and ready == wanted and routed and all(model.name in self.memory.models for model in self.spec.models)
        memory = self.memory
        if complete and self._is_settled(layout):
            memory = replace(memory, reached_revision=memory.spec_revision)
        state = self._state(memory, complete=complete)
        notes = [*self._failures(), *self.notes]
        if ready < wanted:
            notes.append(f"{ready} of {wanted} copies are ready")
        if num_shadowed := sum(1 for held in table.copies.values() if held[0].role is Role.SHADOW):
            notes.append(f"{num_shadowed} experts are answering from shadow")
        notes += unsettled(layout, self.actors)
        notes += standing(memory, self.told.hot, layout)
        notes += [f"{router.router_id} does not answer" for router in self.status.routers if router.state is ActorState.UNREACHABLE]
        if not routed and wanted:
            notes.append(routers_missing(self.spec, self.memory, self.status))
        if differences and memory.replace:
            notes.append(f"{len(differences)} still to be replaced: {differences[0]}")
        elif differences:
            more = f" and {len(differences) - 1} more differ" if len(differences) > 1 else ""
            notes.append(f"{differences[0]}{more}; `--replace` replaces them one at a time")
        settings = controller_differences(self.spec, self.launch)
        notes += [f"{text}; it changes when the controller is replaced" for text in settings[:1]]
        before, memory = memory, _published(memory, table, self.now_s)
        is_at_rest = complete and not self.actions and memory is before and self._is_at_rest(memory, table, layout)
        return Decision(memory, tuple(self.actions), table, state, joined(notes), (*differences, *settings), wanted, ready, self.actors, is_at_rest)

    def _is_at_rest(self, memory: Memory, table: TableDraft, layout: Layout) -> bool:
        """Whether nothing is in doubt, held back, on its way or left over."""
        waits = memory.replace or memory.backoff or memory.unreachable_since_s or memory.issued - memory.returned
        is_judging = memory.doubts or memory.accused or memory.condemned
        num_slots = sum(len(view.slots) for view in self.actors.values())
        return not waits and not is_judging and num_slots == sum(map(len, table.copies.values())) and self._is_settled(layout)

    def _is_routed(self) -> bool:
        return not routers_missing(self.spec, self.memory, self.status)

    def _state(self, memory: Memory, *, complete: bool) -> str:
        reached = memory.reached_revision == memory.spec_revision > 0
        if reached and memory.replace:
            return "DEPLOYING"  # `up --replace` waits for its end
        if reached:
            return "SERVING" if complete else "DEGRADED"
        return "FAILED" if any(self._import_failed(model) for model in self.spec.models) else "DEPLOYING"

    def _is_settled(self, layout: Layout) -> bool:
        """Whether every actor runs and every copy is ready at home."""
        if any(name not in self.actors or not self.actors[name].takes_copies for name in layout.shape.all_ids):
            return False
        return all(is_ready_at(self.actors[home], copy) for copy, homes in layout.homes.items() for home in homes)

    def _failures(self) -> list[str]:
        """What held an action back last; of an import also while it is tried again, which can take long."""
        importing = {action.key for action in self.actions if isinstance(action, ImportModel | ImportExperts)}
        return [entry.message for key, entry in self.memory.backoff.items() if entry.final or entry.until_s > self.now_s or key in importing]


def sizes_of(manifests: Mapping[str, Manifest]) -> dict[CopyId, int]:
    """Bytes of the weights of every wanted copy."""
    return {copy: size for manifest in manifests.values() for copy, size in copy_bytes(manifest).items()}


def _forget_models(spec: ClusterSpec, memory: Memory) -> Memory:
    """A model that is neither wanted nor published may come back as something else."""
    published = {expert.model for expert in memory.published.copies}
    kept = {name: record for name, record in memory.models.items() if spec.model(name) is not None or name in published}
    return memory if len(kept) == len(memory.models) else replace(memory, models=kept)


def _without_lost(table: TableDraft, actors: Mapping[str, ActorView]) -> TableDraft:
    alive = {view.incarnation for view in actors.values() if view.life is not Life.LOST}
    copies = {expert: tuple(copy for copy in held if copy.incarnation in alive) for expert, held in table.copies.items()}
    copies = {expert: held for expert, held in copies.items() if held}
    used = {copy.incarnation.actor_id for held in copies.values() for copy in held}
    models = {}
    for name, model in table.models.items():
        present = sum(1 for expert in copies if expert.model == name)
        models[name] = replace(model, num_missing=model.num_experts - present)
    return TableDraft({name: endpoint for name, endpoint in table.actors.items() if name in used}, copies, models)


def _published(memory: Memory, table: TableDraft, now_s: float) -> Memory:
    """Memory with this table as the published one: a new epoch when it differs, and the time at which copies left it."""
    if table == memory.published:
        return memory
    epoch = memory.epoch + 1
    before, after = set(memory.published.held()), set(table.held())
    living = {record.incarnation for record in memory.actors.values()}
    withdrawn = {held: entry for held, entry in memory.withdrawn.items() if held not in after and held.incarnation in living}
    withdrawn.update({held: Withdrawal(epoch, now_s) for held in before - after if held.incarnation in living})
    return replace(memory, epoch=epoch, published=table, withdrawn=withdrawn)
