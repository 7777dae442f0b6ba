"""Callers without a token, without patience or without honesty: what they may hold is small, and others are served meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kit.link import until
from kit.router import LAYER, MIB, TOKEN, EchoPipeline, Ended, InProcess, RouterRig, router
from protos.moelastic.router.v1 import router_pb2 as pb
from protos.moelastic.router.v1 import router_pb2_grpc
from router_service.admission import Liars
from router_service.interceptors import UNPROVEN_READS
from router_service.wire import SIZE_KEY, tensor_message

DISPATCH = "/moelastic.router.v1.RouterService/Dispatch"
CHECK = "/grpc.health.v1.Health/Check"
SERVING = health_pb2.HealthCheckResponse.SERVING
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def authorized(declared: int | None = None, token: str = TOKEN) -> tuple[tuple[str, str], ...]:
    size = () if declared is None else ((SIZE_KEY, str(declared)),)
    return (("authorization", f"Bearer {token}"), *size)


def payload(num_rows: int = 1) -> bytes:
    return pb.DispatchRequest(model="tiny", layer=LAYER, hidden_states=tensor_message(RouterRig.rows(num_rows))).SerializeToString()


async def code_of(call: Any) -> grpc.StatusCode:
    """How a call ends."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def check(channel: grpc.aio.Channel, service: str = "") -> grpc.StatusCode:
    return await code_of(health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=10))


# Health, which is open to everyone


async def test_watchers_of_health_are_bounded_and_take_no_place_from_probes_or_requests() -> None:
    async with router(max_health_watches=2, max_health_checks=1, max_concurrent_requests=1) as rig, grpc.aio.insecure_channel(rig.address) as channel:
        watches = [health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=20) for _ in range(2)]
        assert [(await watch.read()).status for watch in watches] == [SERVING, SERVING]
        further = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=10)
        assert await code_of(further.read()) is EXHAUSTED
        assert await check(channel) is grpc.StatusCode.OK
        async with rig.client() as client:
            await client.dispatch(rig.rows(), layer=LAYER)
        watches[0].cancel()
        await until(lambda: rig.front.admission.door("/grpc.health.v1.Health/Watch").places.count == 1)
        again = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=10)
        assert (await again.read()).status == SERVING
        for watch in (again, watches[1]):
            watch.cancel()


async def test_a_probe_that_sends_nothing_holds_its_place_for_a_moment_only() -> None:
    async with router(max_health_checks=1, health_timeout_s=0.2, message_timeout_s=60.0) as rig, grpc.aio.insecure_channel(rig.address) as channel:
        silent = channel.stream_unary(CHECK)(timeout=20)
        door = rig.front.admission.door(CHECK)
        await until(lambda: door.places.count == 1)
        assert await check(channel) is EXHAUSTED
        assert await code_of(silent) is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await check(channel) is grpc.StatusCode.OK
        assert (door.places.count, door.budget.held_bytes, door.unproven.held_bytes) == (0, 0, 0)


async def test_a_probe_is_small_whatever_it_declares() -> None:
    async with router() as rig, grpc.aio.insecure_channel(rig.address) as channel:
        large = health_pb2.HealthCheckRequest(service="x" * 2000)
        for metadata in ((), ((SIZE_KEY, "2100"),), ((SIZE_KEY, "10"),)):
            code = await code_of(health_pb2_grpc.HealthStub(channel).Check(large, metadata=metadata, timeout=10))
            assert code in {EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT}
        assert await check(channel) is grpc.StatusCode.OK


# Declared sizes


async def test_who_declared_less_than_it_sent_counts_as_undeclared_from_then_on_and_others_do_not() -> None:
    tokens = {"liar": "l" * 20, "honest": "h" * 20}
    async with router(tokens=tokens, max_message_bytes=MIB, max_inflight_bytes=MIB, max_wait_s=0.02) as rig:
        lease = await rig.front.admission.budget.acquire(1, timeout_s=0)

        async def send(token: str, declared: int, num_rows: int = 1) -> grpc.StatusCode:
            async with grpc.aio.insecure_channel(rig.address) as channel:
                call = channel.unary_unary(DISPATCH, None, pb.DispatchResponse.FromString)
                return await code_of(call(payload(num_rows), metadata=authorized(declared, token), timeout=10))

        size = len(payload())
        assert await send("l" * 20, size) is grpc.StatusCode.OK
        assert await send("l" * 20, 10, num_rows=100) is grpc.StatusCode.INVALID_ARGUMENT
        assert await send("l" * 20, size) is EXHAUSTED
        assert await send("h" * 20, size) is grpc.StatusCode.OK
        lease.release()
        assert await send("l" * 20, size) is grpc.StatusCode.OK


