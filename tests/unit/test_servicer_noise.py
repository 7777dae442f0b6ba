"""Ten thousand malformed messages a run, as bytes through admission, decoding and service: each ends in a status of ours, and the router serves on.

Made with a plain random generator, which is a hundred times cheaper than one that can shrink; `test_servicer_fuzz` adds those that can be shrunk.
"""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest

from kit.pipelines import D
from kit.router import LAYER, Ended, InProcess, RouterRig, router
from protos.moelastic.router.v1 import router_pb2 as pb
from router_service.wire import SIZE_KEY, tensor_message

CASES = 10_000
METHOD = "/moelastic.router.v1.RouterService/Dispatch"
# DATA_LOSS: weights so large that the output is no finite number.
TYPED = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DATA_LOSS}
DIMS = (0, 1, 2, 3, D, D + 1, -1, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))
FLOATS = (0.0, -1.0, float("nan"), float("inf"), -float("inf"), 3e38, 1e-40)
NAMES = ("", "other", "t", "tiny ", "x" * 129, "\u20ac" * 128, "\0")
_HIDDEN = tensor_message(RouterRig.rows(2))
_GATED = pb.DispatchRequest(model="tiny", layer=LAYER, hidden_states=_HIDDEN, gate=pb.GateRouting(overflow=1, capacity_factor=1.25))
_CHOSEN = pb.DispatchRequest(
    model="tiny",
    layer=LAYER,
    hidden_states=_HIDDEN,
    top_k=pb.TopKRouting(expert_ids=tensor_message(np.array([[0, 1], [2, -1]], np.int32)), weights=tensor_message(np.ones((2, 2), np.float32))),
)
Damage = Callable[[random.Random, pb.DispatchRequest], None]


class Caller(InProcess):
    """A call that brings one message."""

    def __init__(self, message: bytes) -> None:
        super().__init__()
        self._messages = [message]

    async def read(self) -> object:
        return self._messages.pop() if self._messages else grpc.aio.EOF

    async def write(self, reply: pb.DispatchResponse) -> None:
        assert reply.hidden_states.shape

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


class Details(NamedTuple):
    method: str
    invocation_metadata: tuple[tuple[str, str], ...]


def _tensor(rng: random.Random, request: pb.DispatchRequest) -> pb.Tensor:
    found = [request.hidden_states, request.gate.positions]
    if request.HasField("top_k"):
        found = [request.hidden_states, request.top_k.expert_ids, request.top_k.weights]
    return rng.choice(found)


def _other_shape(rng: random.Random, request: pb.DispatchRequest) -> None:
    shape = _tensor(rng, request).shape
    if shape and rng.random() < 0.7:
        shape[rng.randrange(len(shape))] = rng.choice(DIMS)
    else:
        shape.insert(rng.randrange(len(shape) + 1), rng.choice(DIMS))


def _other_dtype(rng: random.Random, request: pb.DispatchRequest) -> None:
    _tensor(rng, request).dtype = rng.choice([*pb.DType.values(), 9, -1, 1 << 30])


def _other_size(rng: random.Random, request: pb.DispatchRequest) -> None:
    tensor = _tensor(rng, request)
    tensor.data = tensor.data[: rng.randrange(len(tensor.data) + 1)] if rng.random() < 0.5 else tensor.data + rng.randbytes(rng.randrange(1, 9))


def _other_values(rng: random.Random, request: pb.DispatchRequest) -> None:
    tensor = _tensor(rng, request)
    if len(tensor.data) >= 4:
        at = 4 * rng.randrange(len(tensor.data) // 4)
        value = struct.pack("<f", rng.choice(FLOATS)) if rng.random() < 0.5 else struct.pack("<i", rng.choice([-2, -1, 0, 1, 5, 6, 7, 1 << 30]))
        tensor.data = tensor.data[:at] + value + tensor.data[at + 4 :]


def _other_words(rng: random.Random, request: pb.DispatchRequest) -> None:
    field = rng.choice(["model", "layer", "request_id", "fidelity", "report", "overflow", "capacity_factor", "missing"])
    if field in {"model", "request_id"}:
        setattr(request, field, rng.choice(NAMES))
    elif field == "layer":
        request.layer = rng.choice([0, 1, (1 << 32) - 1])
    elif field in {"fidelity", "report"}:
        setattr(request, field, rng.choice([-1, 0, 1, 2, 3, 99]))
    elif field == "overflow":
        request.gate.overflow = rng.choice([-1, 0, 1, 2, 3, 99])
    elif field == "capacity_factor":
        request.gate.capacity_factor = rng.choice(FLOATS)
    else:
        request.ClearField(rng.choice(["hidden_states", "gate", "top_k", "model"]))


DAMAGES: tuple[Damage, ...] = (_other_shape, _other_dtype, _other_size, _other_values, _other_words)


def malformed(rng: random.Random) -> bytes:
    """A message with one to three wrongs: in its fields, in its bytes, or nothing but noise."""
    kind = rng.random()
    if kind < 0.05:
        return rng.randbytes(rng.randrange(200))
    request = pb.DispatchRequest()
    request.CopyFrom(rng.choice([_GATED, _CHOSEN]))
    if kind < 0.8:
        for _ in range(rng.randrange(1, 4)):
            rng.choice(DAMAGES)(rng, request)
        return request.SerializeToString()
    raw = bytearray(request.SerializeToString())
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(raw))
        raw[at : at + rng.choice([0, 1, 1, 5])] = rng.randbytes(rng.choice([0, 1, 1, 5])) or b"\xff"
    return bytes(raw)


@pytest.mark.timeout(280)
async def test_ten_thousand_malformed_messages_end_in_typed_statuses_and_leave_nothing_behind() -> None:
    rng, seen = random.Random(20), Counter[grpc.StatusCode]()
    async with router() as rig:
        served = grpc.unary_unary_rpc_method_handler(rig.servicer.Dispatch, pb.DispatchRequest.FromString)

        async def send(message: bytes) -> grpc.StatusCode:
            async def found(_: object) -> Any:
                return served

            declared = ((SIZE_KEY, str(len(message))),) if rng.random() < 0.5 else ()
            handler = await rig.front.admission.intercept_service(found, Details(METHOD, declared))
            ended: Ended | None = None
            try:
                await (handler.stream_unary or handler.stream_stream)(None, Caller(message))
            except Ended as error:
                ended = error
            assert ended is None or (ended.details and "grpc-status-details-bin" in dict(ended.trailing_metadata))
            return grpc.StatusCode.OK if ended is None else ended.code

        for _ in range(CASES):
            seen[await send(malformed(rng))] += 1
        assert await send(_CHOSEN.SerializeToString()) is await send(_GATED.SerializeToString()) is grpc.StatusCode.OK
        assert rig.servicer.num_in_flight == rig.front.admission.budget.held_bytes == rig.setup.pipeline.budget.held_bytes == 0
        assert rig.counters.requests_total == CASES + 2
    assert seen.total() == CASES
    assert set(seen) <= TYPED
    assert seen[grpc.StatusCode.INVALID_ARGUMENT] > CASES // 2
    assert min(seen[grpc.StatusCode.OK], seen[grpc.StatusCode.NOT_FOUND]) > CASES // 100
