from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.core.errors import ConfigError, MessageTooLarge, Overloaded, Unauthenticated
from kit.link import until
from kit.router import LAYER, MIB, TOKEN, EchoPipeline, RouterRig, router
from protos.moelastic.router.v1 import router_pb2 as pb
from protos.moelastic.router.v1 import router_pb2_grpc
from router_service.admission import ByteBudget, RequestLimit
from router_service.auth import Tenants
from router_service.caller import tenant_of_call
from router_service.wire import SIZE_KEY, tensor_message

DISPATCH = "/moelastic.router.v1.RouterService/Dispatch"
AUTHORIZED = (("authorization", f"Bearer {TOKEN}"),)


# Byte budget, by itself


async def test_bytes_are_held_until_released_and_never_twice() -> None:
    budget = ByteBudget(100, name="b")
    lease = await budget.acquire(60, timeout_s=0)
    assert budget.held_bytes == 60
    lease.shrink(10)
    assert budget.held_bytes == 10
    lease.shrink(50)
    lease.release()
    lease.release()
    assert budget.held_bytes == 0


async def test_who_comes_first_is_served_first_so_that_small_calls_never_starve_a_large_one() -> None:
    budget = ByteBudget(100, name="b")
    first = await budget.acquire(60, timeout_s=0)
    order: list[str] = []

    async def wait(name: str, num_bytes: int) -> None:
        lease = await budget.acquire(num_bytes, timeout_s=10)
        order.append(name)
        lease.release()

    large = asyncio.create_task(wait("large", 100))
    await until(lambda: budget.num_waiting == 1)
    small = asyncio.create_task(wait("small", 10))
    await until(lambda: budget.num_waiting == 2)
    first.release()
    await asyncio.gather(large, small)
    assert order == ["large", "small"]
    assert budget.held_bytes == 0


async def test_bytes_that_do_not_come_free_in_time_are_refused_with_the_limit() -> None:
    budget = ByteBudget(100, name="router.max_inflight_bytes")
    lease = await budget.acquire(100, timeout_s=0)
    with pytest.raises(Overloaded, match=r"router\.max_inflight_bytes = 100"):
        await budget.acquire(1, timeout_s=0.01)
    assert (budget.num_waiting, budget.held_bytes) == (0, 100)
    lease.release()
    assert budget.held_bytes == 0


async def test_what_can_never_fit_is_refused_at_once() -> None:
    with pytest.raises(MessageTooLarge, match="101 bytes can never fit"):
        await ByteBudget(100, name="b").acquire(101, timeout_s=10)


async def test_the_queue_for_bytes_is_bounded() -> None:
    budget = ByteBudget(10, name="b", max_waiting=1)
    lease = await budget.acquire(10, timeout_s=0)
    waiter = asyncio.create_task(budget.acquire(10, timeout_s=10))
    await until(lambda: budget.num_waiting == 1)
    with pytest.raises(Overloaded, match="too many calls wait"):
        await budget.acquire(1, timeout_s=10)
    lease.release()
    (await waiter).release()


async def test_a_cancelled_waiter_leaves_nothing_behind_whenever_it_is_cancelled() -> None:
    budget = ByteBudget(10, name="b")
    lease = await budget.acquire(10, timeout_s=0)
    early = asyncio.create_task(budget.acquire(10, timeout_s=10))
    late = asyncio.create_task(budget.acquire(10, timeout_s=10))
    following = asyncio.create_task(budget.acquire(10, timeout_s=10))
    await until(lambda: budget.num_waiting == 3)
    early.cancel()
    lease.release()
    late.cancel()
    await asyncio.wait([early, late])
    held = await following
    assert (budget.num_waiting, budget.held_bytes) == (0, 10)
    held.release()
    assert budget.held_bytes == 0


def test_one_request_more_than_the_limit_is_refused() -> None:
    limit = RequestLimit(1)
    limit.enter()
    with pytest.raises(Overloaded, match=r"router\.max_concurrent_requests = 1"):
        limit.enter()
    limit.leave()
    limit.enter()


# Tokens


def test_tokens_are_read_from_files_without_their_line_end(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    assert Tenants.from_files({"a": path}).tenant_of(f"Bearer {TOKEN}") == "a"


def test_a_token_file_that_others_can_read_is_warned_about_and_not_printed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        Tenants.from_files({"a": path})
    assert "chmod 600" in caplog.text
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(("content", "what"), [(None, "cannot read"), (b"short", "at least 16"), (b"", "at least 16"), (b"x" * 5000, "more than 4096")])
def test_a_token_file_that_cannot_be_used_is_refused_by_name(tmp_path: Path, content: bytes | None, what: str) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"auth\.tokens\.a: .*{what}"):
        Tenants.from_files({"a": path})


def test_two_tenants_cannot_share_a_token() -> None:
    with pytest.raises(ConfigError, match="another tenant has the same token"):
        Tenants({"a": TOKEN.encode(), "b": TOKEN.encode()})


