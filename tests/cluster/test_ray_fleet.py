"""The Ray fleet keeps the fleet's contract, on the shared cluster of three nodes, with this process as its driver."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import ray

from cluster.control_service import bearer
from cluster.controller_actor import ControllerActor, ControllerSettings
from cluster.core.actor_config import ExpertActorConfig, RouterConfig
from cluster.core.ids import Incarnation
from cluster.core.spec import ActorsSpec, ClusterSpec, ModelSpec
from cluster.core.status import ActorState, FleetObservation
from cluster.local.cluster import LocalCluster
from cluster.ray_fleet import HostedClasses, RayFleet
from kit.control import make_spec
from kit.fleet_contract import GPUS, MANIFEST, FleetContract, report_of, state_of
from kit.hosted import UNSTARTABLE, HostedActor, HostedAgent, HostedRouter, make_fleet
from protos.moelastic.control.v1 import control_pb2 as pb
from protos.moelastic.control.v1 import control_pb2_grpc as pb_grpc

ROOT = Path(__file__).parents[2]
NAMESPACE = "contract"
CONTROL_TOKEN = b"c" * 32
LIMIT_S = 60.0
LOOK_S = 0.05
pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def ray_nodes(shared_cluster: LocalCluster) -> Iterator[None]:
    """A driver on a head without GPUs and two nodes with logical GPUs; what it starts finds the test kit too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(shared_cluster.state.token_path))
        paths = {"env_vars": {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}}
        ray.init(address=shared_cluster.state.gcs_address, runtime_env=paths, logging_level="warning", log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()


class RayRig:
    """Waiting looks again and again."""

    def __init__(self, folder: Path) -> None:
        classes = HostedClasses(HostedActor, HostedAgent, HostedRouter)
        self.store_dir, self.model_dir, self.bad_dir = folder / "store", folder / "model", folder / "none"
        self.fleet = RayFleet(
            namespace=NAMESPACE, classes=classes, link_secret=b"s" * 32, router_secrets="secrets", store_dir=self.store_dir, observe_timeout_s=2.0
        )
        self.model_dir.mkdir(parents=True, exist_ok=True)
        (self.model_dir / "manifest.json").write_text(MANIFEST.model_dump_json())
        self.generation = 0

    async def until(self, condition: Callable[[FleetObservation], bool]) -> FleetObservation:
        async with asyncio.timeout(LIMIT_S):
            while True:
                status = await self.fleet.observe()
                if condition(status):
                    return status
                await asyncio.sleep(LOOK_S)

    async def kill(self, incarnation: Incarnation) -> None:
        os.kill(report_of(await self.fleet.observe(), incarnation).pid, signal.SIGKILL)

    async def clear(self) -> None:
        status = await self.fleet.observe()
        await asyncio.gather(*(self.fleet.stop_actor(actor.incarnation, timeout_s=1.0) for actor in status.actors if actor.state is not ActorState.DEAD))
        await self.until(lambda status: all(actor.state is ActorState.DEAD for actor in status.actors))


@pytest.fixture(scope="module")
async def shared_rig(ray_nodes: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RayRig]:  # noqa: ARG001 - Ray must run
    rig = RayRig(tmp_path_factory.mktemp("fleet"))
    yield rig
    await rig.clear()
    await rig.fleet.stop_agents(timeout_s=10.0)
    left = [entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True) if entry["namespace"] == NAMESPACE]
    assert left == []
    await rig.fleet.close()


