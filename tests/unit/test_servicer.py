from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from cluster.core.errors import DataLoss, DeadlineExceeded, ExpertUnavailable, InvalidRequest, InvariantBroken, MoeError, NotReady, Overloaded
from kit.link import until
from kit.pipelines import D, call, expected, one_copy_each, table
from kit.router import LAYER, MIB, TOKEN, EchoPipeline, Ended, InProcess, RouterRig, router
from protos.moelastic.router.v1 import router_pb2 as pb
from protos.moelastic.router.v1 import router_pb2_grpc
from router_service.wire import SIZE_KEY, tensor_message

AUTHORIZED = (("authorization", f"Bearer {TOKEN}"),)
INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND


def good() -> pb.DispatchRequest:
    ids, weights = np.array([[0, 1], [2, -1]], np.int32), np.array([[0.5, 0.5], [1, 0]], np.float32)
    routing = pb.TopKRouting(expert_ids=tensor_message(ids), weights=tensor_message(weights))
    return pb.DispatchRequest(request_id="r-1", model="tiny", layer=LAYER, hidden_states=tensor_message(RouterRig.rows(2)), top_k=routing)


def hidden(array: Any) -> Callable[[pb.DispatchRequest], None]:
    def change(request: pb.DispatchRequest) -> None:
        request.hidden_states.CopyFrom(tensor_message(array))

    return change


def changed(path: str, value: Any) -> Callable[[pb.DispatchRequest], None]:
    """Set one field, by its path."""

    def change(request: pb.DispatchRequest) -> None:
        *parents, name = path.split(".")
        message = request
        for parent in parents:
            message = getattr(message, parent)
        if name == "shape":
            message.shape[:] = value
        else:
            setattr(message, name, value)

    return change


def top_k(ids: Any, weights: Any) -> Callable[[pb.DispatchRequest], None]:
    def change(request: pb.DispatchRequest) -> None:
        request.top_k.expert_ids.CopyFrom(tensor_message(np.array(ids, np.int32)))
        request.top_k.weights.CopyFrom(tensor_message(np.array(weights, np.float32)))

    return change


def cleared(name: str) -> Callable[[pb.DispatchRequest], None]:
    return lambda request: request.ClearField(name)


def positions(array: Any) -> Callable[[pb.DispatchRequest], None]:
    return lambda request: request.gate.positions.CopyFrom(tensor_message(array))


NAN_ROW, INF_ROW = RouterRig.rows(2), RouterRig.rows(2)
NAN_ROW[1, 3], INF_ROW[0, 0] = np.nan, -np.inf

