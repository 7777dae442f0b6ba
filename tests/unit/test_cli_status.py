"""`moelastic status`: what it asks, what it shows, and what it says of what is gone."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from rich.console import Console

from cluster.cli.status_facts import Source, StatusFacts, gather, plain
from cluster.cli.status_view import gpu_troubles, show, view
from cluster.deploy.connection import Connection
from protos.moelastic.control.v1 import control_pb2 as control
from protos.moelastic.control.v1 import control_pb2_grpc as control_grpc
from protos.moelastic.router.v1 import router_pb2 as router
from protos.moelastic.router.v1 import router_pb2_grpc as router_grpc

DEAD = "127.0.0.1:1"
ROUTER = router.GetStatusResponse(
    state="SERVING",
    epoch=42,
    table_age_s=0.5,
    models=[router.ModelStatus(name="tiny", num_experts=2)],
    links=[router.LinkStatus(actor_id="actor-0", generation=1, address="10.0.0.1:5", state="ready", last_heard_age_s=0.2)],
    requests_total=1_000,
    requests_failed=1,
    uptime_s=90.0,
    latency_s_p50=0.006,
    latency_s_p99=0.03,
    tokens_per_s=1234.0,
    outcomes=router.RoutingReport(exact=999_999, shadow=1, unused=5),
)
TABLE = router.GetRoutingTableResponse(
    epoch=42,
    actors=[router.RoutingTableActor(actor_id="actor-0", generation=1, node_id="n1"), router.RoutingTableActor(actor_id="actor-1", generation=2, node_id="n2")],
    experts=[
        router.RoutingTableExpert(model="tiny", layer=0, index=0, replicas=[0], shadows=[1]),
        router.RoutingTableExpert(model="tiny", layer=0, index=1),
    ],
)
CONTROL = control.GetClusterStatusResponse(
    name="tiny",
    state="DEGRADED",
    epoch=43,
    observed_age_s=0.1,
    message="expert 0/1 has no copy",
    nodes=[
        control.NodeStatus(node_id="n2", name="node-2", alive=False, num_gpus=1, since_s=125.0),
        control.NodeStatus(node_id="n1", name="node-1", alive=True, num_gpus=2),
    ],
    actors=[
        control.ActorStatus(
            actor_id="actor-0",
            generation=1,
            state="ready",
            node_id="n1",
            num_slots=4,
            used_bytes=3 << 20,
            slots=[control.SlotStatus(model="tiny", layer=0, index=1, role=control.ROLE_REPLICA, state="loading")],
        )
    ],
    rates=[
        control.ExpertRate(model="tiny", layer=0, index=0, tokens_per_s=30.0),
        control.ExpertRate(model="tiny", layer=0, index=1, tokens_per_s=10.0),
    ],
    decisions=[
        control.DecisionRecord(sequence=number, unix_time_s=1e9, action="assume", target=f"0/{number}", reason="node-2 lost", epoch=43) for number in (8, 9)
    ],
)


def facts(**parts: object) -> StatusFacts:
    sources = {"router_source": Source("r:1", is_answering=True), "control_source": Source("c:1", is_answering=True)}
    views = {"router": plain(ROUTER), "table": plain(TABLE), "control": plain(CONTROL)}
    return StatusFacts(**({"name": "tiny"} | sources | views | parts))  # type: ignore[arg-type]


def shown(status: StatusFacts) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(view(status))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def row(text: str, *words: str) -> str:
    return next(line for line in text.splitlines() if all(word in line for word in words))


def test_the_headline_never_rounds_a_failure_or_a_degradation_away() -> None:
    headline = shown(facts()).splitlines()[0]
    for part in ("tiny   SERVING   epoch 42", "up 1.5 min", "1,234 tokens/s", "p50 6.0 ms", "p99 30.0 ms", "exact 99.99 %", "degraded 0.01 %", "failed 1/1000"):
        assert part in headline


def test_a_lost_expert_a_copy_on_its_way_and_a_dead_node_are_shown() -> None:
    text = shown(facts())
    assert "##########  75%  node-1/actor-0" in row(text, "node-2/actor-1")
    assert "loading on node-1/actor-0" in row(text, "LOST")
    assert "DEAD since 2.1 min" in row(text, "node-2", "DEAD")
    assert "1/4" in row(text, "node-1", "alive")
    assert "3.0 MiB" in row(text, "node-1", "alive")
    assert "goal: expert 0/1 has no copy" in text
    assert text.index("assume 0/8") < text.index("assume 0/9")


def test_gpus_are_shown_by_name_and_those_in_trouble_by_what_is_known_of_them() -> None:
    told = control.GetClusterStatusResponse()
    told.CopyFrom(CONTROL)
    fine, faulty = [told.nodes[1].gpus.add(index=index, device=f"cuda-{index}", uuid=f"GPU-{index}", name="H100") for index in range(2)]
    assert "2 (2 x H100)" in row(shown(facts(control=plain(told))), "node-1", "alive")
    assert list(gpu_troubles(plain(told))) == []
    faulty.last_xid, faulty.last_xid_unix_s = 13, 1e9
    ((place, said, is_out),) = gpu_troubles(plain(told))
    assert (place, is_out) == ("node-1/cuda-1", False)
    assert "Xid 13" in said
    faulty.quarantine = "it failed 3 times"
    told.nodes[1].gpus.add(index=2, problem="GPU is lost")
    text = shown(facts(control=plain(told)))
    assert "quarantined: it failed 3 times" in row(text, "GPU node-1/cuda-1:", "Xid 13")
    assert "its driver cannot read it: GPU is lost" in row(text, "GPU node-1/2:")
    assert fine.device not in text
    assert [is_out for _, _, is_out in gpu_troubles(plain(told))] == [True, True]
    told.nodes[1].alive = False
    assert list(gpu_troubles(plain(told))) == []


def test_what_shadows_take_is_shown_packed_and_expanded_beside_its_limits() -> None:
    assert "shadows" not in shown(facts())
    told = control.GetClusterStatusResponse()
    told.CopyFrom(CONTROL)
    told.shadows.add(model="tiny", packed_bytes=12 << 20, packed_max_bytes=15 << 20, experts_bytes=100 << 20)
    told.actors[0].expanded_max_bytes = 4 << 20
    told.actors.add(actor_id="actor-1", state="ready", node_id="n2", expanded_bytes=1 << 20, expanded_max_bytes=4 << 20)
    text = shown(facts(control=plain(told)))
    assert "shadows of tiny: 12.0 MiB (12.0 %) packed, at most 15.0 MiB (15.0 %) of the experts' 100.0 MiB" in text
    assert "shadows expanded: 1.0 MiB, at most 8.0 MiB" in text
    assert "no room" not in text
    told.actors[1].num_unexpanded = 7
    assert "; 7 times there was no room for one (shadow.expanded_max)" in shown(facts(control=plain(told)))


def test_without_the_controller_the_router_s_view_stands_and_says_so() -> None:
    text = shown(facts(control={}, control_source=Source("c:1", problem="no answer within 1 s")))
    assert "controller: c:1: no answer within 1 s; the router keeps serving on the table it has" in text
    assert "0.2 s ago" in row(text, "actor-0/g1", "10.0.0.1:5")


def test_without_the_router_the_controller_s_view_stands_and_it_is_not_serving() -> None:
    status = facts(router={}, table={}, router_source=Source("r:1", problem="no answer within 1 s"))
    assert not status.is_serving
    assert status.state == "DEGRADED"
    text = shown(status)
    assert "router: r:1: no answer" in text
    assert "node-1" in text


def test_old_facts_say_their_age() -> None:
    text = shown(facts(control_source=Source("c:1", is_answering=True, age_s=30.0), router_source=Source("r:1", is_answering=True, age_s=7200.0)))
    assert "its facts are 30.0 s old" in text
    assert "its table is 2.0 h old" in text


def test_json_is_complete_and_has_numbers_as_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    show(facts(), as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["epoch"] == 42
    assert document["router"]["outcomes"]["exact"] == 999_999
    assert document["control"]["actors"][0]["slots"][0]["state"] == "loading"
    assert set(document) == {field.name for field in dataclasses.fields(StatusFacts)} | {"state", "epoch"}


def test_many_experts_are_shortened_to_those_in_trouble() -> None:
    experts = [router.RoutingTableExpert(model="tiny", layer=layer, index=0, replicas=[0]) for layer in range(200)]
    experts[150].ClearField("replicas")
    text = shown(facts(table=plain(router.GetRoutingTableResponse(actors=TABLE.actors, experts=experts))))
    assert "LOST" in row(text, "150")
    assert "... and 199 more experts" in text


class Routers(router_grpc.RouterServiceServicer):
    async def GetStatus(self, request: router.GetStatusRequest, context: grpc.aio.ServicerContext) -> router.GetStatusResponse:  # noqa: ARG002, N802
        if ("authorization", "Bearer secret") not in [(key, value) for key, value in context.invocation_metadata() or ()]:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
        return ROUTER

    async def GetRoutingTable(self, request: object, context: object) -> router.GetRoutingTableResponse:  # noqa: ARG002, N802
        return TABLE


class Controls(control_grpc.ControlServiceServicer):
    def __init__(self) -> None:
        self.routers: list[str] = []

    async def GetClusterStatus(self, request: object, context: object) -> control.GetClusterStatusResponse:  # noqa: ARG002, N802
        reply = control.GetClusterStatusResponse()
        reply.CopyFrom(CONTROL)
        for address in self.routers:
            reply.routers.add(router_id="router-0", address=address, state="ready")
        return reply


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[Connection, Controls]]:
    server, controls = grpc.aio.server(), Controls()
    router_grpc.add_RouterServiceServicer_to_server(Routers(), server)
    control_grpc.add_ControlServiceServicer_to_server(controls, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    token = tmp_path / "token"
    token.write_text("secret\n")
    yield Connection(name="tiny", router_address=address, token_path=token, control_address=address, control_token_path=token), controls
    await server.stop(0)


async def gathered(connection: Connection) -> StatusFacts:
    return await asyncio.to_thread(gather, connection)


async def test_both_are_asked_with_their_tokens(served: tuple[Connection, Controls]) -> None:
    status = await gathered(served[0])
    assert status.is_serving
    assert (status.router["epoch"], status.control["epoch"], len(status.table["experts"])) == (42, 43, 2)
    assert status.router_source.age_s == 0.5


def test_of_several_routers_behind_an_address_the_one_that_answered_is_named() -> None:
    def with_routers(*generations: int) -> StatusFacts:
        made = control.GetClusterStatusResponse()
        made.CopyFrom(CONTROL)
        for place, generation in enumerate(generations):
            made.routers.add(router_id=f"router-{place}", generation=generation, address="127.0.0.1:50051", state="ready")
        answer = router.GetStatusResponse()
        answer.CopyFrom(ROUTER)
        answer.router_generation = 7
        return facts(router=plain(answer), control=plain(made), router_source=Source("127.0.0.1:50051", is_answering=True))

    assert "127.0.0.1:50051   (router-1 of the 2 routers there)" in shown(with_routers(6, 7))
    assert "127.0.0.1:50051   (one of the 2 routers there)" in shown(with_routers(6, 8))
    assert "routers there" not in shown(with_routers(7))


async def test_a_router_that_moved_is_found_by_the_controller(served: tuple[Connection, Controls]) -> None:
    connection, controls = served
    controls.routers = [connection.router_address]
    status = await gathered(connection.model_copy(update={"router_address": DEAD}))
    assert status.is_serving
    assert status.router_source.address == connection.router_address


async def test_a_refusal_is_told_as_it_is(served: tuple[Connection, Controls]) -> None:
    status = await gathered(served[0].model_copy(update={"token_path": None}))
    assert status.router_source.problem == "UNAUTHENTICATED: no token"


async def test_when_everything_is_gone_it_still_answers_and_names_both() -> None:
    status = await gathered(Connection(name="tiny", router_address=DEAD, control_address=DEAD))
    assert not status.is_serving
    assert status.state == "UNREACHABLE"
    for source in (status.router_source, status.control_source):
        assert source.problem.startswith("no answer within")
    assert "UNREACHABLE" in shown(status)


async def test_a_token_that_cannot_be_read_is_a_problem_of_its_source_only(served: tuple[Connection, Controls], tmp_path: Path) -> None:
    status = await gathered(served[0].model_copy(update={"control_token_path": tmp_path / "none"}))
    assert status.is_serving
    assert "cannot read the token" in status.control_source.problem
