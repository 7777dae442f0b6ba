"""Where each recorded actor stands in its life, judged from one observation and the clock."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from cluster.core.devices import with_strike_of
from cluster.core.ids import CopyId, Incarnation
from cluster.core.memory import BACKOFF_MAX_S, ActorRecord, Memory, with_failure, with_success
from cluster.core.spec import ClusterSpec
from cluster.core.status import ActorObservation, ActorReport, ActorState, FleetObservation, RouterObservation, SlotReport

SUSPECT_LIMIT_S = 10.0


class Life(StrEnum):
    """Of a recorded incarnation: `decided` (its start is under way), `starting`, `ready`, `suspect` (may still answer), `lost` (never again)."""

    DECIDED = "decided"
    STARTING = "starting"
    READY = "ready"
    SUSPECT = "suspect"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class ActorView:
    """A recorded actor with what was seen of it. `leaving`: its copies must move elsewhere, then it stops.

    `doubt`: why routers send it nothing now; `is_settling`: they did so until a moment ago. `is_outdated`: it has not
    answered the last question yet, or its report is older than the last command: it is given nothing, and nothing new is published there.
    """

    record: ActorRecord
    life: Life
    reason: str = ""
    report: ActorReport | None = None
    leaving: bool = False
    by_copy: Mapping[CopyId, SlotReport] = field(default_factory=dict)
    doubt: str = ""
    is_settling: bool = False
    is_outdated: bool = False

    @property
    def actor_id(self) -> str:
        """The name that outlives its lives."""
        return self.record.incarnation.actor_id

    @property
    def incarnation(self) -> Incarnation:
        """The life this view is of."""
        return self.record.incarnation

    @property
    def takes_copies(self) -> bool:
        """Whether copies may be assumed here."""
        return self.stays and not self.is_outdated

    @property
    def stays(self) -> bool:
        """Whether what it holds counts: it answers, is trusted and is to be kept."""
        return self.life is Life.READY and not self.leaving and not self.doubt

    @property
    def slots(self) -> tuple[SlotReport, ...]:
        """Its slots in use, as far as it answered."""
        return self.report.slots if self.report is not None else ()

    def slot(self, copy: CopyId) -> SlotReport | None:
        """The slot that holds a copy, in any state."""
        return self.by_copy.get(copy)


def track(memory: Memory, status: FleetObservation) -> Memory:
    """Keep the times that judging needs: when an incarnation was first seen, and since when it does not answer as it should."""
    now_s = status.observed_s
    alive = {node.node_id for node in status.nodes if node.alive}
    seen = {actor.incarnation: actor for actor in status.actors if actor.state is not ActorState.DEAD}
    first = {incarnation: memory.first_seen_s.get(incarnation, now_s) for incarnation in seen}
    doubtful = {
        incarnation: memory.unreachable_since_s.get(incarnation, now_s)
        for incarnation, actor in seen.items()
        if actor.state in (ActorState.UNREACHABLE, ActorState.DRAINING) or (actor.node_id and actor.node_id not in alive)
    }
    for router in status.routers:
        life = router_life(router.router_id)
        if router.state is ActorState.UNREACHABLE:
            doubtful[life] = memory.unreachable_since_s.get(life, now_s)
        elif router.state is ActorState.STARTING:
            first[life] = memory.first_seen_s.get(life, now_s)
    running = running_routers(status)
    heard = {router_id: epoch for router_id, epoch in memory.router_epochs.items() if router_id in running}
    return replace(memory, first_seen_s=first, unreachable_since_s=doubtful, router_epochs=heard)


def router_life(router_id: str) -> Incarnation:
    """The name under which a router's times and starts are remembered: its lives are Ray's, so all of them are one here."""
    return Incarnation(router_id, 0)


def running_routers(status: FleetObservation) -> set[str]:
    """Routers that may still route, also those that do not answer."""
    return {router.router_id for router in status.routers if router.state is not ActorState.DEAD}


def hung_router(router: RouterObservation, spec: ClusterSpec, memory: Memory, now_s: float) -> str:
    """Why a router that is there must be replaced: silent for too long, or never ready. Empty while it may still come to itself."""
    life = router_life(router.router_id)
    if router.state is ActorState.UNREACHABLE and now_s - memory.unreachable_since_s.get(life, now_s) > SUSPECT_LIMIT_S:
        return f"does not answer: {router.reason or 'no report in time'}"
    if router.state is ActorState.STARTING and now_s - memory.first_seen_s.get(life, now_s) > spec.actors.start_timeout_s:
        return f"did not become ready within actors.start_timeout_s = {spec.actors.start_timeout_s:g} s"
    return ""


def above_seen(memory: Memory, status: FleetObservation) -> Memory:
    """Numbers above everything seen: an actor that has heard a higher epoch than ours would refuse our commands, so ours goes above it."""
    reports = [actor.report for actor in status.actors if actor.report is not None]
    highest = max((report.max_epoch for report in reports), default=0)
    generation = max((actor.incarnation.generation for actor in status.actors), default=0)
    epoch = highest + 1 if highest > memory.epoch else memory.epoch
    return replace(memory, epoch=epoch, generation=max(memory.generation, generation))


def views(spec: ClusterSpec, memory: Memory, status: FleetObservation) -> dict[str, ActorView]:
    """Every recorded actor as it stands, by actor id."""
    seen = {actor.incarnation: actor for actor in status.actors}
    alive = {node.node_id for node in status.nodes if node.alive}
    result = {}
    for actor_id, record in memory.actors.items():
        actor = seen.get(record.incarnation)
        life, reason = _life(record, actor, alive, spec, memory, status.observed_s)
        report = actor.report if actor is not None and life is not Life.LOST else None
        by_copy = {slot.copy: slot for slot in report.slots} if report is not None else {}
        doubt = memory.doubts.get(record.incarnation)
        result[actor_id] = ActorView(
            record,
            life,
            reason,
            report,
            by_copy=by_copy,
            doubt=doubt.why if doubt is not None and doubt.ended_s is None else "",
            is_settling=doubt is not None and doubt.ended_s is not None,
            is_outdated=actor is not None and (actor.is_outdated or actor.silent_s > 0),
        )
    return result


def _life(record: ActorRecord, actor: ActorObservation | None, alive: set[str], spec: ClusterSpec, memory: Memory, now_s: float) -> tuple[Life, str]:
    incarnation = record.incarnation
    if actor is None or actor.state is ActorState.DEAD:
        if actor is None and incarnation in memory.issued and incarnation not in memory.returned and record.node_id in alive:
            return Life.DECIDED, "being started"
        return Life.LOST, (actor.reason if actor is not None else "") or "its process is gone"
    if incarnation in memory.condemned:
        return Life.LOST, memory.condemned[incarnation]
    since_s = memory.unreachable_since_s.get(incarnation)
    if since_s is not None:
        return _doubtful(actor, alive, now_s - since_s)
    if actor.state is ActorState.STARTING:
        age_s = now_s - memory.first_seen_s.get(incarnation, now_s)
        if age_s > spec.actors.start_timeout_s:
            return Life.LOST, f"did not become ready within actors.start_timeout_s = {spec.actors.start_timeout_s:g} s"
    return (Life.STARTING, actor.reason or "starting") if actor.state is ActorState.STARTING else (Life.READY, "")


def _doubtful(actor: ActorObservation, alive: set[str], age_s: float) -> tuple[Life, str]:
    """An actor that does not answer, is stopping by itself, or answers from a node that Ray has given up."""
    node_is_dead = bool(actor.node_id) and actor.node_id not in alive
    why = "its node is dead" if node_is_dead else actor.reason or f"is {actor.state}"
    if (node_is_dead and actor.report is None) or age_s > SUSPECT_LIMIT_S:
        return Life.LOST, why
    return Life.SUSPECT, why


def settle(memory: Memory, actors: Mapping[str, ActorView], alive: Collection[str], now_s: float) -> Memory:
    """Note what the views prove: who has served, whose life ended (its next start waits a little longer each time), whose troubles are over."""
    records = dict(memory.actors)
    for actor_id, view in actors.items():
        key = f"start {actor_id}"
        if view.life is Life.READY and not view.record.was_ready:
            records[actor_id] = replace(view.record, was_ready=True)
        if view.life is Life.READY and now_s - memory.first_seen_s.get(view.incarnation, now_s) > BACKOFF_MAX_S:
            memory = with_success(memory, key)
        if view.life is Life.LOST and view.incarnation in memory.issued:
            memory = replace(memory, issued=memory.issued - {view.incarnation})
            if view.record.node_id in alive:
                memory = with_strike_of(memory, view.incarnation, now_s)
            if key not in memory.backoff or memory.backoff[key].until_s <= now_s:
                memory = with_failure(memory, key, f"{view.incarnation} was lost: {view.reason}", now_s)
    return replace(memory, actors=records)


def needs_repair(view: ActorView | None, memory: Memory, actor_id: str) -> bool:
    """Whether copies that belong here should be held elsewhere meanwhile: not while an actor merely waits for its first start."""
    if view is None:
        return f"start {actor_id}" in memory.backoff
    if view.stays:
        return False
    return view.leaving or bool(view.doubt) or view.record.was_ready or f"start {actor_id}" in memory.backoff
