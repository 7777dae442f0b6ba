"""Malformed requests and streams that can be shrunk: each must end in a status of ours, and the router must serve on.

Eight hundred a run, beside the ten thousand of `test_servicer_noise`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.pipelines import D
from kit.router import LAYER, Ended, InProcess, RouterRig, router
from protos.moelastic.router.v1 import router_pb2 as pb
from router_service.wire import tensor_message

TYPED = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
EXAMPLES = 600
STREAM_EXAMPLES = 200
# What weights of a usual scale make of a number at most.
OVERFLOW_MARGIN = 1e3

GOOD = pb.DispatchRequest(
    model="tiny",
    layer=LAYER,
    hidden_states=tensor_message(RouterRig.rows(2)),
    top_k=pb.TopKRouting(expert_ids=tensor_message(np.array([[0, 1], [2, -1]], np.int32)), weights=tensor_message(np.ones((2, 2), np.float32))),
)
small = st.integers(0, 40)
dims = st.one_of(st.sampled_from([0, 1, 2, 3, D, D + 1, -1, 1 << 20, 1 << 40, (1 << 63) - 1, -(1 << 63)]), small)
dtypes = st.one_of(st.sampled_from(pb.DType.values()), st.integers(-3, 12))
interesting = np.array([0, 1, -1, np.nan, np.inf, -np.inf, 3e38, 1e-40], np.float32).tobytes()


@st.composite
def honest_tensors(draw: st.DrawFn) -> pb.Tensor:
    """A tensor whose size is true, with any bits as values."""
    num_rows, width = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3, 6, 7, D, D + 1]))
    dtype = draw(st.sampled_from([np.float32, np.int32, np.uint32, np.float16]))
    num_bytes = num_rows * width * np.dtype(dtype).itemsize
    data = draw(st.one_of(st.binary(min_size=num_bytes, max_size=num_bytes), st.just((interesting * num_bytes)[:num_bytes]), st.just(bytes(num_bytes))))
    return tensor_message(np.frombuffer(data, dtype).reshape(num_rows, width))


lying_tensors = st.builds(pb.Tensor, dtype=dtypes, shape=st.lists(dims, max_size=5), data=st.binary(max_size=200))
tensors = st.one_of(lying_tensors, honest_tensors())
ids = st.lists(st.integers(-3, 8), min_size=4, max_size=4).map(lambda values: tensor_message(np.array(values, np.int32).reshape(2, 2)))
gates = st.builds(pb.GateRouting, overflow=st.integers(-1, 4), capacity_factor=st.floats(width=32), positions=st.none() | tensors)
top_ks = st.builds(pb.TopKRouting, expert_ids=st.none() | tensors | ids, weights=st.none() | tensors)
fitting = st.just(tensor_message(RouterRig.rows(2)))


@st.composite
def requests(draw: st.DrawFn) -> pb.DispatchRequest:
    routing = draw(st.sampled_from(["gate", "top_k", ""]))
    request = pb.DispatchRequest(
        request_id=draw(st.text(max_size=140)),
        model=draw(st.sampled_from(["tiny", "", "other"]) | st.text(max_size=140)),
        layer=draw(st.sampled_from([0, LAYER, 1, (1 << 32) - 1])),
        hidden_states=draw(st.none() | tensors | fitting),
        fidelity=draw(st.integers(-1, 3)),
        report=draw(st.integers(-1, 4)),
    )
    if routing:
        getattr(request, routing).CopyFrom(draw(gates if routing == "gate" else top_ks))
    return request


@st.composite
def damaged_requests(draw: st.DrawFn) -> pb.DispatchRequest:
    """A good request with a few of its bytes changed, where it is still a message."""
    raw = bytearray(GOOD.SerializeToString())
    for _ in range(draw(st.integers(1, 4))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    try:
        return pb.DispatchRequest.FromString(bytes(raw))
    except DecodeError:
        return draw(requests())


@st.composite
def streams(draw: st.DrawFn) -> list[pb.DispatchStreamRequest]:
    """A stream that is nearly right: its start and chunks may be missing, repeated, cut or of the wrong size."""
    start = draw(requests() | st.just(GOOD))
    body = b""
    if draw(st.booleans()):
        body = start.hidden_states.data + start.top_k.expert_ids.data + start.top_k.weights.data
        start = pb.DispatchRequest.FromString(start.SerializeToString())
        start.hidden_states.data = start.top_k.expert_ids.data = start.top_k.weights.data = b""
        if not draw(st.booleans()):
            start.ClearField("top_k")
    messages = [pb.DispatchStreamRequest(start=start)]
    step = draw(st.sampled_from([1000, 64, 17]))
    messages += [pb.DispatchStreamRequest(chunk=body[at : at + step]) for at in range(0, len(body), step)]
    for _ in range(draw(st.integers(0, 2))):
        strange = draw(st.sampled_from([pb.DispatchStreamRequest(), pb.DispatchStreamRequest(chunk=b"xx"), messages[0]]))
        messages.insert(draw(st.integers(0, len(messages))), strange)
    return messages


@st.composite
def good_streams(draw: st.DrawFn) -> list[pb.DispatchStreamRequest]:
    """GOOD, cut into chunks of any length: of what `streams` makes too few may be right to say anything."""
    start = pb.DispatchRequest.FromString(GOOD.SerializeToString())
    body = start.hidden_states.data + start.top_k.expert_ids.data + start.top_k.weights.data
    start.hidden_states.data = start.top_k.expert_ids.data = start.top_k.weights.data = b""
    cuts = sorted({0, len(body), *draw(st.lists(st.integers(1, len(body) - 1), max_size=5))})
    return [pb.DispatchStreamRequest(start=start), *(pb.DispatchStreamRequest(chunk=body[begin:end]) for begin, end in itertools.pairwise(cuts))]


@contextmanager
def running() -> Iterator[tuple[RouterRig, asyncio.AbstractEventLoop]]:
    """A router in an event loop of its own, for tests that hypothesis calls many times."""
    loop, made = asyncio.new_event_loop(), router()
    rig = loop.run_until_complete(made.__aenter__())
    try:
        yield rig, loop
    finally:
        loop.run_until_complete(made.__aexit__(None, None, None))
        loop.close()


async def code_of(answer: Awaitable[pb.DispatchResponse], asked: pb.DispatchRequest) -> grpc.StatusCode:
    """How a call ends; a status must have words and details, a reply the shape of what was asked."""
    ended: Ended | None = None
    try:
        reply = await answer
    except Ended as error:
        ended = error
    if ended is not None:
        assert ended.details
        assert "grpc-status-details-bin" in dict(ended.trailing_metadata)
        assert ended.code is not grpc.StatusCode.DATA_LOSS or may_overflow(asked), "the numbers are of a usual scale, so none can have been lost"
        return ended.code
    assert reply.hidden_states.shape == asked.hidden_states.shape
    return grpc.StatusCode.OK


def may_overflow(asked: pb.DispatchRequest) -> bool:
    """Whether finite numbers of a request are so large that what is computed of them may have no room in its element type."""
    element = np.float16 if asked.hidden_states.dtype == pb.D_TYPE_FP16 else np.float32
    largest = np.abs(np.frombuffer(asked.hidden_states.data, element).astype(np.float64)).max(initial=1.0)
    weight = np.abs(np.frombuffer(asked.top_k.weights.data, np.float32).astype(np.float64)).max(initial=1.0)
    return bool(OVERFLOW_MARGIN * largest * weight >= np.finfo(element).max)


def is_served(rig: RouterRig, loop: asyncio.AbstractEventLoop) -> bool:
    return loop.run_until_complete(code_of(rig.servicer.Dispatch(GOOD, InProcess()), GOOD)) is grpc.StatusCode.OK


@pytest.mark.timeout(280)
def test_no_request_crashes_the_router_and_each_ends_in_a_typed_status() -> None:
    seen: Counter[grpc.StatusCode] = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(request=requests() | damaged_requests())
    def check(request: pb.DispatchRequest) -> None:
        seen[loop.run_until_complete(code_of(rig.servicer.Dispatch(request, InProcess()), request))] += 1

    with running() as (rig, loop):
        check()
        assert is_served(rig, loop)
        assert rig.counters.requests_total == sum(seen.values()) + 1
        assert rig.servicer.num_in_flight == 0
    assert set(seen) <= TYPED | {grpc.StatusCode.OK, grpc.StatusCode.DATA_LOSS}
    assert sum(seen.values()) >= EXAMPLES
    assert min(seen[grpc.StatusCode.OK], seen[grpc.StatusCode.NOT_FOUND], seen[grpc.StatusCode.INVALID_ARGUMENT]) > EXAMPLES // 100


@pytest.mark.parametrize(("weight", "code"), [(3e38, grpc.StatusCode.DATA_LOSS), (1e30, grpc.StatusCode.OK), (np.inf, grpc.StatusCode.INVALID_ARGUMENT)])
def test_a_weight_whose_products_overflow_is_data_loss_and_one_that_is_merely_large_is_not(weight: float, code: grpc.StatusCode) -> None:
    asked = pb.DispatchRequest.FromString(GOOD.SerializeToString())
    asked.top_k.weights.CopyFrom(tensor_message(np.full((2, 2), weight, np.float32)))
    with running() as (rig, loop):
        assert loop.run_until_complete(code_of(rig.servicer.Dispatch(asked, InProcess()), asked)) is code
        assert is_served(rig, loop)


async def replied(rig: RouterRig, messages: list[pb.DispatchStreamRequest]) -> pb.DispatchResponse:
    async def sent() -> AsyncIterator[pb.DispatchStreamRequest]:
        for message in messages:
            yield message

    parts = [part async for part in rig.servicer.DispatchStream(sent(), InProcess())]
    start = parts[0].start
    assert sum(len(part.chunk) for part in parts[1:]) == 4 * np.prod(start.hidden_states.shape)
    return start


@pytest.mark.timeout(280)
def test_no_stream_crashes_the_router_and_each_ends_in_a_typed_status() -> None:
    seen: Counter[grpc.StatusCode] = Counter()

    @settings(max_examples=STREAM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(messages=streams() | good_streams())
    def check(messages: list[pb.DispatchStreamRequest]) -> None:
        seen[loop.run_until_complete(code_of(replied(rig, messages), messages[0].start))] += 1

    with running() as (rig, loop):
        check()
        assert is_served(rig, loop)
        assert rig.servicer.num_in_flight == 0
    assert set(seen) <= TYPED | {grpc.StatusCode.OK}
    assert min(seen[grpc.StatusCode.OK], seen[grpc.StatusCode.INVALID_ARGUMENT]) > STREAM_EXAMPLES // 100
