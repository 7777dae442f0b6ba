"""What a look means for those that were known: who is doubted, condemned, lost, accused or quarantined. Everything here only changes what is remembered."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from cluster.core.accusations import with_accusations
from cluster.core.devices import with_devices, with_gpu_faults, with_quarantines
from cluster.core.doubts import with_condemned, with_doubts
from cluster.core.health import Health
from cluster.core.ids import CopyId, Role
from cluster.core.lifecycle import ActorView, settle, views
from cluster.core.memory import Memory
from cluster.core.spec import ClusterSpec
from cluster.core.status import FleetObservation, SlotState
from cluster.core.table_draft import Held

REPAIR_LIMIT_S = 5.0
CALM_S = 2.0


def judge(spec: ClusterSpec, memory: Memory, status: FleetObservation, health: Health) -> tuple[Memory, list[str]]:
    """Fold one look and the routers' words into memory; with notes for people."""
    now_s = status.observed_s
    memory = with_gpu_faults(with_devices(memory, status), status)
    memory = with_condemned(with_doubts(memory, health, status, spec.repair), status, spec.repair)
    actors = views(spec, memory, status)
    memory = settle(memory, actors, {node.node_id for node in status.nodes if node.alive}, now_s)
    memory, notes = with_accusations(memory, health, actors, now_s)
    num_wanted = sum(len(memory.models[model.name].manifest.experts) * model.replicas for model in spec.models if model.name in memory.models)

    def can_spare(device: str) -> bool:
        others = [view for view in actors.values() if view.stays and memory.devices.get(view.incarnation) not in {device, *memory.quarantined}]
        return sum(view.record.num_slots for view in others) >= num_wanted

    memory, more = with_quarantines(memory, spec.repair, now_s, can_spare)
    return memory, [*notes, *more]


def with_exactness(memory: Memory, actors: Mapping[str, ActorView], wanted: Collection[CopyId], now_s: float) -> tuple[Memory, bool]:
    """Note since when some expert has had no full copy that may be trusted, and whether free slots are taking it: for a moment, all else waits for that.

    And CALM_S longer: a process that starts takes seconds of a core from those who answer, just when requests have been held up.
    """
    trusted = {slot.copy for view in actors.values() if view.stays for slot in view.slots if slot.state is SlotState.READY}
    trusted -= {held.copy for held in memory.accused if not _is_elsewhere(held, actors)}
    num_lacking = sum(1 for copy in wanted if copy.role is Role.REPLICA and copy not in trusted)
    if not num_lacking:
        calm_s = now_s if memory.inexact_since_s is not None else memory.calm_since_s
        is_settling = calm_s is not None and now_s - calm_s < CALM_S
        if (memory.inexact_since_s, memory.calm_since_s) == (None, calm_s if is_settling else None):
            return memory, is_settling
        return replace(memory, inexact_since_s=None, calm_since_s=calm_s if is_settling else None), is_settling
    since_s = now_s if memory.inexact_since_s is None else memory.inexact_since_s
    num_free = sum(view.report.num_free_slots for view in actors.values() if view.takes_copies and view.report is not None)
    num_loading = sum(1 for view in actors.values() if view.stays for slot in view.slots if slot.state is SlotState.LOADING)
    is_repairing = num_lacking <= num_free + num_loading and now_s - since_s < REPAIR_LIMIT_S
    return memory if since_s == memory.inexact_since_s else replace(memory, inexact_since_s=since_s), is_repairing


def _is_elsewhere(held: Held, actors: Mapping[str, ActorView]) -> bool:
    """Whether another actor is ready with the copy."""
    others = (view for view in actors.values() if view.stays and view.incarnation != held.incarnation)
    return any((slot := view.slot(held.copy)) is not None and slot.state is SlotState.READY for view in others)
