"""Which copies to load where, which to publish, and which to let go: from the layout and what actors hold, one step at a time.

A copy moves by being loaded at its new place, published there, withdrawn from the old place, drained and released, in that order and never in
one step, so that an expert with a ready copy always keeps one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.core.actions import Assume, CopyAction, Drain, Release
from cluster.core.descriptors import Manifest
from cluster.core.ids import CopyId, ExpertId, Role
from cluster.core.lifecycle import ActorView, Life, needs_repair
from cluster.core.load import Load
from cluster.core.memory import Memory, Withdrawal, load_key
from cluster.core.placement import Layout
from cluster.core.replication import Warmth
from cluster.core.routing_table import ActorEndpoint, TableCopy, TableModel
from cluster.core.spec import ClusterSpec
from cluster.core.status import SlotState
from cluster.core.table_draft import Held, TableDraft

WITHDRAWAL_GRACE_S = 5.0  # above the time in which a router finds a restarted controller again
_HELD = (SlotState.LOADING, SlotState.READY)


@dataclass(slots=True)
class Room:
    """Slots and bytes left in one actor while copies are placed."""

    slots: int
    num_bytes: int | None

    def takes(self, size_bytes: int) -> bool:
        """Whether one more copy of this size fits."""
        return self.slots > 0 and (self.num_bytes is None or size_bytes <= self.num_bytes)

    def take(self, size_bytes: int) -> None:
        """Use the room of one copy."""
        self.slots -= 1
        if self.num_bytes is not None:
            self.num_bytes -= size_bytes


@dataclass(slots=True)
class CopyPlan:
    """What to load (by actor), with a reason for each, and what does not fit, for people."""

    assume: dict[str, list[CopyId]] = field(default_factory=lambda: defaultdict(list))
    repairs: set[tuple[str, CopyId]] = field(default_factory=set)
    troubles: list[str] = field(default_factory=list)


def plan_copies(layout: Layout, actors: Mapping[str, ActorView], memory: Memory, sizes: Mapping[CopyId, int], load: Load, now_s: float) -> CopyPlan:
    """Loads that bring every wanted copy home, and loads into free slots for copies whose home cannot hold them now.

    Lost replicas come before lost shadows, experts that have no copy before those that have one, and busy experts before others.
    """
    plan = CopyPlan()
    room = {actor_id: _room(view) for actor_id, view in actors.items() if view.takes_copies}
    holders = _holders(actors, memory)
    # What an actor which should hold a copy cannot: what it has is broken or accused, or loading it failed a moment ago.
    blocked = {held.copy for held in memory.accused} | {slot.copy for view in actors.values() for slot in view.slots if slot.state is SlotState.FAILED}
    reserved: Counter[str] = Counter()  # home copies that an actor does not hold yet: repair leaves room for them
    for copy, homes in layout.wanted():
        for home in homes:
            view = actors.get(home)
            if view is None or not view.takes_copies or copy in view.by_copy:
                continue
            reserved[home] += 1
            if not memory.may_try(load_key(view.incarnation, copy), now_s):
                blocked.add(copy)
                continue
            if room[home].takes(sizes[copy]):
                room[home].take(sizes[copy])
                plan.assume[home].append(copy)
                holders[copy].append(home)
            else:
                plan.troubles.append(_no_room(view, copy, sizes[copy]))
    unable = {actor_id for actor_id in {*actors, *layout.shape.all_ids} if needs_repair(actors.get(actor_id), memory, actor_id)}
    lacking = {
        copy: num_lacking
        for copy, homes in layout.homes.items()
        if (not unable.isdisjoint(homes) or copy in blocked) and (num_lacking := len(homes) - _num_staying(copy, holders, actors)) > 0
    }
    kin = _by_expert({*layout.homes, *holders}) if lacking else {}
    for copy in sorted(lacking, key=lambda copy: (copy.role, lacking[copy] < len(layout.homes[copy]), -load.of(copy.expert))):
        for _ in range(lacking[copy]):
            _repair(copy, sizes[copy], kin[copy.expert], plan, room, reserved, holders, actors, memory, now_s)
    return plan


def _room(view: ActorView) -> Room:
    report = view.report
    if report is None:
        return Room(0, 0)
    return Room(report.num_free_slots, report.capacity_bytes - report.used_bytes if report.capacity_bytes > 0 else None)


def _holders(actors: Mapping[str, ActorView], memory: Memory) -> dict[CopyId, list[str]]:
    """Who holds or is loading each copy, among actors that answer; what is accused of wrong numbers does not count."""
    holders: dict[CopyId, list[str]] = defaultdict(list)
    for actor_id, view in actors.items():
        if view.life is Life.READY:
            for slot in view.slots:
                if slot.state in _HELD:
                    holders[slot.copy].append(actor_id)
    for held in memory.accused:
        if held.incarnation.actor_id in holders.get(held.copy, ()):
            holders[held.copy].remove(held.incarnation.actor_id)
    return holders


def _num_staying(copy: CopyId, holders: Mapping[CopyId, Sequence[str]], actors: Mapping[str, ActorView]) -> int:
    return sum(1 for holder in holders.get(copy, ()) if actors[holder].stays)


def _repair(
    copy: CopyId,
    size_bytes: int,
    kin: Collection[CopyId],
    plan: CopyPlan,
    room: Mapping[str, Room],
    reserved: Mapping[str, int],
    holders: dict[CopyId, list[str]],
    actors: Mapping[str, ActorView],
    memory: Memory,
    now_s: float,
) -> None:
    """Put one copy into a free slot: away from the nodes of its other copies, then from its shadow, then where its blob lies, then where most is free.

    A replica beside its shadow would be lost together with it; better there than nowhere. A shadow keeps away from its expert's replicas likewise, and
    never goes where one is. `kin` are all copies of the expert that are wanted or held.
    """
    family = [holder for other in kin for holder in holders[other]]
    others = holders[copy] if copy.role is Role.REPLICA else family
    nodes = {actors[holder].record.node_id for holder in others}
    family_nodes = {actors[holder].record.node_id for holder in family}

    def spare(actor_id: str) -> int:
        pending = reserved.get(actor_id, 0) - len([c for c in plan.assume.get(actor_id, ()) if (actor_id, c) not in plan.repairs])
        return room[actor_id].slots - max(0, pending)

    fitting = [
        actor_id
        for actor_id in room
        if actors[actor_id].slot(copy) is None and actor_id not in others and room[actor_id].takes(size_bytes) and spare(actor_id) > 0
    ]
    fitting = [actor_id for actor_id in fitting if memory.may_try(load_key(actors[actor_id].incarnation, copy), now_s)]
    if not fitting:
        plan.troubles.append(f"no free slot in any running actor for {copy.expert}; raise actors.free_slots or actors.standby")
        return

    def cost(actor_id: str) -> tuple[bool, bool, bool, bool, int]:
        node_id = actors[actor_id].record.node_id
        return (node_id in nodes, node_id in family_nodes, actor_id in family, not memory.has_stored(node_id, copy), -spare(actor_id))

    best = min(fitting, key=cost)
    room[best].take(size_bytes)
    plan.assume[best].append(copy)
    plan.repairs.add((best, copy))
    holders[copy].append(best)


def _by_expert(copies: Collection[CopyId]) -> dict[ExpertId, set[CopyId]]:
    kin: dict[ExpertId, set[CopyId]] = defaultdict(set)
    for copy in copies:
        kin[copy.expert].add(copy)
    return kin


def _no_room(view: ActorView, copy: CopyId, size_bytes: int) -> str:
    report = view.report
    if report is None:
        return f"{view.incarnation} does not answer"
    return (
        f"{copy.expert} needs a slot of {size_bytes} bytes in {view.incarnation}, which has {report.num_free_slots} of {report.num_slots} slots and"
        f" {report.capacity_bytes - report.used_bytes} of {report.capacity_bytes} bytes free; raise actors.slots_per_actor or actors.memory_bytes"
        " (with --replace)"
    )


def draft_table(spec: ClusterSpec, layout: Layout, actors: Mapping[str, ActorView], memory: Memory) -> TableDraft:
    """What should be published: for each copy as many ready holders as wanted, at home first, never fewer than before while any is ready.

    An actor that routers send nothing stays published beside its replacements: they may yet find that it is back. A copy with wrong numbers leaves
    as soon as anything else answers for its expert.
    """
    published = set(memory.published.held())
    manifests = {name: record.manifest for name, record in memory.models.items()}
    copies: dict[CopyId, list[ActorView]] = {}
    last_resort: list[tuple[CopyId, ActorView]] = []
    ready = _ready_holders(actors, published)
    suspects = [view for view in actors.values() if view.life is Life.SUSPECT]
    for copy, homes in layout.wanted():
        holders = ready.get(copy, ())
        if memory.accused:
            last_resort += [(copy, view) for view in holders if Held(view.incarnation, copy) in memory.accused]
            holders = [view for view in holders if Held(view.incarnation, copy) not in memory.accused]
        chosen = _choose(copy, homes, holders, published)
        if not chosen:
            chosen = [view for view in suspects if Held(view.incarnation, copy) in published]
        if chosen:
            copies[copy] = chosen
    answered = {copy.expert for copy in copies}
    for copy, view in last_resort:
        if copy.expert not in answered and Held(view.incarnation, copy) in published:
            copies.setdefault(copy, []).append(view)
    return _draft(spec, manifests, copies, memory.published)


def _ready_holders(actors: Mapping[str, ActorView], published: set[Held]) -> dict[CopyId, list[ActorView]]:
    """Who is known to be ready with a copy; of an actor whose report is older than the last command only what is published anyway."""
    ready: dict[CopyId, list[ActorView]] = defaultdict(list)
    for view in actors.values():
        if view.life is Life.READY:
            for slot in view.slots:
                if slot.state is SlotState.READY and (not view.is_outdated or Held(view.incarnation, slot.copy) in published):
                    ready[slot.copy].append(view)
    return ready


def _choose(copy: CopyId, homes: Sequence[str], ready: Sequence[ActorView], published: set[Held]) -> list[ActorView]:
    """Ready holders in order of preference: home and staying, staying, leaving; already published ones first. Those that routers send nothing come last.

    These, and what stands in for one that was trusted again a moment ago, stay as long as they are published.
    """
    if len(ready) <= 1:
        return list(ready)

    def rank(view: ActorView) -> tuple[bool, bool, bool, bool, str]:
        is_new = Held(view.incarnation, copy) not in published
        return (bool(view.doubt), view.leaving, view.actor_id not in homes, is_new, view.actor_id)

    ranked = sorted(ready, key=rank)
    chosen, others = ranked[: len(homes)], ranked[len(homes) :]
    is_settling = any(view.is_settling or view.is_outdated for view in chosen)
    return [*chosen, *(view for view in others if (view.doubt or is_settling) and Held(view.incarnation, copy) in published)]


def _draft(spec: ClusterSpec, manifests: Mapping[str, Manifest], chosen: Mapping[CopyId, Sequence[ActorView]], before: TableDraft) -> TableDraft:
    endpoints: dict[str, ActorEndpoint] = {}
    copies: dict[ExpertId, tuple[TableCopy, ...]] = {}
    for copy, holders in sorted(chosen.items()):
        entries = [*copies.get(copy.expert, ()), *(TableCopy(view.incarnation, copy.version, copy.role) for view in holders)]
        copies[copy.expert] = tuple(sorted(entries, key=lambda entry: (entry.role, entry.incarnation)))
        for view in holders:
            endpoints.setdefault(view.actor_id, _endpoint(view, before))
    models = {}
    for model in spec.models:
        manifest = manifests.get(model.name)
        if manifest is not None:
            present = sum(1 for expert in copies if expert.model == model.name)
            models[model.name] = TableModel(model.name, manifest.digest, len(manifest.experts), len(manifest.experts) - present, model.ladder)
    return TableDraft(dict(sorted(endpoints.items())), copies, models)


def _endpoint(view: ActorView, before: TableDraft) -> ActorEndpoint:
    """Where the actor listens: as it says now, or as it was published while it does not answer."""
    report = view.report
    if report is None:
        return before.actors[view.actor_id]
    return ActorEndpoint(view.incarnation, report.host, report.port, report.node_id, report.device)


def note_unpublished(actors: Mapping[str, ActorView], draft: TableDraft, memory: Memory, now_s: float) -> Memory:
    """Ready copies that no table has and that nobody remembers withdrawing, as after a controller's end: routers may have them in a table until told."""
    kept = set(draft.held()) | set(memory.published.held())
    ready = (Held(view.incarnation, slot.copy) for view in actors.values() for slot in view.slots if slot.state is SlotState.READY)
    found = [held for held in ready if held not in kept and held not in memory.withdrawn]
    if not found:
        return memory
    since = Withdrawal(memory.epoch + (1 if draft != memory.published else 0), now_s)
    return replace(memory, withdrawn={**memory.withdrawn, **dict.fromkeys(found, since)})


