"""Actors that routers send nothing: doubted at once, so that free slots assume their experts; ended only when it is clear that they are no use.

Ray tells of a dead process after 1.5 s and of a hung one never; routers know within a quarter of a second. So a router's word is enough to load
further copies, which costs little and is undone. To kill takes more: most routers, time, and no progress that the controller could see itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from cluster.core.health import Health, LinkReport
from cluster.core.ids import Incarnation
from cluster.core.memory import Doubt, Memory
from cluster.core.spec import RepairSpec
from cluster.core.status import ActorObservation, ActorState, FleetObservation

MINUTE_S = 60.0


def with_doubts(memory: Memory, health: Health, status: FleetObservation, repair: RepairSpec) -> Memory:
    """Fold in who is sent nothing, as of this look. A doubt that ended is remembered for `settle_s`, so that nothing flaps."""
    if not memory.doubts and health.is_calm(status.observed_s):
        return memory if not memory.condemned else replace(memory, condemned=_still_there(memory.condemned, status))
    now_s, doubts = status.observed_s, {}
    seen = {actor.incarnation: actor for actor in status.actors if actor.state is not ActorState.DEAD}
    for record in memory.actors.values():
        life = record.incarnation
        actor = seen.get(life)
        if actor is None:
            continue
        doubt = _doubt(memory.doubts.get(life), health.of(life, now_s), actor, now_s)
        if doubt is not None and (doubt.ended_s is None or now_s - doubt.ended_s < repair.settle_s):
            doubts[life] = doubt
    return replace(memory, doubts=doubts, condemned=_still_there(memory.condemned, status))


def recorded_links(memory: Memory, links: Iterable[LinkReport]) -> list[LinkReport]:
    """Those of lives that are recorded: what is said of others has passed."""
    lives = {record.incarnation for record in memory.actors.values()}
    return [link for link in links if link.incarnation in lives]


def _still_there(condemned: Mapping[Incarnation, str], status: FleetObservation) -> dict[Incarnation, str]:
    seen = {actor.incarnation for actor in status.actors}
    return {life: why for life, why in condemned.items() if life in seen}


def _doubt(known: Doubt | None, said: Sequence[LinkReport], actor: ActorObservation, now_s: float) -> Doubt | None:
    out = [link for link in said if link.is_out]
    if not out:
        return None if known is None else replace(known, ended_s=now_s if known.ended_s is None else known.ended_s)
    is_silent = actor.state is ActorState.UNREACHABLE or actor.silent_s > 0
    frames_done = actor.report.frames_done if actor.report is not None else 0
    if known is None or known.ended_s is not None:
        known = Doubt(now_s, "", frames_done=frames_done, stalled_since_s=now_s)
    silent_since_s = None
    if is_silent:
        silent_since_s = min(now_s - actor.silent_s, known.silent_since_s if known.silent_since_s is not None else now_s)
    has_moved = frames_done != known.frames_done
    return replace(
        known,
        why=out[0].why,
        is_majority=2 * len(out) > len(said),
        is_connected=any(link.is_connected for link in said),
        frames_done=frames_done,
        stalled_since_s=now_s if has_moved else known.stalled_since_s,
        silent_since_s=silent_since_s,
    )


def with_condemned(memory: Memory, status: FleetObservation, repair: RepairSpec) -> Memory:
    """Condemn actors that are no use any more: their lives count as lost, and they are killed. So many a minute; none for what may be a router's own fault."""
    if not memory.doubts:
        return memory
    now_s = status.observed_s
    killed_s = tuple(at_s for at_s in memory.killed_s if now_s - at_s < MINUTE_S)
    seen = {actor.incarnation: actor for actor in status.actors}
    answering = [life for life, doubt in memory.doubts.items() if doubt.ended_s is None and doubt.silent_since_s is None]
    may_be_the_router = 2 * len(answering) > max(2, len(memory.actors))
    condemned = dict(memory.condemned)
    for life, doubt in sorted(memory.doubts.items()):
        why = _no_use(doubt, seen.get(life), repair, now_s)
        if not why or life in condemned or (may_be_the_router and doubt.silent_since_s is None):
            continue
        if len(killed_s) >= repair.max_replacements_per_minute:
            break
        condemned[life] = why
        killed_s = (*killed_s, now_s)
    return replace(memory, condemned=condemned, killed_s=killed_s)


def _no_use(doubt: Doubt, actor: ActorObservation | None, repair: RepairSpec, now_s: float) -> str:
    """Why an actor that is sent nothing must be replaced; empty while it may come back."""
    if doubt.ended_s is not None or not doubt.is_majority or actor is None:
        return ""
    if doubt.silent_since_s is not None:
        silent_s = now_s - max(doubt.since_s, doubt.silent_since_s)
        return f"{doubt.why}; it does not answer the controller either" if silent_s >= repair.replace_after_s else ""
    out_s, stalled_s = now_s - doubt.since_s, now_s - doubt.stalled_since_s
    owes = actor.report is not None and actor.report.oldest_age_s > 0
    if (not doubt.is_connected and out_s >= repair.stuck_after_s) or (owes and min(out_s, stalled_s) >= repair.stuck_after_s):
        return f"{doubt.why}; it answers the controller and makes no progress"
    return f"{doubt.why}, for {out_s:.0f} s" if out_s >= repair.give_up_after_s else ""