BAD_INPUT: dict[str, tuple[Callable[[pb.DispatchRequest], None], grpc.StatusCode, str]] = {
    "no tensor": (cleared("hidden_states"), INVALID, "hidden_states"),
    "wrong hidden size": (hidden(np.zeros((2, D + 1), np.float32)), INVALID, "hidden_states.shape"),
    "wrong dtype": (hidden(np.zeros((2, D), np.float16)), INVALID, "hidden_states.dtype"),
    "integer dtype": (hidden(np.zeros((2, D), np.int32)), INVALID, "hidden_states.dtype"),
    "unknown dtype": (changed("hidden_states.dtype", 77), INVALID, "hidden_states.dtype"),
    "rank 1": (hidden(np.zeros(D, np.float32)), INVALID, "hidden_states.shape"),
    "rank 3": (hidden(np.zeros((1, 2, D), np.float32)), INVALID, "hidden_states.shape"),
    "zero tokens": (hidden(np.zeros((0, D), np.float32)), INVALID, "hidden_states.shape"),
    "negative shape": (changed("hidden_states.shape", [-2, -D]), INVALID, "hidden_states.shape"),
    "NaN": (hidden(NAN_ROW), INVALID, "hidden_states"),
    "Inf": (hidden(INF_ROW), INVALID, "hidden_states"),
    "too few bytes": (changed("hidden_states.data", bytes(3)), INVALID, "hidden_states.data"),
    "too many bytes": (changed("hidden_states.data", bytes(9999)), INVALID, "hidden_states.data"),
    "2^40 elements": (changed("hidden_states.shape", [1 << 20, 1 << 20]), INVALID, "hidden_states.shape"),
    "2^126 elements": (changed("hidden_states.shape", [(1 << 63) - 1, (1 << 63) - 1]), INVALID, "hidden_states.shape"),
    "id out of range": (top_k([[0, 6], [0, 1]], [[1, 1], [1, 1]]), INVALID, "top_k.expert_ids"),
    "id below -1": (top_k([[0, -2], [0, 1]], [[1, 1], [1, 1]]), INVALID, "top_k.expert_ids"),
    "duplicate ids": (top_k([[0, 1], [3, 3]], [[1, 1], [1, 1]]), INVALID, "top_k.expert_ids"),
    "K > E": (top_k([[0, 1, 2, 3, 4, 5, -1]] * 2, [[1] * 7] * 2), INVALID, "top_k.expert_ids.shape"),
    "K = 0": (changed("top_k.expert_ids.shape", [2, 0]), INVALID, "top_k.expert_ids.shape"),
    "ids for other tokens": (top_k([[0, 1]], [[1, 1]]), INVALID, "top_k.expert_ids.shape"),
    "weights of another shape": (changed("top_k.weights.shape", [4, 1]), INVALID, "top_k.weights.shape"),
    "weights that lie": (changed("top_k.weights.shape", [2, 3]), INVALID, "top_k.weights.data"),
    "NaN weight": (top_k([[0, 1], [2, 3]], [[1, np.nan], [1, 1]]), INVALID, "top_k.weights"),
    "ids as floats": (changed("top_k.expert_ids.dtype", pb.D_TYPE_FP32), INVALID, "top_k.expert_ids.dtype"),
    "positions where the gate has none": (positions(np.zeros(2, np.uint32)), INVALID, "gate.positions"),
    "positions as a matrix": (positions(np.zeros((2, 1), np.uint32)), INVALID, "gate.positions.shape"),
    "unknown overflow": (changed("gate.overflow", 9), INVALID, "gate.overflow"),
    "unknown fidelity": (changed("fidelity", 9), INVALID, "fidelity"),
    "unknown report": (changed("report", 9), INVALID, "report"),
    "long request id": (changed("request_id", "x" * 129), INVALID, "request_id"),
    "long model name": (changed("model", "x" * 129), INVALID, "model"),
    "unknown model": (changed("model", "other"), NOT_FOUND, "model"),
    "unknown layer": (changed("layer", 1), NOT_FOUND, "layer"),
    "layer 2^32-1": (changed("layer", (1 << 32) - 1), NOT_FOUND, "layer"),
}


@pytest.fixture(scope="module")
async def rig() -> AsyncIterator[RouterRig]:
    async with router() as made:
        yield made


@pytest.fixture(scope="module")
async def channel(rig: RouterRig) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(rig.address) as opened:
        yield opened


def stub(channel: grpc.aio.Channel) -> router_pb2_grpc.RouterServiceStub:
    return router_pb2_grpc.RouterServiceStub(channel)


