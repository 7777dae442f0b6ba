"""A dispatch as messages: one where it fits, else a stream of chunks; and the reply as an array of the caller's own library. No I/O.

Shape legend: T tokens, D model width, K choices of a token.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any, Final, Literal, Required, TypedDict

import numpy as np

from cluster.core.errors import InvalidRequest, ProtocolMismatch
from protos.moelastic.router.v1 import router_pb2 as pb
from router_service.client_types import Reply, report_of
from router_service.wire import CHUNK_BYTES, PLAN_BYTES_PER_CHOICE, Layout, code_of_array, data_of, is_torch, numpy_view, refuse, tensor_message, torch_view

Array = Any  # a numpy array or a torch tensor
FRAMING_BYTES: Final = 4096
ROUTER_PATH: Final = "/moelastic.router.v1.RouterService"
_FIDELITY: Final = {"any": pb.FIDELITY_UNSPECIFIED, "exact": pb.FIDELITY_EXACT}
_REPORT: Final = {"counts": pb.REPORT_LEVEL_COUNTS, "plan": pb.REPORT_LEVEL_PLAN}
_OVERFLOW: Final = {None: pb.OVERFLOW_UNSPECIFIED, "drop": pb.OVERFLOW_DROP, "next_best": pb.OVERFLOW_NEXT_BEST}


class DispatchOptions(TypedDict, total=False):
    """What to do with the hidden states.

    `layer`: the decoder layer index. `model`: may be left out where only one is served. `top_k`: the caller's own choice, expert ids [T, K] (-1: unused)
    and weights [T, K]; without it the router's gate chooses. `positions` [T]: for position-aware gates. `fidelity`: `exact` refuses anything but full
    precision. `report`: `plan` adds who answered each choice. `overflow`, `capacity_factor`: capacity inside this one request; none by default.
    `request_id`: at most 128 characters; made up where it is left out.
    """

    layer: Required[int]
    model: str
    top_k: tuple[Array, Array] | None
    positions: Array | None
    fidelity: Literal["any", "exact"]
    report: Literal["counts", "plan"]
    overflow: Literal["drop", "next_best"] | None
    capacity_factor: float
    request_id: str | None


class DispatchMessages:
    """The messages of one dispatch; made once, sent as often as needed."""

    def __init__(self, hidden_states: Array, options: DispatchOptions) -> None:
        """Raises InvalidRequest for what cannot be put into a message."""
        if not isinstance(hidden_states, np.ndarray) and not is_torch(hidden_states):
            refuse("hidden_states", "hidden_states must be a numpy array or a torch tensor")
        self._is_torch = is_torch(hidden_states)
        self._layout = Layout(code_of_array(hidden_states, "hidden_states"), tuple(hidden_states.shape), hidden_states.nbytes)
        self._bodies = [data_of(hidden_states)]
        self.request = pb.DispatchRequest(
            request_id=options.get("request_id") or uuid.uuid4().hex,
            model=options.get("model", ""),
            layer=_known("layer", options["layer"], range(1 << 32)),
            hidden_states=tensor_message(hidden_states, with_data=False),
            fidelity=_FIDELITY[_known("fidelity", options.get("fidelity", "any"), _FIDELITY)],
            report=_REPORT[_known("report", options.get("report", "counts"), _REPORT)],
        )
        top_k, positions, overflow = options.get("top_k"), options.get("positions"), options.get("overflow")
        if top_k is not None:
            if positions is not None or overflow is not None:
                refuse("top_k", "top_k is the caller's own choice: positions and overflow belong to the router's gate; leave them out")
            self._add_top_k(top_k)
        else:
            self._add_gate(positions, _OVERFLOW[_known("overflow", overflow, _OVERFLOW)], options.get("capacity_factor", 1.25))
        self.num_bytes = self.request.ByteSize() + sum(map(len, self._bodies)) + FRAMING_BYTES
        self._whole = b""

    def _add_top_k(self, top_k: tuple[Array, Array]) -> None:
        expert_ids, weights = (_as_numpy(array, name) for array, name in zip(top_k, ("top_k.expert_ids", "top_k.weights"), strict=True))
        if expert_ids.dtype.kind not in "iu" or (expert_ids.size and not -1 <= int(expert_ids.min()) <= int(expert_ids.max()) < 1 << 31):
            refuse("top_k.expert_ids", "top_k.expert_ids must be integers, from 0, or -1 where unused")
        ids, fp32 = expert_ids.astype(np.int32), weights.astype(np.float32)
        self._bodies += [data_of(ids), data_of(fp32)]
        self.request.top_k.expert_ids.CopyFrom(tensor_message(ids, with_data=False))
        self.request.top_k.weights.CopyFrom(tensor_message(fp32, with_data=False))

    def _add_gate(self, positions: Array | None, overflow: pb.Overflow, capacity_factor: float) -> None:
        self.request.gate.overflow = overflow
        self.request.gate.capacity_factor = capacity_factor
        if positions is None:
            return
        given = _as_numpy(positions, "positions")
        if given.dtype.kind not in "iu" or (given.size and not 0 <= int(given.min()) <= int(given.max()) < 1 << 32):
            refuse("gate.positions", "positions must be integers, from 0")
        self.request.gate.positions.CopyFrom(tensor_message(given.astype(np.uint32)))

    def fits(self, max_message_bytes: int) -> bool:
        """Whether request and reply both fit into one message; a plan counts with as many choices as the request shows, at least one for each token."""
        choices = self.request.top_k.expert_ids.shape if self.request.HasField("top_k") else self._layout.shape[:1]
        plan_bytes = int(np.prod(choices)) * PLAN_BYTES_PER_CHOICE if self.request.report == pb.REPORT_LEVEL_PLAN else 0
        return max(self.num_bytes, self._layout.num_bytes + plan_bytes + FRAMING_BYTES) <= max_message_bytes

    @property
    def whole(self) -> bytes:
        """Everything in one serialised message."""
        if not self._whole:
            message = pb.DispatchRequest()
            message.CopyFrom(self.request)
            message.hidden_states.data = bytes(self._bodies[0])
            if len(self._bodies) > 1:
                message.top_k.expert_ids.data, message.top_k.weights.data = map(bytes, self._bodies[1:])
            self._whole = message.SerializeToString()
        return self._whole

    def chunks(self, max_message_bytes: int) -> Iterator[pb.DispatchStreamRequest]:
        """The same as a stream of messages below the limit."""
        yield pb.DispatchStreamRequest(start=self.request)
        step = max(1, min(CHUNK_BYTES, max_message_bytes // 2))
        for body in self._bodies:
            for start in range(0, len(body), step):
                yield pb.DispatchStreamRequest(chunk=bytes(body[start : start + step]))

    def reply_of(self, response: pb.DispatchResponse, data: bytearray | None = None) -> Reply:
        """The reply in a response; `data` holds what came in chunks. Raises ProtocolMismatch when it is not the answer to this request."""
        message = response.hidden_states
        body = bytearray(message.data) if data is None else data
        if message.dtype != self._layout.dtype or tuple(message.shape) != self._layout.shape or len(body) != self._layout.num_bytes:
            text = "the router answered with another shape, element type or size than was asked for; client and router do not match"
            raise ProtocolMismatch(text)
        rows = torch_view(self._layout, body) if self._is_torch else numpy_view(self._layout, body)
        return Reply(rows, report_of(response.report), self.request.request_id)


class ReplyChunks:
    """Puts a streamed reply together: its start, then the data, in as many bytes as the request had."""

    def __init__(self, messages: DispatchMessages) -> None:
        self._messages = messages
        self._start: pb.DispatchResponse | None = None
        self._data = bytearray(messages._layout.num_bytes)  # noqa: SLF001  (the two halves of one exchange)
        self._filled = 0

    def take(self, message: pb.DispatchStreamResponse) -> None:
        """The next message. Raises ProtocolMismatch when it does not fit."""
        if message.WhichOneof("part") == "start" and self._start is None:
            self._start = message.start
            return
        chunk, end = message.chunk, self._filled + len(message.chunk)
        if self._start is None or not chunk or end > len(self._data):
            text = "the router's stream is not a start followed by as many bytes as were sent; client and router do not match"
            raise ProtocolMismatch(text)
        self._data[self._filled : end] = chunk
        self._filled = end

    def reply(self) -> Reply:
        """The whole reply. Raises ProtocolMismatch when something is missing."""
        if self._start is None or self._filled != len(self._data):
            text = "the router's stream ended before the whole reply had come; client and router do not match"
            raise ProtocolMismatch(text)
        return self._messages.reply_of(self._start, self._data)


def _as_numpy(array: Array, field: str) -> np.ndarray[Any, np.dtype[Any]]:
    if is_torch(array):
        host = array.detach().cpu()
        # numpy has no bf16; weights become fp32 on the wire anyhow.
        found: np.ndarray[Any, np.dtype[Any]] = (host.float() if host.dtype.is_floating_point else host).numpy()
        return found
    if isinstance(array, np.ndarray):
        return array
    message = f"{field} must be a numpy array or a torch tensor"
    raise InvalidRequest(message, field=field)


def _known(field: str, value: Any, known: Any) -> Any:  # noqa: ANN401
    if value not in known:
        words = f"0 to {known[-1]}" if isinstance(known, range) else ", ".join(map(repr, known))
        refuse(field, f"{field} must be one of: {words}")
    return value
