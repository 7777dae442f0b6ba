"""Why things stand as they do, in words, for the status: who is missing, what is held back, what was decided for a reason that a person may undo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.core.ids import CopyId, ExpertId
from cluster.core.lifecycle import ActorView, Life
from cluster.core.memory import Memory
from cluster.core.placement import Layout
from cluster.core.replication import Warmth
from cluster.core.status import SlotState

MAX_NOTES = 6


def is_ready_at(view: ActorView, copy: CopyId) -> bool:
    """Whether an actor is ready with a copy."""
    slot = view.slot(copy)
    return slot is not None and slot.state is SlotState.READY


def unsettled(layout: Layout, actors: Mapping[str, ActorView]) -> list[str]:
    """Who is missing or in doubt, and how many copies are not where they belong."""
    notes = []
    for name in layout.shape.all_ids:
        view = actors.get(name)
        if view is None:
            continue
        if view.life is not Life.READY:
            notes.append(f"{view.incarnation} is {view.life}" + (f": {view.reason}" if view.reason not in ("", view.life) else ""))
        elif view.doubt:
            notes.append(f"routers send nothing to {view.incarnation} ({view.doubt})")
    homes = [(home, copy) for copy, homes in layout.homes.items() for home in homes]
    away = sum(1 for home, copy in homes if home not in actors or not is_ready_at(actors[home], copy))
    return [*notes, f"{away} of {len(homes)} copies are not at home yet"] if away else notes


def standing(memory: Memory, hot: Mapping[ExpertId, Warmth], layout: Layout) -> list[str]:
    """What was decided and stays so: accused copies and quarantined devices; and hot experts that get no further replica."""
    notes = [f"{held.copy.expert} on {held.incarnation} gave wrong numbers ({entry.kind}) and is being replaced" for held, entry in memory.accused.items()]
    notes += [f"{device} is quarantined: {why}; `moelastic gpu release {device}` ends that" for device, why in memory.quarantined.items()]
    placed = {copy.expert: len(names) for copy, names in layout.further.items()}
    lacking = [expert for expert, warmth in hot.items() if placed.get(expert, 0) < warmth.num_further]
    if lacking:
        notes.append(f"{lacking[0]} is {hot[lacking[0]].why}, and no slot is free beside what repair may need; raise actors.free_slots or actors.standby")
    return notes


def joined(notes: Sequence[str]) -> str:
    """One line, each note once, not too many."""
    unique = list(dict.fromkeys(notes))
    more = f"; and {len(unique) - MAX_NOTES} more" if len(unique) > MAX_NOTES else ""
    return "; ".join(unique[:MAX_NOTES]) + more
