from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
import torch

from cluster.core.errors import (
    ConfigError,
    DeadlineExceeded,
    ExpertUnavailable,
    InvalidRequest,
    NotFound,
    NotReady,
    Overloaded,
    ProtocolMismatch,
    Unauthenticated,
)
from kit.link import until
from kit.pipelines import D, call, expected
from kit.router import LAYER, MIB, TOKEN, EchoPipeline, RouterRig, router
from protos.moelastic.router.v1 import router_pb2 as pb
from protos.moelastic.router.v1 import router_pb2_grpc
from router_service.client import AsyncRouterClient, RouterClient
from router_service.client_request import FRAMING_BYTES, DispatchMessages, ReplyChunks
from router_service.core.layer_call import LayerCall, LayerReply
from router_service.wire import tensor_message


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Tensors


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["fp32", "bf16"])
async def test_numpy_in_numpy_out_and_torch_in_torch_out_with_the_same_numbers(dtype: Any) -> None:
    rows = RouterRig.rows(6).astype(dtype)
    tensor = torch.from_numpy(rows) if dtype is np.float32 else torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
    async with router() as rig, rig.client() as client:
        from_numpy = (await client.dispatch(rows, layer=LAYER)).hidden_states
        from_torch = (await client.dispatch(tensor, layer=LAYER)).hidden_states
    assert isinstance(from_numpy, np.ndarray)
    assert from_numpy.dtype == rows.dtype
    assert from_torch.dtype is tensor.dtype
    assert from_torch.view(torch.uint8).numpy().tobytes() == from_numpy.tobytes()


async def test_a_reply_belongs_to_the_caller_and_can_be_written() -> None:
    async with router() as rig, rig.client() as client:
        rows = (await client.dispatch(rig.rows(), layer=LAYER)).hidden_states
        rows += 1
        (await client.dispatch(torch.from_numpy(rig.rows()), layer=LAYER)).hidden_states.add_(1)


async def test_the_callers_own_choice_is_used_in_any_integer_and_float_type() -> None:
    asked = call(1)
    ids = torch.tensor([[0, 5], [3, -1]] * 10)
    weights = torch.rand(20, 2).bfloat16()
    async with router() as rig, rig.client() as client:
        reply = await client.dispatch(asked.hidden_states, layer=LAYER, top_k=(ids, weights), report="plan")
    assert np.array_equal(reply.report.plan.expert_ids, ids.numpy())
    assert np.array_equal(reply.report.plan.weights[ids.numpy() >= 0], weights.float().numpy()[ids.numpy() >= 0])
    assert reply.report.outcomes["unused"] == 10


async def test_capacity_is_passed_on_and_counted() -> None:
    async with router() as rig, rig.client() as client:
        reply = await client.dispatch(rig.rows(40), layer=LAYER, overflow="drop", capacity_factor=0.5)
    assert reply.report.outcomes["dropped"] > 0
    assert sum(reply.report.outcomes.values()) == 80
    assert reply.report.degraded_tokens > 0


