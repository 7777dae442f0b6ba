"""Which lives of actors to start and to end: one recorded life for each actor of the shape, on a node with room, a few starts at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cluster.core.actions import Action, StartActor, StopActor
from cluster.core.devices import closed_nodes
from cluster.core.ids import Incarnation
from cluster.core.launch import Launch, actor_config
from cluster.core.lifecycle import ActorView, Life
from cluster.core.memory import ActorRecord, Memory
from cluster.core.placement import NodeRoom, Shape, lack_of_room, pick_node, rooms
from cluster.core.spec import ClusterSpec
from cluster.core.status import ActorState, FleetObservation
from cluster.core.table_draft import TableDraft


@dataclass(slots=True)
class Roster:
    """The actors after this step: `node_of` has the planned node of actors that are not started yet, too."""

    memory: Memory
    actors: dict[str, ActorView]
    node_of: dict[str, str] = field(default_factory=dict)
    actions: list[Action] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def plan_roster(
    spec: ClusterSpec,
    shape: Shape,
    memory: Memory,
    status: FleetObservation,
    actors: Mapping[str, ActorView],
    *,
    is_partial: bool = False,
    is_repairing: bool = False,
) -> Roster:
    """Mark who leaves, forget who left, start who is missing.

    Args:
        spec: the goal.
        shape: the actors that the goal needs.
        memory: what is remembered.
        status: what was seen.
        actors: every recorded actor.
        is_partial: a wanted model is still being read, so the shape may yet grow: nobody leaves and nobody new comes, only who was lost.
        is_repairing: free slots are taking over lost experts; starting a process would slow them down, so those who have served wait.
    """
    roster = Roster(memory, {name: replace(view, leaving=_leaves(view, shape, memory, is_partial=is_partial)) for name, view in actors.items()})
    for name, view in actors.items():
        if name not in shape.all_ids and view.life is Life.LOST and not is_partial:
            del roster.actors[name]
    kept = {name: record for name, record in memory.actors.items() if name in roster.actors}
    roster.memory = replace(memory, actors=kept)
    room = _room_left(spec, status, roster)
    under_way = [view for view in roster.actors.values() if view.life in (Life.DECIDED, Life.STARTING)]
    num_starting, is_replacing = len(under_way), any(view.record.was_ready for view in under_way)
    for name in shape.all_ids:
        current = roster.actors.get(name)
        if current is not None and current.life is not Life.LOST:
            roster.node_of[name] = current.record.node_id
            _resume(current, roster)
        elif is_partial and current is None:
            continue
        else:
            has_served = current is not None and current.record.was_ready
            may_start = num_starting < spec.actors.start_parallelism and not (has_served and (is_repairing or is_replacing))
            if _start(name, spec, shape, room, roster, status.observed_s, may_start=may_start):
                num_starting, is_replacing = num_starting + 1, is_replacing or has_served
    return roster


def _leaves(view: ActorView, shape: Shape, memory: Memory, *, is_partial: bool) -> bool:
    is_unwanted = view.actor_id not in shape.all_ids and not is_partial
    return is_unwanted or view.actor_id == memory.replacing or memory.devices.get(view.incarnation) in memory.quarantined


def _room_left(spec: ClusterSpec, status: FleetObservation, roster: Roster) -> dict[str, NodeRoom]:
    """GPUs left on each node, counting our actors by what was recorded, so that one decided but not yet seen is counted once."""
    placed: dict[str, list[float]] = defaultdict(list)
    running: dict[str, float] = defaultdict(float)
    recorded = {view.incarnation: view.record for view in roster.actors.values() if view.life is not Life.LOST}
    for record in recorded.values():
        placed[record.node_id].append(record.num_gpus)
    for actor in status.actors:
        if actor.state is ActorState.DEAD:
            continue
        known = recorded.get(actor.incarnation)
        num_gpus = known.num_gpus if known is not None else spec.actors.num_gpus
        running[actor.node_id] += num_gpus
        if known is None:
            placed[actor.node_id].append(num_gpus)
    room = rooms(status.nodes, placed, running)
    return {node_id: entry for node_id, entry in room.items() if node_id not in closed_nodes(roster.memory)}


def _resume(view: ActorView, roster: Roster) -> None:
    """A life recorded by an earlier controller may have been created but never told to start: tell it again."""
    if view.life is Life.STARTING and not view.leaving and view.incarnation not in roster.memory.issued:
        roster.memory = replace(roster.memory, issued=roster.memory.issued | {view.incarnation})
        record = view.record
        roster.actions.append(StartActor(record.incarnation, record.node_id, record.num_slots, "found half started"))


def _start(name: str, spec: ClusterSpec, shape: Shape, room: Mapping[str, NodeRoom], roster: Roster, now_s: float, *, may_start: bool) -> bool:
    """Decide the next life of an actor where there is room and nothing holds it back. Room is kept for it even when it must wait."""
    node_id = pick_node(room, spec.actors.num_gpus)
    if node_id is None:
        roster.notes.append(f"{name} waits: {lack_of_room(room, spec.actors.num_gpus)}")
        return False
    roster.node_of[name] = node_id
    memory = roster.memory
    if not may_start or not memory.may_try(f"start {name}", now_s):
        return False
    before = memory.actors.get(name)
    incarnation = Incarnation(name, memory.generation + 1)
    record = ActorRecord(incarnation, node_id, spec.actors.num_gpus, shape.num_slots, was_ready=before is not None and before.was_ready)
    roster.memory = replace(
        memory,
        generation=incarnation.generation,
        actors={**memory.actors, name: record},
        issued=memory.issued | {incarnation},
        replacing="" if memory.replacing == name else memory.replacing,
    )
    if before is None:
        reason = "wanted"
    elif memory.replacing == name:
        reason = f"{before.incarnation} was stopped to be replaced"
    else:
        held = memory.backoff.get(f"start {name}")  # says what was first seen of the loss
        lost = f"{before.incarnation} was lost: "
        reason = held.message if held is not None and held.message.startswith(lost) else lost + roster.actors[name].reason
    roster.actors[name] = ActorView(record, Life.DECIDED, "being started")
    roster.actions.append(StartActor(incarnation, node_id, shape.num_slots, reason))
    return True


def farewells(roster: Roster, status: FleetObservation, draft: TableDraft, now_s: float) -> list[StopActor]:
    """Stop lives that are not recorded, and leaving ones once they hold nothing; never one that is, or was until now, in the table."""
    published = {held.incarnation for held in draft.held()} | {held.incarnation for held in roster.memory.published.held()}
    alive = {node.node_id for node in status.nodes if node.alive}
    memory = roster.memory
    kept = {view.incarnation for view in roster.actors.values() if view.life is not Life.LOST}
    stops = [
        StopActor(view.incarnation, _why_leaving(view, memory))
        for view in roster.actors.values()
        if view.leaving and view.incarnation not in published and view.life is not Life.LOST and not view.slots
    ]
    for actor in status.actors:
        reachable = actor.state is not ActorState.DEAD and (not actor.node_id or actor.node_id in alive)
        if reachable and actor.incarnation not in kept and actor.incarnation not in published:
            why = memory.condemned.get(actor.incarnation)
            stops.append(StopActor(actor.incarnation, why or "not recorded, or its life was declared lost", at_once=why is not None))
    return [stop for stop in stops if memory.may_try(stop.key, now_s)]


def _why_leaving(view: ActorView, memory: Memory) -> str:
    if view.actor_id == memory.replacing:
        return "to be replaced"
    device = memory.devices.get(view.incarnation, "")
    return f"{device} is quarantined: {memory.quarantined[device]}" if device in memory.quarantined else "no longer wanted"


def differing(spec: ClusterSpec, launch: Launch, shape: Shape, actors: Mapping[str, ActorView]) -> dict[str, str]:
    """Running actors of the shape that would start otherwise today, with what differs."""
    result = {}
    for name, view in actors.items():
        report = view.report
        if report is None or name not in shape.all_ids or view.life is not Life.READY:
            continue
        config = actor_config(spec, launch, view.incarnation, report.num_slots)
        if report.code_digest != config.code_digest:
            result[name] = f"{view.incarnation} runs other code ({report.code_digest[:12] or 'unknown'}, now {config.code_digest[:12] or 'unknown'})"
        elif report.config_digest != config.config_digest:
            result[name] = f"{view.incarnation} runs with another config ({report.config_digest[:12]}, now {config.config_digest[:12]})"
        elif report.num_slots < shape.num_slots:
            result[name] = f"{view.incarnation} has {report.num_slots} slots, the goal wants {shape.num_slots}"
    return result