def let_go(
    actors: Mapping[str, ActorView], draft: TableDraft, memory: Memory, now_s: float, *, routers: Collection[str], unknown: Collection[str]
) -> list[CopyAction]:
    """Drain what was unpublished and is known to be, release what is drained or failed.

    Args:
        actors: every recorded actor.
        draft: the table that is about to be published.
        memory: what is remembered; `note_unpublished` has been applied.
        now_s: the time of the look.
        routers: those that run; each must know a table without a copy before it is drained.
        unknown: wanted models whose manifest is not known yet; nothing of theirs is let go of.
    """
    published = set(draft.held())
    kept = published | set(memory.published.held())
    silent = {view.incarnation for view in actors.values() if view.is_outdated or view.doubt or view.life is not Life.READY}
    doubtful = {held.copy for held in published if held.incarnation in silent} - {held.copy for held in published if held.incarnation not in silent}
    actions: list[CopyAction] = []
    for view in actors.values():
        if view.life is not Life.READY or view.is_outdated:
            continue
        slots = [slot for slot in view.slots if slot.copy.expert.model not in unknown]
        drain = tuple(
            slot.copy
            for slot in slots
            if slot.state is SlotState.READY
            and slot.copy not in doubtful  # those that are published may be gone: this one may be the last
            and Held(view.incarnation, slot.copy) not in kept
            and _is_known(view, slot.copy, memory, now_s, routers)
        )
        release = tuple(slot.copy for slot in slots if slot.state in (SlotState.DRAINING, SlotState.FAILED))
        if drain:
            actions.append(Drain(view.incarnation, drain, "no longer published"))
        if release:
            actions.append(Release(view.incarnation, release, "drained or failed"))
    return actions