class TestRayFleet(FleetContract):
    @pytest.fixture
    async def rig(self, shared_rig: RayRig) -> AsyncIterator[RayRig]:
        yield shared_rig
        await shared_rig.clear()

    async def test_actor_that_cannot_start_is_dead_with_its_reason(self, rig: RayRig, node_id: str) -> None:
        incarnation = await self.start(rig, node_id, f"{UNSTARTABLE}-0")
        status = await rig.until(lambda status: state_of(status, incarnation) is ActorState.DEAD)
        reason = next(actor.reason for actor in status.actors if actor.incarnation == incarnation)
        assert "no such device" in reason

    async def test_hung_actor_is_unreachable_while_others_are_seen_and_stops_by_force(self, rig: RayRig, actor: Incarnation, node_id: str) -> None:
        other = await self.start(rig, node_id, "actor-1")
        status = await rig.until(lambda status: state_of(status, other) is ActorState.READY)
        pid = report_of(status, actor).pid
        os.kill(pid, signal.SIGSTOP)
        status = await rig.until(lambda status: state_of(status, actor) is ActorState.UNREACHABLE)
        assert state_of(status, other) is ActorState.READY
        await rig.fleet.stop_actor(actor, timeout_s=0.5)
        await rig.until(lambda status: state_of(status, actor) in (None, ActorState.DEAD))

    async def test_second_fleet_finds_what_the_first_started(self, rig: RayRig, actor: Incarnation) -> None:
        second = RayRig(rig.model_dir.parent)
        status = await second.until(lambda status: state_of(status, actor) is ActorState.READY)
        assert report_of(status, actor) == report_of(await rig.fleet.observe(), actor)
        await second.fleet.close()

    async def test_restarted_router_process_is_started_anew(self, rig: RayRig) -> None:
        status = await rig.fleet.observe()
        head = next(node.node_id for node in status.nodes if node.is_head)
        config = RouterConfig(router_id="router-0", spec=make_spec(), control_address="127.0.0.1:1", store_dir=rig.store_dir)
        await rig.fleet.start_router(config, node_id=head)
        status = await rig.until(lambda status: [router.state for router in status.routers] == [ActorState.READY])
        pid = status.routers[0].pid
        os.kill(pid, signal.SIGKILL)
        await rig.until(lambda status: [router.state for router in status.routers if router.pid != pid] == [ActorState.READY])
        await rig.fleet.stop_router("router-0", timeout_s=1.0)

    async def test_hung_router_is_unreachable_and_its_process_is_ended_by_force(self, rig: RayRig) -> None:
        status = await rig.fleet.observe()
        head = next(node.node_id for node in status.nodes if node.is_head)
        config = RouterConfig(router_id="router-0", spec=make_spec(), control_address="127.0.0.1:1", store_dir=rig.store_dir)
        await rig.fleet.start_router(config, node_id=head)
        status = await rig.until(lambda status: [router.state for router in status.routers] == [ActorState.READY])
        process = psutil.Process(status.routers[0].pid)
        os.kill(process.pid, signal.SIGSTOP)
        await rig.until(lambda status: [router.state for router in status.routers] == [ActorState.UNREACHABLE])
        await rig.fleet.stop_router("router-0", timeout_s=30.0)
        await rig.until(lambda status: all(router.state is ActorState.DEAD for router in status.routers))
        await rig.until(lambda _: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)

    async def start(self, rig: RayRig, node_id: str, actor_id: str) -> Incarnation:
        rig.generation += 1
        config = ExpertActorConfig(deployment="t", actor_id=actor_id, generation=rig.generation, num_slots=2, num_gpus=GPUS, store_dir=rig.store_dir)
        await rig.fleet.start_actor(config, node_id=node_id, num_gpus=GPUS, num_cpus=0.0)
        return config.incarnation


@pytest.mark.usefixtures("ray_nodes")
async def test_killed_controller_comes_back_by_itself_and_goes_on(tmp_path: Path) -> None:
    model_dir = tmp_path / "m"
    model_dir.mkdir()
    (model_dir / "manifest.json").write_text(MANIFEST.model_dump_json())
    model = ModelSpec(name="m", path=model_dir)
    spec = ClusterSpec(name="hosted", models=(model,), actors=ActorsSpec(count=2, slots_per_actor=6, num_gpus=GPUS))
    settings = ControllerSettings("hosted", "127.0.0.1", tmp_path / "state", tmp_path / "store", b"l" * 32, CONTROL_TOKEN, observe_timeout_s=2.0)
    options = {"name": "controller", "namespace": "hosted", "lifetime": "detached", "max_restarts": -1, "max_task_retries": -1, "num_cpus": 0}
    controller = ray.remote(ControllerActor).options(**options).remote(settings, make_fleet)
    address = await controller.start.remote()
    await controller.apply.remote(spec.model_dump_json())
    before = await until_status(controller, lambda status: status["state"] == "SERVING" and not status["message"])
    pid = await controller.__ray_call__.remote(lambda _: os.getpid())
    os.kill(pid, signal.SIGKILL)
    after = await until_served_again(address, above=before["controller_generation"])  # nobody calls the actor: it must come back by itself
    assert [(actor.actor_id, actor.generation) for actor in after.actors] == [(actor["actor_id"], actor["generation"]) for actor in before["actors"]]
    assert after.epoch > before["epoch"]
    assert await controller.start.remote() == address
    await controller.down.remote(timeout_s=30.0)
    left = [entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True) if entry["namespace"] == "hosted"]
    assert left == ["controller"]
    ray.kill(controller)


async def until_status(controller: Any, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    async with asyncio.timeout(LIMIT_S):
        while True:
            status: dict[str, Any] = json.loads(await controller.status_json.remote())
            if condition(status):
                return status
            await asyncio.sleep(LOOK_S)


async def until_served_again(address: str, *, above: int) -> pb.GetClusterStatusResponse:
    """Ask the control service, as a router would, until a controller of a higher generation serves."""
    metadata = (("authorization", bearer(CONTROL_TOKEN)),)
    async with asyncio.timeout(LIMIT_S), grpc.aio.insecure_channel(address) as channel:
        while True:
            call = pb_grpc.ControlServiceStub(channel).GetClusterStatus(pb.GetClusterStatusRequest(), metadata=metadata, wait_for_ready=True)
            with contextlib.suppress(grpc.aio.AioRpcError):
                status = await call
                if status.controller_generation > above and status.state == "SERVING":
                    return status
            await asyncio.sleep(LOOK_S)
