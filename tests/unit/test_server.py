from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from cluster.core.errors import ConfigError, DeadlineExceeded, NotReady
from cluster.core.spec import AuthSpec
from cluster.core.status import ActorState
from kit.feed import CONTROL_TOKEN, control
from kit.link import running_actor, until
from kit.pipelines import NAME
from kit.router import TOKEN
from kit.router_process import FakeStore, RouterProcess, config, make, placed_on, running, store
from router_service.client import AsyncRouterClient
from router_service.health import SERVICE
from router_service.server import RouterSecrets

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_router_serves_from_the_first_table_on(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        assert (await rig.client.status()).state == "STARTING"
        assert await rig.health("") == SERVING
        assert await rig.health(SERVICE) == NOT_SERVING
        with pytest.raises(NotReady):
            await rig.dispatch(timeout_s=0.05)
        await rig.control.publish(placed_on(rig.actor))
        await rig.serving(1)
        reply = await rig.dispatch()
        assert reply.report.outcomes["exact"] == 6
        assert np.allclose(reply.hidden_states, 1, atol=0.02)
        assert await rig.health(f"model/{NAME}") == await rig.health(SERVICE) == SERVING
        status = await rig.client.status()
        assert (status.router_generation, status.controller_connected, status.links[0].state) == (5, True, "ready")
        assert rig.control.tokens == {f"Bearer {CONTROL_TOKEN.hex()}"}


async def test_report_says_where_it_listens_and_which_life_it_is(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.control.publish(placed_on(rig.actor))
        await rig.serving(1)
        seen = await rig.router.report()
        assert (seen.state, seen.node_id, seen.generation, seen.reason) == (ActorState.READY, "node-1", 5, "")
        await rig.dispatch()
        with await asyncio.to_thread(urlopen, f"http://127.0.0.1:{seen.metrics_port}/metrics") as page:
            text = page.read().decode()
        assert 'moe_requests_total{code="OK",layer="3",model="tiny"} 1.0' in text
        assert "moe_table_epoch 1.0" in text
        assert await rig.router.start("node-1") == seen


async def test_health_of_an_incomplete_model_is_not_serving(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.control.publish(placed_on(rig.actor, missing=(2,)))
        await rig.serving(1)
        assert (await rig.client.status()).state == "DEGRADED"
        assert await rig.health(f"model/{NAME}") == NOT_SERVING
        await rig.control.publish(placed_on(rig.actor, epoch=2))
        await rig.serving(2)
        assert await rig.health(f"model/{NAME}") == SERVING


async def test_a_model_whose_gates_come_later_is_served_from_then_on(tmp_path: Path) -> None:
    models = FakeStore()
    async with running(tmp_path, models) as rig:
        await rig.control.publish(placed_on(rig.actor))
        await rig.serving(1)
        with pytest.raises((NotReady, DeadlineExceeded), match="still loading"):
            await rig.dispatch(timeout_s=0.05)
        assert await rig.health(f"model/{NAME}") == NOT_SERVING
        models.manifests.update(store().manifests)
        assert (await rig.dispatch(timeout_s=20)).report.outcomes["exact"] == 6
        await rig.control.publish(placed_on(rig.actor, epoch=2))
        await rig.serving(2)
        assert models.loads == 1


async def test_the_router_keeps_its_table_while_the_controller_is_gone_and_follows_it_again(tmp_path: Path) -> None:
    async with running_actor() as actor:
        async with control() as feed:
            port = int(feed.address.rpartition(":")[2])
            hosted = make(config(tmp_path, feed.address))
            seen = await hosted.start("node-1")
            client = AsyncRouterClient(f"{seen.host}:{seen.port}", token=TOKEN, timeout_s=20.0)
            rig = RouterProcess(hosted, feed, actor, client, f"{seen.host}:{seen.port}", hosted._config)
            await feed.publish(placed_on(actor))
            await rig.serving(1)
        await until(lambda: not hosted._parts.feed.is_connected)
        assert (await rig.dispatch()).report.outcomes["exact"] == 6
        status = await client.status()
        assert not status.controller_connected
        assert (status.epoch, status.state) == (1, "SERVING")
        async with control(port) as again:
            await again.publish(placed_on(actor, epoch=3), controller_generation=2)
            await rig.serving(3)
            assert (again.watches[0].last_epoch, again.watches[0].router_generation) == (1, 5)
            await client.close()
            await hosted.stop(1.0)


async def test_a_lost_link_is_reported_and_loads_are_too(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.control.publish(placed_on(rig.actor))
        await rig.serving(1)
        await rig.dispatch()
        await until(lambda: any(report.loads for report in rig.control.reports))
        loads = next(report.loads for report in rig.control.reports if report.loads)
        assert sum(load.tokens for load in loads) == 6
        assert all(link.connected for report in rig.control.reports for link in report.links)
        await rig.actor.server.stop("gone", 0.1)
        await until(lambda: any(not link.connected and link.evidence for link in rig.control.reports[-1].links))


async def test_stopping_finishes_what_is_under_way_and_refuses_what_is_new(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.control.publish(placed_on(rig.actor))
        await rig.serving(1)
        rig.actor.compute.gate.clear()
        under_way = asyncio.create_task(rig.dispatch())
        await until(lambda: bool(rig.actor.compute.frames))
        stopping = asyncio.create_task(rig.router.stop(20.0))
        await until(lambda: rig.router._parts.is_draining)
        assert await rig.health("") == await rig.health(SERVICE) == NOT_SERVING
        with pytest.raises(NotReady, match="draining"):
            await rig.dispatch(timeout_s=0.05)
        assert (await rig.router.report()).state is ActorState.DRAINING
        rig.actor.compute.gate.set()
        assert (await under_way).report.outcomes["exact"] == 6
        await stopping
        assert (await rig.router.report()).state is ActorState.DEAD
        await rig.router.stop(1.0)


async def test_stopping_is_bounded_even_if_an_actor_never_answers(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.control.publish(placed_on(rig.actor))
        await rig.serving(1)
        rig.actor.compute.gate.clear()
        under_way = asyncio.create_task(rig.dispatch(timeout_s=5))
        await until(lambda: bool(rig.actor.compute.frames))
        async with asyncio.timeout(20):
            await rig.router.stop(0.1)
        under_way.cancel()
        await asyncio.wait([under_way])
        rig.actor.compute.gate.set()


async def test_a_restarted_router_listens_where_it_did_before(tmp_path: Path) -> None:
    settings = config(tmp_path, "127.0.0.1:1", drain_timeout_s=0.2)
    first, second, third = (make(settings) for _ in range(3))
    port = (await first.start("node-1")).port
    await first.stop(0.1)
    assert (await second.start("node-1")).port == port
    assert (await third.start("node-1")).port not in {port, 0}
    await third.stop(0.1)
    await second.stop(0.1)


async def test_a_restarted_router_waits_for_its_former_life_to_drain(tmp_path: Path) -> None:
    settings = config(tmp_path, "127.0.0.1:1")
    former, following = make(settings), make(settings)
    port = (await former.start("node-1")).port
    starting = asyncio.create_task(following.start("node-1"))
    await former.stop(0.1)
    assert (await starting).port == port
    await following.stop(0.1)


async def test_a_port_that_is_taken_is_refused_by_name(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        hosted = make(config(tmp_path, "127.0.0.1:1", port=taken.getsockname()[1]))
        with pytest.raises(ConfigError, match=r"cannot listen on .*router\.port"):
            await hosted.start("node-1")


async def test_a_router_without_any_token_does_not_start_open(tmp_path: Path) -> None:
    settings = config(tmp_path, "127.0.0.1:1")
    spec = settings.spec.model_copy(update={"auth": AuthSpec()})
    with pytest.raises(ConfigError, match=r"auth\.tokens"):
        await make(settings.model_copy(update={"spec": spec})).start("node-1")


@pytest.mark.parametrize("half", ["tls_cert", "tls_key"])
async def test_half_of_a_tls_pair_is_refused(tmp_path: Path, half: str) -> None:
    hosted = make(config(tmp_path, "127.0.0.1:1", **{half: tmp_path / "x.pem"}))
    with pytest.raises(ConfigError, match="belong together"):
        await hosted.start("node-1")


def test_secrets_are_not_printed() -> None:
    shown = repr(RouterSecrets(b"link-secret", b"control-token"))
    assert "link-secret" not in shown
    assert "control-token" not in shown