@pytest.mark.parametrize("offered", [None, "", TOKEN, f"Basic {TOKEN}", "Bearer ", f"Bearer {TOKEN}x", "Bearer \N{GREEK SMALL LETTER ALPHA}" * 9])
def test_anything_but_the_token_is_refused_without_quoting_it(offered: str | None) -> None:
    with pytest.raises(Unauthenticated) as caught:
        Tenants({"a": TOKEN.encode()}).tenant_of(offered)
    assert TOKEN not in str(caught.value)


# Through a server


def request(num_rows: int = 1) -> pb.DispatchRequest:
    hidden = tensor_message(RouterRig.rows(num_rows))
    return pb.DispatchRequest(model="tiny", layer=LAYER, hidden_states=hidden)


def raw_dispatch(channel: grpc.aio.Channel) -> Any:
    return channel.unary_unary(DISPATCH, None, pb.DispatchResponse.FromString)


async def test_every_method_of_the_router_asks_for_a_token() -> None:
    async with router() as rig, grpc.aio.insecure_channel(rig.address) as channel:
        for name, method in pb.DESCRIPTOR.services_by_name["RouterService"].methods_by_name.items():
            make = channel.stream_stream if method.client_streaming else channel.unary_unary
            call = make(f"/moelastic.router.v1.RouterService/{name}")
            answer = call(iter([b""])).read() if method.client_streaming else call(b"")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await answer
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, name
        assert rig.counters.requests_failed == 5


async def test_reflection_asks_for_a_token_and_health_does_not() -> None:
    async with router(has_reflection=True) as rig, grpc.aio.insecure_channel(rig.address) as channel:
        call = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(iter([b""])).read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_each_token_is_its_own_tenant() -> None:
    seen: list[str] = []

    class Watching(EchoPipeline):
        async def run(self, call: Any) -> Any:
            seen.append(tenant_of_call.get())
            return await super().run(call)

    tokens = {"a": "a" * 20, "b": "b" * 20}
    async with router(Watching(), tokens=tokens) as rig:
        for token in ("b" * 20, "a" * 20):
            async with rig.client(token=token) as client:
                await client.dispatch(rig.rows(), layer=LAYER)
    assert seen == ["b", "a"]


async def test_without_auth_everyone_may_call() -> None:
    async with router(tokens={}) as rig, rig.client(token=None) as client:
        assert (await client.status()).state == "SERVING"


async def test_a_call_waits_for_its_bytes_and_then_succeeds() -> None:
    async with router(max_inflight_bytes=4 * MIB, max_wait_s=20.0) as rig, rig.client() as client:
        budget = rig.front.admission.budget
        lease = await budget.acquire(4 * MIB, timeout_s=0)
        call = asyncio.create_task(client.dispatch(rig.rows(), layer=LAYER))
        await until(lambda: budget.num_waiting == 1)
        lease.release()
        assert (await call).report.outcomes["exact"] == 10
        await until(lambda: budget.held_bytes == 0)


async def test_a_waiting_call_ends_overloaded_with_the_time_to_come_back() -> None:
    async with router(max_inflight_bytes=4 * MIB, max_wait_s=0.02) as rig, rig.client() as client:
        lease = await rig.front.admission.budget.acquire(4 * MIB, timeout_s=0)
        with pytest.raises(Overloaded) as caught:
            await client.dispatch(rig.rows(), layer=LAYER, timeout_s=0.15)
        assert caught.value.retry_after_s > 0
        lease.release()
        assert (await client.dispatch(rig.rows(), layer=LAYER)).report.outcomes["exact"] == 10


