"""The controller's status as a message and as JSON: one coherent view, made from one snapshot."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

from google.protobuf.message import Message

from cluster.controller import Controller, Snapshot
from cluster.core.ids import Role
from cluster.core.lifecycle import ActorView
from cluster.core.status import ActorObservation, ActorReport, NodeObservation
from protos.moelastic.control.v1 import control_pb2 as pb

NUM_DECISIONS = 50
_ROLES = {Role.REPLICA: pb.ROLE_REPLICA, Role.SHADOW: pb.ROLE_SHADOW}


def status_message(controller: Controller) -> pb.GetClusterStatusResponse:
    """Goal, nodes, actors, slots, table and last decisions, as of the last look."""
    snapshot = controller.snapshot()
    memory, decision = snapshot.memory, snapshot.decision
    message = pb.GetClusterStatusResponse(
        name=snapshot.spec.name if snapshot.spec is not None else "",
        state=decision.state if decision is not None else "DEPLOYING",
        epoch=memory.epoch,
        spec_revision=memory.spec_revision,
        controller_generation=snapshot.controller_generation,
        observed_age_s=controller.observed_age_s(),
        num_copies_wanted=decision.num_copies_wanted if decision is not None else 0,
        num_copies_ready=decision.num_copies_ready if decision is not None else 0,
        message=_text(snapshot),
        differences=decision.differences if decision is not None else (),
    )
    for model in memory.published.models.values():
        message.models.add(name=model.name, manifest=model.manifest, num_experts=model.num_experts, num_missing=model.num_missing)
    for node in snapshot.status.nodes:
        entry = message.nodes.add(node_id=node.node_id, name=node.name, address=node.address, alive=node.alive, num_gpus=node.num_gpus)
        _add_gpus(entry, node, memory.quarantined)
    _add_actors(message, snapshot)
    for router in snapshot.status.routers:
        message.routers.add(
            router_id=router.router_id,
            generation=router.generation,
            address=f"{router.host}:{router.port}" if router.port else "",
            metrics_address=f"127.0.0.1:{router.metrics_port}" if router.metrics_port else "",
            state=router.state,
            node_id=router.node_id,
            pid=router.pid,
        )
    for record in controller.store.decisions(NUM_DECISIONS):
        message.decisions.add(
            sequence=record.sequence,
            unix_time_s=record.unix_time_s,
            action=record.action,
            target=record.target,
            reason=record.reason,
            epoch=record.epoch,
        )
    for expert, rate in sorted(snapshot.told.load.tokens_per_s.items()):
        message.rates.add(model=expert.model, layer=expert.layer, index=expert.index, tokens_per_s=rate)
    for device, reason in sorted(memory.quarantined.items()):
        message.quarantined.add(device=device, reason=reason)
    _add_hot(message, snapshot)
    _add_shadows(message, snapshot)
    for place, (done, wanted) in sorted(snapshot.imports.items()):
        node_id, _, name = place.partition("/")
        message.imports.add(model=name, node_id=node_id, num_done=done, num_wanted=wanted)
    return message


def status_json(controller: Controller) -> str:
    """The same as JSON, with the proto's field names; every field is there, numbers are numbers, enums their names."""
    return json.dumps(_plain(status_message(controller)))


def _text(snapshot: Snapshot) -> str:
    """What keeps the goal from being reached."""
    parts = [snapshot.trouble]
    if snapshot.store_was_damaged:
        parts.append("the controller's records were damaged and set aside; they were rebuilt from what runs")
    if snapshot.spec is None:
        parts.append("nothing is deployed")
    parts += [f"{name.partition('/')[2]}: {done} of {wanted} blobs on {name.partition('/')[0][:12]}" for name, (done, wanted) in snapshot.imports.items()]
    parts.append(snapshot.decision.message if snapshot.decision is not None else "")
    return "; ".join(part for part in parts if part)


def _add_gpus(entry: pb.NodeStatus, node: NodeObservation, quarantined: Mapping[str, str]) -> None:
    for gpu in node.gpus:
        last = max((fault for fault in node.gpu_faults if fault.device == gpu.device), key=lambda fault: fault.unix_s, default=None)
        entry.gpus.add(
            index=gpu.index,
            device=gpu.device,
            uuid=gpu.uuid,
            name=gpu.name,
            total_bytes=gpu.total_bytes,
            problem=gpu.problem,
            last_xid=last.xid if last is not None else 0,
            last_xid_unix_s=last.unix_s if last is not None else 0.0,
            quarantine=quarantined.get(f"{node.node_id}/{gpu.device}", ""),
        )


