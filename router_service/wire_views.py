"""What the router tells of itself, as messages: its models, its state, its table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from cluster.core.descriptors import DType, LayerDescriptor, ModelDescriptor
from cluster.core.ids import Role
from cluster.core.routing_table import RoutingTable, TableCopy
from protos.moelastic.router.v1 import router_pb2 as pb
from router_service.counters import Counters
from router_service.wire import dtype_code

LATENCY_QUANTILES: Final = (0.5, 0.99)


@dataclass(frozen=True, slots=True)
class LinkView:
    """One expert link as the router sees it. `state` is connecting, ready or closed."""

    actor_id: str
    generation: int
    node_id: str
    address: str
    state: str
    queued_tokens: int
    frames_in_flight: int
    last_heard_age_s: float


@dataclass(frozen=True, slots=True)
class RouterFacts:
    """What the router knows now, and how old that is."""

    table: RoutingTable | None
    table_age_s: float
    generation: int
    is_connected: bool
    is_draining: bool
    links: tuple[LinkView, ...]


def model_message(descriptor: ModelDescriptor, *, manifest: str, models: Iterable[str], limits: pb.Limits) -> pb.GetModelResponse:
    """All a stranger must know to send tokens."""
    dtypes = [dtype_code(descriptor.dtype)]
    if descriptor.dtype is not DType.FP32:
        dtypes.append(dtype_code(DType.FP32))
    return pb.GetModelResponse(
        name=descriptor.name,
        family=descriptor.family,
        dtype=dtypes[0],
        layers=[_layer_message(entry) for entry in descriptor.layers],
        dtypes=dtypes,
        limits=limits,
        manifest=manifest,
        models=sorted(models),
    )


def _layer_message(entry: LayerDescriptor) -> pb.MoeLayer:
    return pb.MoeLayer(
        layer=entry.layer,
        num_experts=entry.num_experts,
        top_k=entry.gate.top_k,
        hidden_size=entry.expert.hidden_size,
        intermediate_size=entry.expert.intermediate_size,
        gate_kind=entry.gate.kind,
        gate_score=entry.gate.score,
        activation=entry.expert.activation,
    )


def state_of(facts: RouterFacts) -> str:
    """STARTING, SERVING, DEGRADED or DRAINING."""
    if facts.is_draining:
        return "DRAINING"
    if facts.table is None or not facts.table.models:
        return "STARTING"
    return "SERVING" if all(facts.table.is_complete(name) for name in facts.table.models) else "DEGRADED"


def status_message(facts: RouterFacts, counters: Counters) -> pb.GetStatusResponse:
    """How well the router can serve, from what it knows itself."""
    table = facts.table
    models = () if table is None else table.models.values()
    epoch = 0 if table is None else table.epoch
    p50, p99 = (counters.latency_s(quantile) for quantile in LATENCY_QUANTILES)
    outcomes = pb.RoutingReport(epoch=epoch, degraded_tokens=counters.degraded_tokens)
    for outcome, count in counters.outcomes.items():
        setattr(outcomes, outcome, count)
    return pb.GetStatusResponse(
        state=state_of(facts),
        epoch=epoch,
        table_age_s=facts.table_age_s,
        router_generation=facts.generation,
        controller_connected=facts.is_connected,
        models=[pb.ModelStatus(name=model.name, num_experts=model.num_experts, num_missing=model.num_missing) for model in models],
        links=[_link_message(link) for link in facts.links],
        requests_total=counters.requests_total,
        tokens_total=counters.tokens_total,
        requests_failed=counters.requests_failed,
        uptime_s=counters.uptime_s,
        latency_s_p50=p50,
        latency_s_p99=p99,
        tokens_per_s=counters.tokens_per_s,
        outcomes=outcomes,
    )


def _link_message(link: LinkView) -> pb.LinkStatus:
    return pb.LinkStatus(
        actor_id=link.actor_id,
        generation=link.generation,
        node_id=link.node_id,
        address=link.address,
        state=link.state,
        queued_tokens=link.queued_tokens,
        frames_in_flight=link.frames_in_flight,
        last_heard_age_s=link.last_heard_age_s,
    )


def table_message(table: RoutingTable) -> pb.GetRoutingTableResponse:
    """The table in use; actors by name, experts in order, copies as indices into the actors."""
    order = {actor_id: index for index, actor_id in enumerate(sorted(table.actors))}
    actors = []
    for actor_id in order:
        endpoint = table.actors[actor_id]
        generation = endpoint.incarnation.generation
        actors.append(pb.RoutingTableActor(actor_id=actor_id, generation=generation, node_id=endpoint.node_id, device=endpoint.device))
    experts = []
    for expert, copies in sorted(table.copies.items()):
        version = bytes.fromhex(copies[0].version) if copies else b""
        entry = pb.RoutingTableExpert(model=expert.model, layer=expert.layer, index=expert.index, version=version)
        entry.replicas.extend(_indices(copies, Role.REPLICA, order))
        entry.shadows.extend(_indices(copies, Role.SHADOW, order))
        experts.append(entry)
    return pb.GetRoutingTableResponse(epoch=table.epoch, actors=actors, experts=experts)


def _indices(copies: Iterable[TableCopy], role: Role, order: Mapping[str, int]) -> list[int]:
    return [order[copy.incarnation.actor_id] for copy in copies if copy.role is role]
