"""DispatchRequest to LayerCall and LayerReply to DispatchResponse, for whole messages and for streams of chunks alike.

Here a request is checked as far as it can be without a model: known enums, ranks, and sizes that tell the truth. `core/validate` does the rest.
Shape legend: T tokens, D model width, K choices of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.core.errors import MessageTooLarge
from protos.moelastic.router.v1 import router_pb2 as pb
from router_service.core.layer_call import GateChoice, LayerCall, LayerReply, Overflow, TopK
from router_service.core.outcomes import Plan, Report
from router_service.wire import PLAN_BYTES_PER_CHOICE, Buffer, Layout, check_layout, check_tensor, data_of, refuse, tensor_message, torch_view

FLOATS: Final = (pb.D_TYPE_BF16, pb.D_TYPE_FP16, pb.D_TYPE_FP32)
MAX_REQUEST_ID_CHARACTERS: Final = 128
MAX_MODEL_NAME_CHARACTERS: Final = 128
_FIDELITIES: Final = frozenset(pb.Fidelity.values())
_REPORT_LEVELS: Final = frozenset(pb.ReportLevel.values())
_OVERFLOWS: Final = frozenset(pb.Overflow.values())
_OVERFLOW_OF: Final[dict[int, Overflow]] = {member.value: member for member in Overflow}
HIDDEN: Final = "hidden_states"
IDS: Final = "top_k.expert_ids"
WEIGHTS: Final = "top_k.weights"
POSITIONS: Final = "gate.positions"


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a request: its path, what its bytes mean, and the message that named it."""

    field: str
    layout: Layout
    message: pb.Tensor


def parts_of(request: pb.DispatchRequest, *, max_bytes: int) -> tuple[Part, ...]:
    """The checked tensors of a whole request, in the order of a stream's data; positions last. Raises InvalidRequest."""
    _check_words(request)
    return tuple(
        Part(field, check_tensor(message, field, axes=axes, dtypes=dtypes, max_bytes=max_bytes), message) for field, message, axes, dtypes in _tensors(request)
    )


def start_parts_of(start: pb.DispatchRequest, *, max_bytes: int) -> tuple[Part, ...]:
    """The checked tensors of a stream's first message, whose data is still to come; together they may have `max_bytes`. Raises InvalidRequest.

    Positions travel in the first message, with their data.
    """
    _check_words(start)
    parts: list[Part] = []
    left_bytes = max_bytes
    for field, message, axes, dtypes in _tensors(start):
        if field == POSITIONS:
            layout = check_tensor(message, field, axes=axes, dtypes=dtypes, max_bytes=left_bytes)
        else:
            layout = check_layout(message, field, axes=axes, dtypes=dtypes, max_bytes=left_bytes)
            if message.data:
                refuse(f"{field}.data", f"{field}.data must be empty in a stream's first message; send it in chunks")
        left_bytes -= layout.num_bytes
        parts.append(Part(field, layout, message))
    return tuple(parts)


def streamed_bytes(parts: Sequence[Part]) -> int:
    """Bytes that a stream's chunks must bring, all together."""
    return sum(part.layout.num_bytes for part in parts if part.field != POSITIONS)


def bodies_of(parts: Sequence[Part], chunks: memoryview | None = None) -> dict[str, Buffer]:
    """The data of each part: its message's own, or its share of the bytes that came in chunks."""
    bodies: dict[str, Buffer] = {}
    offset = 0
    for part in parts:
        if chunks is None or part.field == POSITIONS:
            bodies[part.field] = part.message.data
        else:
            bodies[part.field] = chunks[offset : offset + part.layout.num_bytes]
            offset += part.layout.num_bytes
    return bodies