def _add_actors(message: pb.GetClusterStatusResponse, snapshot: Snapshot) -> None:
    """Recorded actors, seen or not, then unrecorded ones."""
    seen = {actor.incarnation: actor for actor in snapshot.status.actors}
    views = dict(snapshot.decision.actors) if snapshot.decision is not None else {}
    now_s = snapshot.status.observed_s
    for name in sorted(views):
        view = views[name]
        since_s = snapshot.memory.unreachable_since_s.get(view.incarnation, snapshot.memory.first_seen_s.get(view.incarnation, now_s))
        _add_recorded(message, view, max(0.0, now_s - since_s), _doubt(view, snapshot))
        seen.pop(view.incarnation, None)
    for actor in seen.values():
        _add_unrecorded(message, actor)


def _add_hot(message: pb.GetClusterStatusResponse, snapshot: Snapshot) -> None:
    """Further replicas of hot experts, where they are or that there is no room for them."""
    placed = {copy.expert: names for copy, names in snapshot.memory.further.items()}
    for expert, warmth in sorted(snapshot.told.hot.items()):
        for name in placed.get(expert, ("",)):
            message.hot.add(model=expert.model, layer=expert.layer, index=expert.index, actor_id=name, reason=warmth.why)


def _add_shadows(message: pb.GetClusterStatusResponse, snapshot: Snapshot) -> None:
    """What the shadows of each model that wants them take packed, and what they may."""
    packed_bytes: Counter[str] = Counter()
    for actor in snapshot.status.actors:
        for slot in actor.report.slots if actor.report is not None else ():
            if slot.copy.role is Role.SHADOW:
                packed_bytes[slot.copy.expert.model] += slot.num_bytes
    for name, record in sorted(snapshot.memory.models.items()):
        if record.shadow is not None:
            experts_bytes = sum(layer.num_experts * layer.expert.num_bytes for layer in record.manifest.model.layers)
            message.shadows.add(
                model=name,
                packed_bytes=packed_bytes[name],
                packed_max_bytes=int(record.shadow.memory_fraction * experts_bytes),
                experts_bytes=experts_bytes,
            )


def _doubt(view: ActorView, snapshot: Snapshot) -> str:
    """What routers say of an actor that they do not trust, or not quite."""
    said = snapshot.told.health.of(view.incarnation, snapshot.status.observed_s)
    suspicion = next((f"suspected: {link.evidence or 'late'}" for link in said if link.is_suspected), "")
    return view.doubt or suspicion or ("trusted again a moment ago" if view.is_settling else "")


def _add_recorded(message: pb.GetClusterStatusResponse, view: ActorView, since_s: float, doubt: str) -> None:
    state = {"decided": "starting", "suspect": "unreachable", "lost": "dead"}.get(view.life, str(view.life))
    entry = message.actors.add(
        actor_id=view.actor_id,
        generation=view.incarnation.generation,
        state="draining" if view.leaving and state == "ready" else state,
        node_id=view.record.node_id,
        num_slots=view.record.num_slots,
        reason=view.reason,
        since_s=since_s,
        doubt=doubt,
    )
    if view.report is not None:
        _fill(entry, view.report)


def _add_unrecorded(message: pb.GetClusterStatusResponse, actor: ActorObservation) -> None:
    incarnation = actor.incarnation
    entry = message.actors.add(
        actor_id=incarnation.actor_id,
        generation=incarnation.generation,
        state=actor.state,
        node_id=actor.node_id,
        reason=actor.reason or "not recorded; is being stopped",
    )
    if actor.report is not None:
        _fill(entry, actor.report)


def _fill(entry: pb.ActorStatus, report: ActorReport) -> None:
    entry.address = f"{report.host}:{report.port}"
    entry.device, entry.pid, entry.num_slots = report.device, report.pid, report.num_slots
    entry.capacity_bytes, entry.used_bytes = max(0, report.capacity_bytes), max(0, report.used_bytes)
    entry.expanded_bytes, entry.expanded_max_bytes, entry.num_unexpanded = report.expanded_bytes, report.expanded_max_bytes, report.num_unexpanded
    for slot in report.slots:
        expert = slot.copy.expert
        entry.slots.add(
            model=expert.model,
            layer=expert.layer,
            index=expert.index,
            version=slot.copy.version,
            role=_ROLES[slot.copy.role],
            state=slot.state,
            bytes=max(0, slot.num_bytes),
        )


def _plain(message: Message) -> dict[str, object]:
    """A message as plain data. proto's own JSON writes 64-bit numbers as strings, which would surprise every reader of `--json`."""
    result: dict[str, object] = {}
    for field in message.DESCRIPTOR.fields:
        names = {entry.number: entry.name for entry in field.enum_type.values} if field.enum_type is not None else {}
        value = getattr(message, field.name)
        result[field.name] = [_plain_value(item, names) for item in value] if field.is_repeated else _plain_value(value, names)
    return result


def _plain_value(value: object, enum_names: Mapping[int, str]) -> object:
    if isinstance(value, Message):
        return _plain(value)
    if isinstance(value, int) and enum_names:
        return enum_names[value]
    return value.hex() if isinstance(value, bytes) else value