async def failure_of(channel: grpc.aio.Channel, request: pb.DispatchRequest, **options: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub(channel).Dispatch(request, **{"timeout": 10, "metadata": AUTHORIZED, **options})
    return caught.value


def details_of(error: grpc.aio.AioRpcError, kind: type) -> Any:
    for packed in rpc_status.from_call(error).details:
        if packed.Is(kind.DESCRIPTOR):
            found = kind()
            packed.Unpack(found)
            return found
    return None


async def still_serves(channel: grpc.aio.Channel) -> None:
    reply = await stub(channel).Dispatch(good(), timeout=10, metadata=AUTHORIZED)
    assert (reply.report.exact, reply.report.unused) == (3, 1)


@pytest.mark.parametrize("name", BAD_INPUT)
async def test_bad_input_ends_in_its_status_and_breaks_nothing(channel: grpc.aio.Channel, name: str) -> None:
    change, code, field = BAD_INPUT[name]
    request = good()
    change(request)
    error = await failure_of(channel, request)
    assert error.code() is code
    assert error.details()
    if code is INVALID:
        assert details_of(error, error_details_pb2.BadRequest).field_violations[0].field == field
        assert field.removesuffix(".shape").removesuffix(".dtype") in error.details()
    else:
        assert details_of(error, error_details_pb2.ResourceInfo).resource_type == field
    await still_serves(channel)


async def test_a_reply_through_grpc_is_the_models_answer(rig: RouterRig) -> None:
    asked = call(3, dtype=torch.bfloat16)
    async with rig.client() as client:
        reply = await client.dispatch(asked.hidden_states, model="tiny", layer=LAYER)
    assert torch.equal(reply.hidden_states, expected(asked, rig.setup.model))


async def test_a_request_that_names_no_model_goes_to_the_only_one(rig: RouterRig) -> None:
    async with rig.client() as client:
        assert (await client.dispatch(rig.rows(), layer=LAYER)).report.outcomes["exact"] == 10


async def test_an_expired_deadline_ends_the_call(rig: RouterRig, channel: grpc.aio.Channel) -> None:
    rig.setup.lanes.hold()
    error = await failure_of(channel, good(), timeout=0.05)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: rig.servicer.num_in_flight == 0)
    rig.setup.lanes.let_go()
    await still_serves(channel)


async def test_a_caller_that_goes_away_withdraws_its_rows(rig: RouterRig, channel: grpc.aio.Channel) -> None:
    lanes = rig.setup.lanes
    submitted, withdrawn = len(lanes.requests), len(lanes.withdrawn)
    lanes.hold()
    sending = asyncio.ensure_future(stub(channel).Dispatch(good(), metadata=AUTHORIZED, timeout=10))
    await lanes.wait_until_submitted(submitted + 3)
    sending.cancel()
    await until(lambda: len(lanes.withdrawn) == withdrawn + 3)
    await until(lambda: rig.servicer.num_in_flight == 0)
    lanes.let_go()
    await still_serves(channel)


@pytest.mark.parametrize(("sent_s", "seen_s"), [(None, 20.0), (5.0, 5.0), (600.0, 60.0)])
async def test_the_deadline_is_the_callers_within_bounds(sent_s: float | None, seen_s: float) -> None:
    pipeline = EchoPipeline()
    async with router(pipeline) as rig:
        started_s = asyncio.get_running_loop().time()
        await rig.servicer.Dispatch(good(), InProcess(sent_s))
        assert pipeline.calls[0].deadline_s - started_s == pytest.approx(seen_s, abs=3)


async def test_a_deadline_that_has_passed_on_arrival_reaches_no_expert() -> None:
    pipeline = EchoPipeline()
    async with router(pipeline) as rig:
        with pytest.raises(Ended) as caught:
            await rig.servicer.Dispatch(good(), InProcess(0.0))
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not pipeline.calls