async def test_a_stream_whose_message_is_larger_than_all_it_declared_is_refused_and_remembered() -> None:
    async with router() as rig, grpc.aio.insecure_channel(rig.address) as channel:
        call = router_pb2_grpc.RouterServiceStub(channel).DispatchStream(metadata=authorized(100), timeout=10)
        await call.write(pb.DispatchStreamRequest(chunk=bytes(1000)))
        assert await code_of(call.read()) is grpc.StatusCode.INVALID_ARGUMENT
        assert len(rig.front.admission.liars) == 1
        await until(lambda: rig.front.admission.budget.held_bytes == 0)


def test_the_memory_of_liars_is_bounded_and_keeps_the_latest() -> None:
    liars = Liars(limit=2)
    for caller in ("a", "b", "a", "c"):
        liars.add(caller)
    assert [caller in liars for caller in "abc"] == [True, False, True]
    assert len(liars) == 2


async def test_bytes_that_callers_could_send_undeclared_at_a_time_are_bounded() -> None:
    limits = {"max_concurrent_requests": 1024, "max_message_bytes": MIB, "max_inflight_bytes": MIB, "max_wait_s": 0.05}
    async with router(EchoPipeline(), **limits) as rig, grpc.aio.insecure_channel(rig.address) as channel:
        unproven = rig.front.admission.door(DISPATCH).unproven
        silent = [channel.stream_unary(DISPATCH)(metadata=authorized(1), timeout=20) for _ in range(UNPROVEN_READS)]
        await until(lambda: unproven.held_bytes == UNPROVEN_READS * (MIB - 1))
        send: Callable[..., Any] = channel.unary_unary(DISPATCH, None, pb.DispatchResponse.FromString)
        body = payload()
        assert await code_of(send(body, metadata=authorized(len(body)), timeout=10)) is EXHAUSTED
        for call in silent:
            call.cancel()
        await until(lambda: unproven.held_bytes == 0)
        assert await code_of(send(body, metadata=authorized(len(body)), timeout=10)) is grpc.StatusCode.OK


# The account


class TakesNothing(InProcess):
    """A call whose caller sends its messages and takes no reply."""

    def __init__(self, *messages: bytes) -> None:
        super().__init__()
        self._messages = list(messages)

    async def read(self) -> object:
        return self._messages.pop(0) if self._messages else grpc.aio.EOF

    async def write(self, _: object) -> None:
        await asyncio.Event().wait()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_reply_that_nobody_takes_is_one_request_in_the_account(*, is_stream: bool) -> None:
    start = pb.DispatchRequest.FromString(payload())
    data, start.hidden_states.data = start.hidden_states.data, b""
    parts = [pb.DispatchStreamRequest(start=start).SerializeToString(), pb.DispatchStreamRequest(chunk=data).SerializeToString()]
    async with router(EchoPipeline(), message_timeout_s=0.01) as rig:
        if is_stream:
            method = grpc.stream_stream_rpc_method_handler(rig.servicer.DispatchStream, pb.DispatchStreamRequest.FromString)
        else:
            method = grpc.unary_unary_rpc_method_handler(rig.servicer.Dispatch, pb.DispatchRequest.FromString)

        async def found(_: object) -> Any:
            return method

        details = _Details(f"{DISPATCH}Stream" if is_stream else DISPATCH, ())
        handler = await rig.front.admission.intercept_service(found, details)
        with pytest.raises(Ended) as ended:
            await handler.stream_stream(None, TakesNothing(*(parts if is_stream else [payload()])))
        assert ended.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert rig.counters.requests_total == 1
        assert rig.front.admission.budget.held_bytes == 0


class _Details(NamedTuple):
    method: str
    invocation_metadata: tuple[tuple[str, str], ...]