def call_of(
    request: pb.DispatchRequest, parts: Sequence[Part], bodies: Mapping[str, Buffer], *, model: str, deadline_s: float, traceparent: str | None = None
) -> LayerCall:
    """The call that a request asks for, its tensors as views of `bodies`."""
    tensors = {part.field: torch_view(part.layout, bodies[part.field]) for part in parts}
    routing: GateChoice | TopK
    if request.WhichOneof("routing") == "top_k":
        routing = TopK(tensors[IDS], tensors[WEIGHTS])
    else:
        routing = GateChoice(tensors.get(POSITIONS), _OVERFLOW_OF[request.gate.overflow], request.gate.capacity_factor)
    return LayerCall(
        request_id=request.request_id,
        model=model,
        layer=request.layer,
        hidden_states=tensors[HIDDEN],
        routing=routing,
        deadline_s=deadline_s,
        fidelity_exact=request.fidelity == pb.FIDELITY_EXACT,
        want_plan=request.report == pb.REPORT_LEVEL_PLAN,
        traceparent=traceparent,
    )


def response_of(reply: LayerReply, *, max_bytes: int, with_data: bool = True) -> pb.DispatchResponse:
    """The response of a reply, in one message of at most `max_bytes`; raises MessageTooLarge, which names the way around it, before anything is copied."""
    hidden = reply.hidden_states
    num_bytes = hidden.numel() * hidden.element_size() if with_data else 0
    num_bytes += 0 if reply.report.plan is None else reply.report.plan.expert_ids.size * PLAN_BYTES_PER_CHOICE
    if num_bytes > max_bytes:
        remedy = "use DispatchStream" if with_data else "send fewer tokens at once, or ask without the plan"
        message = f"the reply has {num_bytes} bytes, over the limit of {max_bytes} for one message (router.max_message_bytes); {remedy}"
        raise MessageTooLarge(message, limit_bytes=max_bytes)
    return pb.DispatchResponse(hidden_states=tensor_message(hidden, HIDDEN, with_data=with_data), report=report_message(reply.report))


def chunks_of(reply: LayerReply, chunk_bytes: int) -> Iterator[bytes]:
    """The data of a reply's hidden states in pieces."""
    data = data_of(reply.hidden_states)
    for start in range(0, len(data), chunk_bytes):
        yield bytes(data[start : start + chunk_bytes])


def report_message(report: Report) -> pb.RoutingReport:
    """A report as its message."""
    plan = None if report.plan is None else _plan_message(report.plan)
    return pb.RoutingReport(**report.counts, epoch=report.epoch, degraded_tokens=report.degraded_tokens, plan=plan)


def _plan_message(plan: Plan) -> pb.RoutingPlan:
    return pb.RoutingPlan(
        expert_ids=tensor_message(plan.expert_ids),
        weights=tensor_message(plan.weights),
        outcomes=tensor_message(plan.outcomes),
        version_index=tensor_message(plan.version_index),
        generations=tensor_message(plan.generations),
        attempts=tensor_message(plan.attempts),
        versions=plan.versions,
    )


def _tensors(request: pb.DispatchRequest) -> Iterator[tuple[str, pb.Tensor, str, tuple[pb.DType, ...]]]:
    yield HIDDEN, request.hidden_states, "T,D", FLOATS
    if request.WhichOneof("routing") == "top_k":
        yield IDS, request.top_k.expert_ids, "T,K", (pb.D_TYPE_INT32,)
        yield WEIGHTS, request.top_k.weights, "T,K", (pb.D_TYPE_FP32,)
    elif request.gate.HasField("positions"):
        yield POSITIONS, request.gate.positions, "T", (pb.D_TYPE_UINT32,)


def _check_words(request: pb.DispatchRequest) -> None:
    if len(request.request_id) > MAX_REQUEST_ID_CHARACTERS:
        refuse("request_id", f"request_id has {len(request.request_id)} characters, over the limit of {MAX_REQUEST_ID_CHARACTERS}")
    if len(request.model) > MAX_MODEL_NAME_CHARACTERS:
        refuse("model", f"model has {len(request.model)} characters, over the limit of {MAX_MODEL_NAME_CHARACTERS}; GetModel lists the names")
    for field, value, known in (
        ("fidelity", request.fidelity, _FIDELITIES),
        ("report", request.report, _REPORT_LEVELS),
        ("gate.overflow", request.gate.overflow, _OVERFLOWS),
    ):
        if value not in known:
            refuse(field, f"{field} has a value that this router does not know; update the router or leave it out")
    if not request.HasField(HIDDEN):
        refuse(HIDDEN, "hidden_states is missing; send a Tensor of shape [T, D]")
