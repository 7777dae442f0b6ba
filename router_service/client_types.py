"""What the client gives back: plain values, arrays in the caller's own library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.core.descriptors import DType
from protos.moelastic.router.v1 import router_pb2 as pb
from router_service.core.outcomes import OUTCOME_NAMES, Plan
from router_service.wire import Layout, float_dtype, numpy_view


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """Who answered. `outcomes` counts (token, choice) pairs by name: exact, shadow, omitted, generalist, dense, dropped, unused."""

    outcomes: dict[str, int]
    epoch: int
    degraded_tokens: int
    plan: Plan | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """The experts' combined output [T, D], in the library and element type of the request's hidden states, and who answered."""

    hidden_states: Any
    report: RoutingReport
    request_id: str


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One MoE layer; `layer` is the decoder layer index."""

    layer: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    gate_kind: str
    gate_score: str
    activation: str


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """What one request may have."""

    max_message_bytes: int
    max_tokens_per_request: int
    max_timeout_s: float
    max_choices_per_request: int = 262_144


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model. `dtypes` are accepted for hidden states; `models` are all that are served here."""

    name: str
    family: str
    dtype: DType
    layers: tuple[LayerInfo, ...]
    dtypes: tuple[DType, ...]
    limits: ServiceLimits
    manifest: str
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model's experts, and those without a copy."""

    name: str
    num_experts: int
    num_missing: int


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """One expert link of the router."""

    actor_id: str
    generation: int
    node_id: str
    address: str
    state: str
    queued_tokens: int
    frames_in_flight: int
    last_heard_age_s: float


@dataclass(frozen=True, slots=True)
class RouterStatus:
    """How well the router can serve, by itself; `state` is STARTING, SERVING, DEGRADED or DRAINING."""

    state: str
    epoch: int
    table_age_s: float
    router_generation: int
    controller_connected: bool
    models: tuple[ModelState, ...]
    links: tuple[LinkInfo, ...]
    requests_total: int
    tokens_total: int
    requests_failed: int
    uptime_s: float
    latency_s_p50: float
    latency_s_p99: float
    tokens_per_s: float
    outcomes: RoutingReport


@dataclass(frozen=True, slots=True)
class ActorPlace:
    """Where an expert actor is."""

    actor_id: str
    generation: int
    node_id: str
    device: str


@dataclass(frozen=True, slots=True)
class ExpertPlace:
    """An expert and the actors that hold it. `version` is a SHA-256 in hex."""

    model: str
    layer: int
    index: int
    replicas: tuple[ActorPlace, ...]
    shadows: tuple[ActorPlace, ...]
    version: str


@dataclass(frozen=True, slots=True)
class RoutingTableInfo:
    """The table that the router uses."""

    epoch: int
    actors: tuple[ActorPlace, ...]
    experts: tuple[ExpertPlace, ...]


def report_of(message: pb.RoutingReport) -> RoutingReport:
    """A report from its message."""
    outcomes = {name: int(getattr(message, name)) for name in OUTCOME_NAMES.values()}
    plan = _plan_of(message.plan) if message.HasField("plan") else None
    return RoutingReport(outcomes, message.epoch, message.degraded_tokens, plan)


def model_of(message: pb.GetModelResponse) -> ModelInfo:
    """A model from its message."""
    limits = message.limits
    return ModelInfo(
        name=message.name,
        family=message.family,
        dtype=float_dtype(message.dtype),
        layers=tuple(LayerInfo(**{name: getattr(entry, name) for name in LayerInfo.__slots__}) for entry in message.layers),
        dtypes=tuple(float_dtype(code) for code in message.dtypes),
        limits=ServiceLimits(limits.max_message_bytes, limits.max_tokens_per_request, limits.max_timeout_s, limits.max_choices_per_request),
        manifest=message.manifest,
        models=tuple(message.models),
    )


def status_of(message: pb.GetStatusResponse) -> RouterStatus:
    """A status from its message."""
    plain = {name: getattr(message, name) for name in RouterStatus.__slots__ if name not in {"models", "links", "outcomes"}}
    return RouterStatus(
        **plain,
        models=tuple(ModelState(entry.name, entry.num_experts, entry.num_missing) for entry in message.models),
        links=tuple(LinkInfo(**{name: getattr(entry, name) for name in LinkInfo.__slots__}) for entry in message.links),
        outcomes=report_of(message.outcomes),
    )


def table_of(message: pb.GetRoutingTableResponse) -> RoutingTableInfo:
    """A table from its message."""
    actors = tuple(ActorPlace(actor.actor_id, actor.generation, actor.node_id, actor.device) for actor in message.actors)
    experts = [
        ExpertPlace(
            entry.model,
            entry.layer,
            entry.index,
            tuple(actors[place] for place in entry.replicas),
            tuple(actors[place] for place in entry.shadows),
            entry.version.hex(),
        )
        for entry in message.experts
    ]
    return RoutingTableInfo(message.epoch, actors, tuple(experts))


def _plan_of(message: pb.RoutingPlan) -> Plan:
    def array(tensor: pb.Tensor) -> Any:  # noqa: ANN401  (its element type differs)
        return numpy_view(Layout(tensor.dtype, tuple(tensor.shape), len(tensor.data)), tensor.data)

    return Plan(
        expert_ids=array(message.expert_ids),
        weights=array(message.weights),
        outcomes=array(message.outcomes),
        version_index=array(message.version_index),
        generations=array(message.generations),
        attempts=array(message.attempts),
        versions=tuple(message.versions),
    )
