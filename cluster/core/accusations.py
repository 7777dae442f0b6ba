"""Copies with wrong numbers: withdrawn where another copy may answer, drained, released and loaded again from a blob that was verified anew.

Routers blame a copy only after another one has computed the same rows rightly (or a golden row went wrong), so an accusation is believed, but not
without end: so many a minute, and a device that is accused again and again is quarantined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cluster.core.devices import with_strike_of
from cluster.core.health import Health
from cluster.core.lifecycle import ActorView, Life
from cluster.core.memory import Accusal, Memory, load_key, with_failure, without_stored_copy
from cluster.core.status import SlotState
from cluster.core.table_draft import Held

MAX_PER_MINUTE = 16
MINUTE_S = 60.0


def with_accusations(memory: Memory, health: Health, actors: Mapping[str, ActorView], now_s: float) -> tuple[Memory, list[str]]:
    """Take up what routers accuse; forget what has left its slot. With notes on what is ignored."""
    if not health.wrong and not memory.accused:
        return memory, []
    views = {view.incarnation: view for view in actors.values() if view.life is not Life.LOST}
    accused = {held: entry for held, entry in memory.accused.items() if held.incarnation in views and _holds(views[held.incarnation], held)}
    memory = memory if len(accused) == len(memory.accused) else replace(memory, accused=accused)
    published = set(memory.published.held()) if health.wrong else set()
    ignored = 0
    for wrong in health.wrong:
        held = Held(wrong.incarnation, wrong.copy)
        if held in memory.accused or held not in published or held.incarnation not in views:
            continue
        if sum(1 for at_s in memory.accused_s if now_s - at_s < MINUTE_S) >= MAX_PER_MINUTE:
            ignored += 1
            continue
        memory = _accuse(memory, held, wrong.kind, views[held.incarnation], now_s)
    notes = [f"{ignored} further copies are accused of wrong numbers; {MAX_PER_MINUTE} a minute are taken out"] if ignored else []
    return memory, notes


def _accuse(memory: Memory, held: Held, kind: str, view: ActorView, now_s: float) -> Memory:
    memory = replace(memory, accused={**memory.accused, held: Accusal(now_s, kind)}, accused_s=(*memory.accused_s, now_s)[-MAX_PER_MINUTE:])
    memory = with_failure(memory, load_key(held.incarnation, held.copy), f"{held.copy.expert} on {held.incarnation} gave wrong numbers ({kind})", now_s)
    memory = without_stored_copy(memory, view.record.node_id, held.copy)
    return with_strike_of(memory, held.incarnation, now_s)


def _holds(view: ActorView, held: Held) -> bool:
    """Whether the copy is still there, as far as the actor answers."""
    if view.report is None:
        return True
    slot = view.slot(held.copy)
    return slot is not None and slot.state is not SlotState.LOADING
