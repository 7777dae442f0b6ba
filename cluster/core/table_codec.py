"""The routing table and its protobuf form, both ways. Sizes and indices of what arrives are checked: a table from the wire is never trusted."""

from __future__ import annotations

from typing import NoReturn

from cluster.core.errors import InvalidRequest
from cluster.core.ids import DIGEST_BYTES, ExpertId, Incarnation, Role
from cluster.core.routing_table import ActorEndpoint, RoutingTable, TableCopy, TableModel
from protos.moelastic.control.v1 import control_pb2 as pb

MAX_PORT = 65535


def to_proto(table: RoutingTable, *, router_generation: int = 0, controller_generation: int = 0) -> pb.WatchTableResponse:
    """The message for one router."""
    order = sorted(table.actors)
    place = {actor_id: index for index, actor_id in enumerate(order)}
    message = pb.WatchTableResponse(epoch=table.epoch, router_generation=router_generation, controller_generation=controller_generation)
    for actor_id in order:
        endpoint = table.actors[actor_id]
        message.actors.add(
            actor_id=actor_id,
            generation=endpoint.incarnation.generation,
            host=endpoint.host,
            port=endpoint.port,
            node_id=endpoint.node_id,
            device=endpoint.device,
        )
    for expert, copies in sorted(table.copies.items()):
        entry = message.experts.add(model=expert.model, layer=expert.layer, index=expert.index)
        for copy in copies:
            entry.copies.add(actor=place[copy.incarnation.actor_id], version=bytes.fromhex(copy.version), role=_ROLE_OUT[copy.role])
    for model in table.models.values():
        counts = {"num_experts": model.num_experts, "num_missing": model.num_missing}
        message.models.add(name=model.name, manifest=model.manifest, ladder=model.ladder, **counts)
    return message


def from_proto(message: pb.WatchTableResponse) -> RoutingTable:
    """The table in a message. Raises InvalidRequest, by field, when it contradicts itself."""
    endpoints = [_endpoint(actor, index) for index, actor in enumerate(message.actors)]
    if len({endpoint.incarnation.actor_id for endpoint in endpoints}) != len(endpoints):
        _refuse("actors", "an actor_id appears twice")
    copies: dict[ExpertId, tuple[TableCopy, ...]] = {}
    for index, entry in enumerate(message.experts):
        expert = ExpertId(entry.model, entry.layer, entry.index)
        if expert in copies:
            _refuse(f"experts[{index}]", f"{expert} appears twice")
        copies[expert] = tuple(_copy(copy, endpoints, f"experts[{index}].copies[{at}]") for at, copy in enumerate(entry.copies))
    models = {entry.name: TableModel(entry.name, entry.manifest, entry.num_experts, entry.num_missing, tuple(entry.ladder)) for entry in message.models}
    return RoutingTable(message.epoch, {endpoint.incarnation.actor_id: endpoint for endpoint in endpoints}, copies, models)


def _endpoint(actor: pb.Endpoint, index: int) -> ActorEndpoint:
    if not actor.actor_id or not actor.host or not 0 < actor.port <= MAX_PORT:
        _refuse(f"actors[{index}]", f"needs an actor_id, a host and a port in 1..{MAX_PORT}")
    return ActorEndpoint(Incarnation(actor.actor_id, actor.generation), actor.host, actor.port, actor.node_id, actor.device)


def _copy(copy: pb.Copy, endpoints: list[ActorEndpoint], field: str) -> TableCopy:
    if copy.actor >= len(endpoints):
        _refuse(f"{field}.actor", f"index {copy.actor} is outside the {len(endpoints)} actors of the message")
    if len(copy.version) != DIGEST_BYTES:
        _refuse(f"{field}.version", f"{len(copy.version)} bytes; a version is a SHA-256 of {DIGEST_BYTES} bytes")
    role = _ROLE_IN.get(copy.role)
    if role is None:
        _refuse(f"{field}.role", "must be ROLE_REPLICA or ROLE_SHADOW")
    return TableCopy(endpoints[copy.actor].incarnation, copy.version.hex(), role)


def _refuse(field: str, problem: str) -> NoReturn:
    message = f"{field}: {problem}"
    raise InvalidRequest(message, field=field)


_ROLE_OUT = {Role.REPLICA: pb.ROLE_REPLICA, Role.SHADOW: pb.ROLE_SHADOW}
_ROLE_IN = {pb.ROLE_REPLICA: Role.REPLICA, pb.ROLE_SHADOW: Role.SHADOW}
