"""Calls are taken in many at a time where grpcio is as it is known; elsewhere one at a time, by grpc.aio alone."""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest
from grpc._cython import cygrpc

from cluster.core.errors import MoeError, Overloaded
from kit.link import until
from kit.router import LAYER, EchoPipeline, router
from router_service import accepting
from router_service.accepting import MAX_WAITING
from router_service.client_errors import error_of
from router_service.core.layer_call import LayerCall, LayerReply
from router_service.interceptors import DISPATCH


class Holding(EchoPipeline):
    """Answers nobody before it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go = asyncio.Event()

    async def run(self, call: LayerCall) -> LayerReply:
        reply = await super().run(call)
        await self.may_go.wait()
        return reply


def takers() -> int:
    return sum(task.get_name() == "call" for task in asyncio.all_tasks())


def test_this_grpcio_is_as_it_is_known() -> None:
    assert accepting.is_known()


def test_a_grpcio_whose_parts_have_changed_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cygrpc, "_handle_rpc", lambda method_name, rpc_state: (method_name, rpc_state))
    assert not accepting.is_known()
    monkeypatch.delattr(cygrpc, "_handle_rpc")
    assert not accepting.is_known()


async def test_as_many_wait_for_calls_however_many_are_under_way_and_none_when_the_server_has_stopped() -> None:
    pipeline = Holding()
    async with router(pipeline) as rig, rig.client(timeout_s=20.0) as client:
        assert takers() == MAX_WAITING
        calls = [asyncio.create_task(client.dispatch(rig.rows(), model=rig.model, layer=LAYER)) for _ in range(20)]
        await until(lambda: len(pipeline.calls) == len(calls))
        assert MAX_WAITING < takers() <= MAX_WAITING + len(calls)
        pipeline.may_go.set()
        await asyncio.gather(*calls)
        await until(lambda: takers() == MAX_WAITING)
    assert takers() == 0


async def test_a_crowd_is_refused_with_the_time_to_wait_while_those_let_in_are_under_way() -> None:
    pipeline = Holding()
    async with router(pipeline, max_concurrent_requests=3) as rig, rig.client() as client:
        held = [asyncio.create_task(client.dispatch(rig.rows(), model=rig.model, layer=LAYER)) for _ in range(3)]
        await until(lambda: len(pipeline.calls) == len(held))
        refused = await asyncio.gather(*(_refusal(client._opened(), rig.token or "") for _ in range(60)))
        assert all(isinstance(error, Overloaded) and error.retry_after_s == 0.1 for error in refused)
        pipeline.may_go.set()
        await asyncio.gather(*held)


async def test_beyond_the_last_limit_the_transport_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router_service.front.BACKSTOP_FACTOR", 0)
    monkeypatch.setattr("router_service.front.BACKSTOP_CALLS", 4)
    pipeline = Holding()
    async with router(pipeline, max_concurrent_requests=64) as rig:
        rig.front._takers._num_calls = 4
        async with rig.client() as client:
            found = await asyncio.gather(*(_refusal(client._opened(), rig.token or "") for _ in range(3)))
        # grpc.aio's own limit counts what it has taken itself: one call at most.
        assert sum(isinstance(error, Overloaded) for error in found) >= 2
        assert not pipeline.calls


async def _refusal(channel: grpc.aio.Channel, token: str) -> MoeError:
    call = channel.unary_unary(DISPATCH, None, None)
    with pytest.raises(grpc.RpcError) as failure:
        await call(b"", metadata=(("authorization", f"Bearer {token}"),), timeout=20)
    return error_of(failure.value, address="")


async def test_a_grpcio_that_is_not_known_is_told_of_and_serves(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("router_service.accepting.is_known", lambda: False)
    with caplog.at_level(logging.WARNING):
        async with router(EchoPipeline()) as rig, rig.client() as client:
            rows = rig.rows()
            assert ((await client.dispatch(rows, model=rig.model, layer=LAYER)).hidden_states == rows).all()
            assert takers() == 0
    assert "calls are taken in one at a time" in caplog.text


async def test_a_call_that_does_not_end_holds_up_the_end_for_so_long_only(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(accepting, "END_S", 0.05)
    endless = asyncio.create_task(asyncio.Event().wait(), name="endless")
    with caplog.at_level(logging.WARNING):
        async with router(EchoPipeline()) as rig:
            rig.front._takers._tasks.add(endless)
    await asyncio.wait([endless])
    assert endless.cancelled()
    assert "1 calls did not end" in caplog.text


async def test_a_taker_that_is_lost_is_told_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async def lost(_: object) -> None:
        message = "the core is out of order"
        raise RuntimeError(message)

    async with router(EchoPipeline()) as rig:
        with caplog.at_level(logging.ERROR):
            monkeypatch.setattr(accepting.Takers, "_next", lost)
            rig.front._takers._wait_for_one()
            await until(lambda: "could not be taken" in caplog.text)
        monkeypatch.undo()
    assert "the core is out of order" in caplog.text
