"""The control service over a real socket: who may call, what routers are sent, what operators see."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from cluster.cluster_view import status_json
from cluster.control_service import ControlServer, bearer
from cluster.core.ids import Incarnation
from cluster.core.table_codec import from_proto
from kit.control import ControlRig
from protos.moelastic.control.v1 import control_pb2 as pb
from protos.moelastic.control.v1 import control_pb2_grpc as pb_grpc

TOKEN = b"\x07" * 32
TIMEOUT_S = 10.0


@dataclass
class Served:
    rig: ControlRig
    stub: pb_grpc.ControlServiceStub
    metadata: tuple[tuple[str, str], ...] = (("authorization", bearer(TOKEN)),)

    def watch(self, **fields: object) -> grpc.aio.UnaryStreamCall:
        return self.stub.WatchTable(pb.WatchTableRequest(router_id="router-0", **fields), metadata=self.metadata, timeout=TIMEOUT_S)

    async def status(self) -> pb.GetClusterStatusResponse:
        return await self.stub.GetClusterStatus(pb.GetClusterStatusRequest(), metadata=self.metadata, timeout=TIMEOUT_S)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    rig = ControlRig(tmp_path)
    server = ControlServer("127.0.0.1", 0)
    await server.start(rig.controller, TOKEN)
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield Served(rig, pb_grpc.ControlServiceStub(channel))
    await server.stop()


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer 00"),), (("authorization", bearer(b"\x08" * 32)),), (("authorization", ""),)])
async def test_no_call_is_answered_without_the_token(served: Served, metadata: tuple[tuple[str, str], ...]) -> None:
    served.metadata = metadata
    calls = (
        served.status(),
        served.stub.Apply(pb.ApplyRequest(spec_json="{}"), metadata=metadata, timeout=TIMEOUT_S),
        served.stub.ReportHealth(pb.ReportHealthRequest(router_id="router-0"), metadata=metadata, timeout=TIMEOUT_S),
        served.watch().read(),
    )
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert TOKEN.hex() not in str(caught.value.details())


async def test_watching_router_gets_the_table_then_every_newer_one_and_a_generation(served: Served) -> None:
    rig = served.rig
    await rig.deploy()
    stream = served.watch()
    first = await stream.read()
    assert from_proto(first) == rig.controller.table
    assert first.router_generation > max(incarnation.generation for incarnation in rig.fleet.actors)
    assert first.controller_generation == rig.controller.generation
    rig.fleet.kill_actor(rig.incarnation("actor-0"))
    await rig.step()
    second = await stream.read()
    assert second.epoch == first.epoch + 1
    assert from_proto(second) == rig.controller.table
    assert second.router_generation == first.router_generation
    stream.cancel()


async def test_router_that_waits_for_the_first_table_is_sent_it(served: Served) -> None:
    stream = served.watch()
    reading = asyncio.create_task(stream.read())
    await served.rig.deploy()
    assert (await reading).epoch > 0
    stream.cancel()


async def test_router_that_has_seen_a_higher_epoch_is_sent_a_still_higher_one(served: Served) -> None:
    await served.rig.deploy()
    stream = served.watch(router_generation=5, last_epoch=1000)
    message = await stream.read()
    assert (message.epoch, message.router_generation) == (1001, 5)
    stream.cancel()


async def test_status_is_one_view_with_goal_actors_slots_routers_and_decisions(served: Served) -> None:
    await served.rig.deploy()
    status = await served.status()
    assert (status.name, status.state, status.spec_revision, status.message) == ("test", "SERVING", 1, "")
    assert (status.num_copies_wanted, status.num_copies_ready) == (8, 8)
    assert [actor.actor_id for actor in status.actors] == [f"actor-{index}" for index in range(4)]
    assert {slot.state for actor in status.actors for slot in actor.slots} == {"ready"}
    assert [router.address for router in status.routers] == ["127.0.0.1:50051"]
    assert [model.name for model in status.models] == ["m"]
    assert sum(node.alive for node in status.nodes) == 5
    assert 0 < len(status.decisions) <= 50
    assert all(entry.reason for entry in status.decisions)


async def test_json_status_has_every_field_with_numbers_as_numbers(served: Served) -> None:
    await served.rig.deploy()
    status = json.loads(status_json(served.rig.controller))
    assert set(status) == {field.name for field in pb.GetClusterStatusResponse.DESCRIPTOR.fields}
    assert isinstance(status["epoch"], int)
    assert status["actors"][0]["slots"][0]["role"] == "ROLE_REPLICA"
    assert status["imports"] == []


async def test_lost_actor_is_told_with_its_reason(served: Served) -> None:
    rig = served.rig
    await rig.deploy()
    rig.fleet.kill_actor(rig.incarnation("actor-0"))
    await rig.step()
    status = await served.status()
    assert status.state == "DEGRADED"
    assert [(actor.state, actor.reason) for actor in status.actors if actor.actor_id == "actor-0"] == [("dead", "its process is gone")]
    assert "6 of 8 copies are ready" in status.message


async def test_applied_goal_is_recorded_and_its_revision_returned(served: Served) -> None:
    request = pb.ApplyRequest(spec_json=served.rig.spec.model_dump_json())
    reply = await served.stub.Apply(request, metadata=served.metadata, timeout=TIMEOUT_S)
    assert (reply.spec_revision, list(reply.differences)) == (1, [])
    assert served.rig.controller.store.goal() == served.rig.spec.model_dump_json()


@pytest.mark.parametrize(
    ("spec_json", "path"),
    [
        ("{", "spec"),
        ("{}", "models"),
        ('{"models": []}', "models"),
        ('{"models": [{"name": "m", "path": "/m", "replica": 2}]}', "models.0.replica"),
        ('{"models": [{"name": "m", "path": "/m"}], "router": {"port": 70000}}', "router.port"),
        ('{"models": [{"name": "m", "path": "/m", "replicas": 3}], "actors": {"count": 0}}', "actors.count"),
    ],
)
async def test_wrong_goal_is_refused_by_the_path_of_its_field(served: Served, spec_json: str, path: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.stub.Apply(pb.ApplyRequest(spec_json=spec_json), metadata=served.metadata, timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"{path}: " in str(caught.value.details())


async def test_health_report_with_a_lost_link_wakes_the_controller_and_tells_the_epoch(served: Served) -> None:
    rig = served.rig
    await rig.deploy()
    rig.controller._wake.clear()
    life: Incarnation = rig.incarnation("actor-1")
    report = pb.ReportHealthRequest(router_id="router-0", epoch=3, window_s=1.0)
    report.links.add(actor_id=life.actor_id, generation=life.generation, connected=False, evidence="reset")
    report.loads.add(model="m", layer=0, index=1, tokens=10)
    reply = await served.stub.ReportHealth(report, metadata=served.metadata, timeout=TIMEOUT_S)
    assert rig.controller.table is not None
    assert reply.epoch == rig.controller.table.epoch
    assert rig.controller._wake.is_set()


async def test_anonymous_health_report_is_refused(served: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.stub.ReportHealth(pb.ReportHealthRequest(), metadata=served.metadata, timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_taken_port_is_given_up_unless_it_was_asked_for() -> None:
    from cluster.core.errors import FleetError

    first = ControlServer("127.0.0.1", 0)
    second = ControlServer("127.0.0.1", first.port)
    assert second.port != first.port
    with pytest.raises(FleetError, match=f"control.port {first.port}"):
        ControlServer("127.0.0.1", first.port, fixed=True)
    await first.stop()
    await second.stop()