FAILURES = [
    ExpertUnavailable("expert tiny:3/1: it has no copies; retry", failed_rows=(0, 1)),
    DataLoss("1 row came back non-finite; report it", failed_rows=(1,)),
    Overloaded("too many rows wait; retry", retry_after_s=0.3),
    InvariantBroken("a choice ended without an outcome"),
    NotReady("no table yet; retry"),
    DeadlineExceeded("the deadline passed"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
async def test_what_the_pipeline_raises_reaches_the_caller_as_it_is(failure: MoeError) -> None:
    async with router(EchoPipeline(failure)) as rig, rig.client() as client:
        with pytest.raises(type(failure)) as caught:
            await client.dispatch(rig.rows(), layer=LAYER, timeout_s=0.2)
        assert str(failure) in str(caught.value)
        if isinstance(failure, ExpertUnavailable | DataLoss):
            assert caught.value.failed_rows == failure.failed_rows
        assert rig.counters.requests_failed >= 1


async def test_a_bug_in_the_pipeline_is_internal_and_its_text_stays_in_the_process(caplog: pytest.LogCaptureFixture) -> None:
    async with router(EchoPipeline(RuntimeError("secret 0.123"))) as rig, rig.client() as client:
        with pytest.raises(InvariantBroken, match="RuntimeError") as caught:
            await client.dispatch(rig.rows(), layer=LAYER, request_id="find-me")
    assert "0.123" not in str(caught.value)
    assert "find-me" in caplog.text
    assert "0.123" not in caplog.text


async def test_counters_are_true(rig: RouterRig) -> None:
    async with rig.client() as client:
        before = await client.status()
        await client.dispatch(rig.rows(7), layer=LAYER)
        with pytest.raises(InvalidRequest):
            await client.dispatch(np.zeros((7, D + 1), np.float32), layer=LAYER)
        after = await client.status()
    assert after.requests_total == before.requests_total + 2
    assert after.requests_failed == before.requests_failed + 1
    assert after.tokens_total == before.tokens_total + 7
    assert after.outcomes.outcomes["exact"] == before.outcomes.outcomes["exact"] + 14
    assert 0 < after.latency_s_p50 <= after.latency_s_p99


async def test_get_model_tells_a_stranger_what_to_send(rig: RouterRig) -> None:
    async with rig.client() as client:
        info = await client.model()
        entry = info.layers[-1]
        assert (info.name, info.dtype, info.models) == ("tiny", "bf16", ("tiny",))
        assert [layer.layer for layer in info.layers] == [0, 3]
        rows = np.zeros((1, entry.hidden_size), np.float32)
        reply = await client.dispatch(rows, model=info.name, layer=entry.layer, timeout_s=min(info.limits.max_timeout_s, 10))
    assert reply.report.outcomes["exact"] == entry.top_k
    assert info.limits.max_message_bytes == 4 * MIB


async def test_where_several_models_are_served_one_must_be_named() -> None:
    async with router() as one:
        descriptor = one.setup.model.manifest.model
    models = {name: descriptor.model_copy(update={"name": name}) for name in ("tiny", "second")}
    async with router(models=models) as rig, rig.client() as client:
        with pytest.raises(InvalidRequest, match="second, tiny; name one") as caught:
            await client.model()
        assert caught.value.field == "model"
        assert (await client.model("second")).models == ("second", "tiny")


async def test_a_model_in_the_table_whose_gates_are_not_here_yet_is_not_ready() -> None:
    async with router(models={}) as rig, rig.client() as client:
        with pytest.raises(NotReady, match="still loading"):
            await client.dispatch(rig.rows(), model="tiny", layer=LAYER, timeout_s=0.1)


async def test_get_routing_table_names_every_copy(rig: RouterRig) -> None:
    async with rig.client() as client:
        found = await client.routing_table()
    assert found.epoch == rig.setup.table.epoch
    assert len(found.experts) == len(rig.setup.table.copies)
    for entry in found.experts:
        copies = [copy for (expert, copies) in rig.setup.table.copies.items() if (expert.layer, expert.index) == (entry.layer, entry.index) for copy in copies]
        assert [place.actor_id for place in entry.replicas] == [copy.incarnation.actor_id for copy in copies]
        assert entry.version == copies[0].version


async def test_before_the_first_table_the_router_says_so() -> None:
    async with router() as rig, rig.client() as client:
        await rig.show(None)
        assert (await client.status()).state == "STARTING"
        for ask in (lambda: client.routing_table(timeout_s=0.1), lambda: client.dispatch(rig.rows(), layer=LAYER, timeout_s=0.1)):
            with pytest.raises(MoeError, match="no routing table yet"):
                await ask()


async def test_state_is_degraded_while_an_expert_has_no_copy() -> None:
    async with router() as rig, rig.client() as client:
        await rig.show(table(lambda layer, index: [] if index == 2 else one_copy_each(layer, index)))
        status = await client.status()
        assert (status.state, status.models[0].num_missing) == ("DEGRADED", 2)


async def test_a_draining_router_refuses_new_requests_and_still_tells_its_status() -> None:
    async with router() as rig, rig.client() as client:
        rig.is_draining = True
        with pytest.raises(NotReady, match="draining"):
            await client.dispatch(rig.rows(), layer=LAYER, timeout_s=0.1)
        assert (await client.status()).state == "DRAINING"


async def test_plan_tells_who_answered_each_choice(rig: RouterRig) -> None:
    async with rig.client() as client:
        plan = (await client.dispatch(rig.rows(3), layer=LAYER, report="plan")).report.plan
        counts = (await client.dispatch(rig.rows(3), layer=LAYER)).report
    assert counts.plan is None
    assert plan.expert_ids.shape == plan.outcomes.shape == (3, 2)
    assert np.all(plan.outcomes == pb.OUTCOME_EXACT)
    assert np.array_equal(np.array([int(version.hex(), 16) for version in plan.versions])[plan.version_index], plan.expert_ids)


# In chunks


def start_of(request: pb.DispatchRequest) -> pb.DispatchStreamRequest:
    start = pb.DispatchRequest()
    start.CopyFrom(request)
    for tensor in (start.hidden_states, start.top_k.expert_ids, start.top_k.weights):
        tensor.data = b""
    return pb.DispatchStreamRequest(start=start)


def body_of(request: pb.DispatchRequest) -> bytes:
    return request.hidden_states.data + request.top_k.expert_ids.data + request.top_k.weights.data


def chunk(data: bytes) -> pb.DispatchStreamRequest:
    return pb.DispatchStreamRequest(chunk=data)


async def streamed(channel: grpc.aio.Channel, messages: list[pb.DispatchStreamRequest], **metadata: str) -> tuple[pb.DispatchResponse, bytes]:
    found = (*AUTHORIZED, *metadata.items())
    parts = [part async for part in stub(channel).DispatchStream(iter(messages), timeout=10, metadata=found)]
    return parts[0].start, b"".join(part.chunk for part in parts[1:])


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_a_stream_carries_the_same_request_in_chunks_of_any_size(channel: grpc.aio.Channel, size: int) -> None:
    body = body_of(good())
    whole = await stub(channel).Dispatch(good(), timeout=10, metadata=AUTHORIZED)
    start, data = await streamed(channel, [start_of(good()), *(chunk(body[i : i + size]) for i in range(0, len(body), size))])
    assert data == whole.hidden_states.data
    assert start.report == whole.report


BAD_STREAMS: dict[str, tuple[list[pb.DispatchStreamRequest], str]] = {
    "empty": ([], "start"),
    "chunk first": ([chunk(b"x")], "start"),
    "ends early": ([start_of(good()), chunk(b"x" * 10)], "chunk"),
    "brings too much": ([start_of(good()), chunk(bytes(1000))], "chunk"),
    "empty chunk": ([start_of(good()), chunk(b"")], "chunk"),
    "second start": ([start_of(good()), start_of(good())], "chunk"),
    "data in the start": ([pb.DispatchStreamRequest(start=good())], "hidden_states.data"),
}


@pytest.mark.parametrize("name", BAD_STREAMS)
async def test_a_malformed_stream_ends_in_a_status_and_breaks_nothing(channel: grpc.aio.Channel, name: str) -> None:
    messages, field = BAD_STREAMS[name]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await streamed(channel, messages)
    assert caught.value.code() is INVALID
    assert details_of(caught.value, error_details_pb2.BadRequest).field_violations[0].field == field
    await still_serves(channel)


@pytest.mark.parametrize("shape", [[1 << 20, 1 << 20], [1 << 22, D]])
async def test_a_stream_allocates_nothing_beyond_what_was_admitted(channel: grpc.aio.Channel, shape: list[int]) -> None:
    start = start_of(good())
    start.start.hidden_states.shape[:] = shape
    with pytest.raises(grpc.aio.AioRpcError, match="over the limit") as caught:
        await streamed(channel, [start, chunk(b"x")], **{SIZE_KEY: "1000"})
    assert caught.value.code() is INVALID
    await still_serves(channel)