def _is_known(view: ActorView, copy: CopyId, memory: Memory, now_s: float, routers: Collection[str]) -> bool:
    """Whether every router that runs has a table without this copy, or has had the time to get one."""
    withdrawal = memory.withdrawn.get(Held(view.incarnation, copy))
    if withdrawal is None:
        return False
    acknowledged = bool(routers) and all(memory.router_epochs.get(router, -1) >= withdrawal.epoch for router in routers)
    return acknowledged or now_s - withdrawal.since_s >= WITHDRAWAL_GRACE_S


def assumptions(
    plan: CopyPlan, actors: Mapping[str, ActorView], memory: Memory, layout: Layout, hot: Mapping[ExpertId, Warmth]
) -> tuple[list[Assume], dict[tuple[str, str], set[CopyId]]]:
    """Assumes of what the actor's node has in its store, and by (node, model) the copies it still needs."""
    ready: list[Assume] = []
    missing: dict[tuple[str, str], set[CopyId]] = defaultdict(set)
    for actor_id, copies in plan.assume.items():
        view = actors[actor_id]
        here = []
        for copy in copies:
            if memory.has_stored(view.record.node_id, copy):
                here.append(copy)
            else:
                missing[view.record.node_id, copy.expert.model].add(copy)
        if here:
            ready.append(Assume(view.incarnation, tuple(here), _why(actor_id, here, plan, layout, hot)))
    return ready, missing


def _why(actor_id: str, copies: Sequence[CopyId], plan: CopyPlan, layout: Layout, hot: Mapping[ExpertId, Warmth]) -> str:
    """One reason for all of them, for people: a repair before heat, heat before the plain goal."""
    if any((actor_id, copy) in plan.repairs for copy in copies):
        return "its home cannot hold it now"
    further = (copy.expert for copy in copies if actor_id in layout.further.get(copy, ()))
    return next((hot[expert].why for expert in further if expert in hot), "belongs here")