@pytest.mark.parametrize(
    ("hidden", "options", "field"),
    [
        ([[1.0]], {}, "hidden_states"),
        (np.zeros((1, D)), {}, "hidden_states"),
        (np.zeros((1, D), np.float32), {"layer": -1}, "layer"),
        (np.zeros((1, D), np.float32), {"fidelity": "best"}, "fidelity"),
        (np.zeros((1, D), np.float32), {"report": "all"}, "report"),
        (np.zeros((1, D), np.float32), {"overflow": "spill"}, "overflow"),
        (np.zeros((1, D), np.float32), {"top_k": (np.array([[1 << 32]]), np.ones((1, 1)))}, "top_k.expert_ids"),
        (np.zeros((1, D), np.float32), {"top_k": (np.array([[0.5]]), np.ones((1, 1)))}, "top_k.expert_ids"),
        (np.zeros((1, D), np.float32), {"top_k": ([[0]], np.ones((1, 1)))}, "top_k.expert_ids"),
        (np.zeros((1, D), np.float32), {"top_k": (np.array([[0]]), np.ones((1, 1))), "overflow": "drop"}, "top_k"),
        (np.zeros((1, D), np.float32), {"positions": np.array([-1])}, "gate.positions"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name_before_anything_is_sent(hidden: Any, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        DispatchMessages(hidden, {"layer": 0, **options})
    assert caught.value.field == field


# Import, threads, forks


def test_importing_the_client_loads_neither_ray_nor_torch() -> None:
    code = "import sys, router_service.client; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.split()
    assert "grpc" in loaded
    assert not {"ray", "torch", "transformers", "opentelemetry", "prometheus_client", "pydantic_settings"} & set(loaded)


async def test_one_blocking_client_serves_many_threads() -> None:
    async with router() as rig:
        with rig.blocking_client() as client, ThreadPoolExecutor(8) as threads:
            loop = asyncio.get_running_loop()
            replies = await asyncio.gather(*(loop.run_in_executor(threads, lambda n=n: client.dispatch(rig.rows(n), layer=LAYER)) for n in range(1, 25)))
            status = await loop.run_in_executor(threads, client.status)
            info = await loop.run_in_executor(threads, client.model)
            found = await loop.run_in_executor(threads, client.routing_table)
    assert [reply.hidden_states.shape for reply in replies] == [(n, D) for n in range(1, 25)]
    assert (status.requests_total, info.name, found.epoch) == (24, "tiny", 7)


def test_a_client_from_before_a_fork_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with RouterClient("127.0.0.1:1") as client:
        pid = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: pid + 1)
        with pytest.raises(ConfigError, match="before a fork"):
            client.status()


@pytest.mark.parametrize("settings", [{"timeout_s": 0}, {"max_message_bytes": 0}])
def test_limits_of_zero_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        AsyncRouterClient("127.0.0.1:1", **settings)


# Time


async def test_every_call_has_a_deadline() -> None:
    seen: dict[str, float | None] = {}

    class Watching(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation: Any, details: Any) -> Any:
            assert await continuation(details) is not None

            async def watched(_: Any, context: Any) -> None:
                await context.read()
                seen[details.method.rpartition("/")[2]] = context.time_remaining()
                await context.abort(grpc.StatusCode.NOT_FOUND, "nothing here")

            return grpc.stream_unary_rpc_method_handler(watched)

    server = grpc.aio.server(interceptors=[Watching()])
    router_pb2_grpc.add_RouterServiceServicer_to_server(router_pb2_grpc.RouterServiceServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with AsyncRouterClient(f"127.0.0.1:{port}", timeout_s=5.0, max_message_bytes=FRAMING_BYTES * 2) as client:
        small, large = RouterRig.rows(1), RouterRig.rows(1000)
        for ask in (client.status, client.model, client.routing_table, lambda: client.dispatch(small, layer=0), lambda: client.dispatch(large, layer=0)):
            with pytest.raises(NotFound, match="nothing here"):
                await ask()
    await server.stop(0)
    assert set(seen) == {method.name for method in pb.DESCRIPTOR.services_by_name["RouterService"].methods}
    assert all(left_s is not None and left_s < 6.0 for left_s in seen.values())


async def test_a_router_that_does_not_answer_in_time_is_deadline_exceeded() -> None:
    async with router() as rig, rig.client() as client:
        rig.setup.lanes.hold()
        with pytest.raises(DeadlineExceeded):
            await client.dispatch(rig.rows(), layer=LAYER, timeout_s=0.05)
        await until(lambda: rig.servicer.num_in_flight == 0)
        rig.setup.lanes.let_go()


async def test_a_router_that_starts_late_is_waited_for() -> None:
    port = free_port()
    async with AsyncRouterClient(f"127.0.0.1:{port}", token=TOKEN, timeout_s=20.0) as client:
        asking = asyncio.create_task(client.dispatch(RouterRig.rows(), layer=LAYER))
        await until(lambda: client._channels)
        async with router(port=port):
            assert (await asking).report.outcomes["exact"] == 10


async def test_a_router_that_is_restarted_under_a_request_is_survived() -> None:
    port = free_port()
    async with AsyncRouterClient(f"127.0.0.1:{port}", token=TOKEN, timeout_s=20.0) as client:
        async with router(port=port) as first:
            first.setup.lanes.hold()
            asking = asyncio.create_task(client.dispatch(first.rows(), layer=LAYER))
            await first.setup.lanes.wait_until_submitted(1)
        async with router(port=port) as second:
            assert (await asking).report.outcomes["exact"] == 10
            assert second.counters.requests_total == 1


async def test_nobody_there_is_not_ready_and_names_the_address() -> None:
    address = f"127.0.0.1:{free_port()}"
    async with AsyncRouterClient(address, timeout_s=0.2) as client:
        with pytest.raises((NotReady, DeadlineExceeded), match=address):
            await client.status()
    blocking = RouterClient(address, timeout_s=0.2)
    with pytest.raises((NotReady, DeadlineExceeded), match=address):
        await asyncio.to_thread(blocking.status)
    blocking.close()


class Recovering(EchoPipeline):
    """Fails so many times, then answers."""

    def __init__(self, error: Exception, times: int) -> None:
        super().__init__()
        self._failures = [error] * times

    async def run(self, call: LayerCall) -> LayerReply:
        self.error = self._failures.pop() if self._failures else None
        return await super().run(call)


@pytest.mark.parametrize(
    "error", [ExpertUnavailable("gone", failed_rows=(0,), retry_after_s=0.01), Overloaded("full", retry_after_s=0.01), NotReady("loading")]
)
async def test_what_time_cures_is_tried_again(error: Exception) -> None:
    pipeline = Recovering(error, 2)
    async with router(pipeline) as rig, rig.client() as client:
        reply = await client.dispatch(rig.rows(), layer=LAYER)
        assert reply.hidden_states.shape == (5, D)
        blocking = rig.blocking_client()
        assert (await asyncio.to_thread(blocking.dispatch, rig.rows(), layer=LAYER)).report.epoch == 7
        blocking.close()
    assert len(pipeline.calls) == 4


async def test_a_wrong_token_is_unauthenticated_and_not_tried_again() -> None:
    async with router() as rig, rig.client(token=TOKEN[::-1]) as client:
        with pytest.raises(Unauthenticated):
            await client.dispatch(rig.rows(), layer=LAYER)
        assert rig.counters.requests_failed == 1


# Size


async def test_one_byte_over_the_limit_is_refused_by_name_and_streamed_by_the_client() -> None:
    rows = RouterRig.rows(400)
    message = pb.DispatchRequest(model="tiny", layer=LAYER, hidden_states=tensor_message(rows)).SerializeToString()
    metadata = (("authorization", f"Bearer {TOKEN}"),)
    async with router(max_message_bytes=len(message)) as rig, grpc.aio.insecure_channel(rig.address) as channel:
        dispatch = channel.unary_unary("/moelastic.router.v1.RouterService/Dispatch", None, pb.DispatchResponse.FromString)
        whole = await dispatch(message, metadata=metadata, timeout=10)
    async with router(max_message_bytes=len(message) - 1) as rig, grpc.aio.insecure_channel(rig.address) as channel:
        dispatch = channel.unary_unary("/moelastic.router.v1.RouterService/Dispatch", None, pb.DispatchResponse.FromString)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await dispatch(message, metadata=metadata, timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(len(message) - 1) in caught.value.details()
        async with rig.client(max_message_bytes=len(message) - 1) as client:
            reply = await client.dispatch(rows, model="tiny", layer=LAYER)
    assert reply.hidden_states.tobytes() == whole.hidden_states.data


@pytest.mark.parametrize("library", ["numpy", "torch"])
async def test_large_tensors_travel_in_chunks_and_give_the_same_numbers(library: str) -> None:
    asked = call(2, num_tokens=3000, dtype=torch.float32)
    rows = asked.hidden_states if library == "torch" else asked.hidden_states.numpy()
    async with router(max_message_bytes=128 << 10) as rig:
        want = expected(asked, rig.setup.model)
        async with rig.client() as client:
            reply = await client.dispatch(rows, layer=LAYER)
            assert torch.equal(torch.as_tensor(reply.hidden_states), want)
        with rig.blocking_client(max_message_bytes=128 << 10) as blocking:
            reply = await asyncio.to_thread(blocking.dispatch, rows, layer=LAYER, report="plan")
            assert torch.equal(torch.as_tensor(reply.hidden_states), want)
            assert reply.report.plan.expert_ids.shape == (3000, 2)


async def test_a_routers_smaller_limit_is_learned_once() -> None:
    async with router(max_message_bytes=64 << 10) as rig, rig.client() as client:
        for _ in range(3):
            await client.dispatch(rig.rows(3000), layer=LAYER)
        assert rig.counters.requests_failed == 1


async def test_a_reply_too_large_for_one_message_comes_in_chunks() -> None:
    rows = RouterRig.rows(600)
    async with router(max_message_bytes=48 << 10) as rig, rig.client() as client:
        reply = await client.dispatch(rows, layer=LAYER, report="plan")
        assert reply.report.plan.weights.shape == (600, 2)
        assert reply.hidden_states.shape == rows.shape


async def test_more_than_the_router_may_ever_hold_is_refused_with_the_limit() -> None:
    async with router(max_message_bytes=MIB, max_inflight_bytes=2 * MIB) as rig, rig.client() as client:
        with pytest.raises(Overloaded, match=r"over the limit of 2097152 \(router\.max_inflight_bytes\)"):
            await client.dispatch(rig.rows(60_000), layer=LAYER)
        await client.dispatch(rig.rows(), layer=LAYER)


# Answers that do not fit


class Transposing(EchoPipeline):
    async def run(self, call: LayerCall) -> LayerReply:
        reply = await super().run(call)
        return LayerReply(reply.hidden_states.t().contiguous(), reply.report)


@pytest.mark.parametrize("limit", [4 * MIB, 8 << 10])
async def test_an_answer_of_another_shape_is_refused(limit: int) -> None:
    async with router(Transposing(), max_message_bytes=limit) as rig, rig.client(max_message_bytes=limit) as client:
        with pytest.raises(ProtocolMismatch):
            await client.dispatch(rig.rows(300), layer=LAYER)


def test_a_streamed_reply_must_be_a_start_and_as_many_bytes_as_were_sent() -> None:
    messages = DispatchMessages(RouterRig.rows(2), {"layer": 0})
    start = pb.DispatchStreamResponse(start=pb.DispatchResponse(hidden_states=messages.request.hidden_states))
    for parts in ([pb.DispatchStreamResponse(chunk=b"x")], [start, start], [start, pb.DispatchStreamResponse(chunk=bytes(1000))], [start], []):
        chunks = ReplyChunks(messages)
        with pytest.raises(ProtocolMismatch):
            take_all(chunks, parts)


def take_all(chunks: ReplyChunks, parts: list[pb.DispatchStreamResponse]) -> None:
    for part in parts:
        chunks.take(part)
    chunks.reply()


def test_threads_of_closed_clients_are_gone() -> None:
    before = threading.active_count()
    for _ in range(3):
        RouterClient("127.0.0.1:1").close()
    assert threading.active_count() <= before + 1