async def test_an_undeclared_message_counts_as_the_limit_until_it_is_read() -> None:
    pipeline = EchoPipeline()
    held: list[int] = []

    class Looking(EchoPipeline):
        async def run(self, call: Any) -> Any:
            held.append(rig.front.admission.budget.held_bytes)
            return await pipeline.run(call)

    async with router(Looking(), max_message_bytes=MIB, max_inflight_bytes=MIB) as rig, grpc.aio.insecure_channel(rig.address) as channel:
        payload = request().SerializeToString()
        lease = await rig.front.admission.budget.acquire(1, timeout_s=0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw_dispatch(channel)(payload, metadata=AUTHORIZED, timeout=5)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await raw_dispatch(channel)(payload, metadata=(*AUTHORIZED, (SIZE_KEY, str(len(payload)))), timeout=5)
        lease.release()
        await raw_dispatch(channel)(payload, metadata=AUTHORIZED, timeout=5)
    assert held == [1 + len(payload), len(payload)]


@pytest.mark.parametrize("declared", ["-1", "1e3", "ten", "", "9" * 16])
async def test_a_declared_size_that_is_no_number_is_refused_by_name(declared: str) -> None:
    async with router() as rig, grpc.aio.insecure_channel(rig.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw_dispatch(channel)(request().SerializeToString(), metadata=(*AUTHORIZED, (SIZE_KEY, declared)), timeout=5)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert SIZE_KEY in caught.value.details()


async def test_a_message_larger_than_declared_is_refused() -> None:
    async with router() as rig, grpc.aio.insecure_channel(rig.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="declare the true size") as caught:
            await raw_dispatch(channel)(request(100).SerializeToString(), metadata=(*AUTHORIZED, (SIZE_KEY, "10")), timeout=5)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await until(lambda: rig.front.admission.budget.held_bytes == 0)


async def test_a_declared_size_over_the_limit_is_refused_before_it_is_sent() -> None:
    async with router(max_message_bytes=MIB) as rig, grpc.aio.insecure_channel(rig.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match=r"over the limit of 1048576.*DispatchStream") as caught:
            await raw_dispatch(channel)(b"", metadata=(*AUTHORIZED, (SIZE_KEY, str(MIB + 1))), timeout=5)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_bytes_that_are_no_request_end_in_a_status_of_ours() -> None:
    async with router() as rig, grpc.aio.insecure_channel(rig.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="check the client's protos") as caught:
            await raw_dispatch(channel)(b"\xff\xff\xff", metadata=AUTHORIZED, timeout=5)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_message_that_never_comes_gives_its_bytes_back() -> None:
    async with router(max_inflight_bytes=4 * MIB, message_timeout_s=0.05) as rig, grpc.aio.insecure_channel(rig.address) as channel:
        call = channel.stream_unary(DISPATCH)(metadata=AUTHORIZED, timeout=10)
        with pytest.raises(grpc.aio.AioRpcError, match="no message came for") as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: rig.front.admission.budget.held_bytes == 0)
        async with rig.client() as client:
            await client.dispatch(rig.rows(), layer=LAYER)


async def test_a_stream_that_pauses_too_long_gives_its_bytes_back() -> None:
    async with router(max_inflight_bytes=4 * MIB, idle_timeout_s=0.05) as rig, grpc.aio.insecure_channel(rig.address) as channel:
        call = router_pb2_grpc.RouterServiceStub(channel).DispatchStream(metadata=AUTHORIZED, timeout=10)
        start = request()
        start.hidden_states.data = b""
        await call.write(pb.DispatchStreamRequest(start=start))
        with pytest.raises(grpc.aio.AioRpcError, match="no message came for") as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: rig.front.admission.budget.held_bytes == 0)


async def test_a_caller_that_goes_away_while_waiting_leaves_nothing_behind() -> None:
    async with router(max_inflight_bytes=4 * MIB, max_wait_s=30.0) as rig, grpc.aio.insecure_channel(rig.address) as channel:
        budget = rig.front.admission.budget
        lease = await budget.acquire(4 * MIB, timeout_s=0)
        call = raw_dispatch(channel)(request().SerializeToString(), metadata=AUTHORIZED, timeout=20)
        sending = asyncio.ensure_future(call)
        await until(lambda: budget.num_waiting == 1)
        sending.cancel()
        await until(lambda: budget.num_waiting == 0)
        lease.release()
        assert budget.held_bytes == 0


async def test_more_requests_than_the_limit_are_refused_and_status_is_not_counted_among_them() -> None:
    async with router(max_concurrent_requests=1) as rig, rig.client() as client:
        rig.setup.lanes.hold()
        first = asyncio.create_task(client.dispatch(rig.rows(), layer=LAYER))
        await rig.setup.lanes.wait_until_submitted(1)
        with pytest.raises(Overloaded, match="max_concurrent_requests = 1"):
            await client.dispatch(rig.rows(), layer=LAYER, timeout_s=0.1)
        assert (await client.status()).requests_failed >= 1
        rig.setup.lanes.let_go()
        await first
        await client.dispatch(rig.rows(), layer=LAYER)


async def test_health_is_answered_while_the_byte_budget_is_full() -> None:
    async with router(max_inflight_bytes=4 * MIB) as rig, grpc.aio.insecure_channel(rig.address) as channel:
        lease = await rig.front.admission.budget.acquire(4 * MIB, timeout_s=0)
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        lease.release()


async def test_compressed_messages_are_refused() -> None:
    async with router() as rig, grpc.aio.insecure_channel(rig.address, compression=grpc.Compression.Gzip) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw_dispatch(channel)(request(1000).SerializeToString(), metadata=AUTHORIZED, timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_with_each_call_grpc_waits_once_for_all_methods_and_once_for_the_one_with_takers() -> None:
    async with router(has_reflection=True) as rig, rig.client() as client:
        await client.dispatch(rig.rows(), model=rig.model, layer=LAYER)
        waiting = [task.get_coro().__qualname__ for task in asyncio.all_tasks() if "_request" in task.get_coro().__qualname__]
        assert sorted(waiting) == ["AioServer._request_call", "AioServer._request_registered_call"]
