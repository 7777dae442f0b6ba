"""The controller on a fake fleet: deploy, lose, repair, go down."""

from __future__ import annotations

import asyncio
import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from cluster.core.errors import FleetError
from cluster.core.health import LinkReport
from cluster.core.ids import Incarnation
from cluster.core.lifecycle import SUSPECT_LIMIT_S
from cluster.core.reconcile import Decision, reconcile
from cluster.core.status import FleetObservation, SlotState
from kit.control import STEP_S, ControlRig, make_spec


@pytest.fixture
def rig(tmp_path: Path) -> ControlRig:
    return ControlRig(tmp_path)


async def test_goal_is_reached_with_every_copy_published_at_home(rig: ControlRig) -> None:
    await rig.deploy()
    for copy in rig.copies():
        assert rig.published_on(copy) == [str(rig.incarnation(f"actor-{copy.expert.index}"))]
    assert rig.message == ""
    assert sorted(rig.fleet.routers) == ["router-0"]


async def test_actors_are_spread_over_nodes_and_started_a_few_at_a_time(rig: ControlRig) -> None:
    most = 0

    def count() -> None:
        nonlocal most
        most = max(most, sum(1 for actor in rig.fleet.actors.values() if rig.clock.time_s < actor.ready_at_s))

    rig.after_step = count
    await rig.deploy()
    assert most == rig.spec.actors.start_parallelism
    assert sorted(actor.node_id for actor in rig.fleet.actors.values()) == ["node-1", "node-2", "node-3", "node-4"]


async def test_router_starts_only_when_there_is_a_table_to_serve(rig: ControlRig) -> None:
    await rig.controller.apply(rig.spec)
    await rig.until(lambda: bool(rig.fleet.routers))
    assert rig.controller.table is not None
    assert rig.controller.table.copies
    started = [index for index, line in enumerate(rig.fleet.log) if line.startswith("start router")]
    assumed = [index for index, line in enumerate(rig.fleet.log) if line.startswith("assume")]
    assert min(assumed) < min(started)


async def test_lost_actor_leaves_the_table_at_once_and_its_experts_come_back_before_it_does(rig: ControlRig) -> None:
    await rig.deploy()
    lost = rig.incarnation("actor-2")
    mine = [copy for copy in rig.copies() if copy.expert.index == 2]
    rig.fleet.start_s = 10.0
    rig.fleet.kill_actor(lost)
    await rig.step()
    assert all(rig.published_on(copy) == [] for copy in mine)
    await rig.until(lambda: all(rig.published_on(copy) for copy in mine))
    assert rig.incarnation("actor-2") not in rig.fleet.actors or rig.clock.time_s < rig.fleet.actors[rig.incarnation("actor-2")].ready_at_s
    assert rig.state == "SERVING"


async def test_copies_move_home_to_the_new_life_without_a_gap(rig: ControlRig) -> None:
    await rig.deploy()
    lost = rig.incarnation("actor-2")
    mine = [copy for copy in rig.copies() if copy.expert.index == 2]
    rig.fleet.kill_actor(lost)
    await rig.step()
    await rig.until(lambda: all(rig.published_on(copy) for copy in mine))

    def never_without() -> None:
        for copy in mine:
            assert rig.published_on(copy)

    rig.after_step = never_without
    await rig.until(lambda: all(rig.published_on(copy) == [str(rig.incarnation("actor-2"))] for copy in mine))
    await rig.until(lambda: all(holders == {rig.incarnation(f"actor-{copy.expert.index}")} for copy, holders in rig.fleet.ready_copies().items()))
    assert rig.incarnation("actor-2").generation > lost.generation


async def test_actors_of_a_lost_node_start_where_there_is_room(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, nodes=4)
    await rig.deploy()
    rig.fleet.kill_node("node-2")
    await rig.until(lambda: rig.state == "SERVING" and len(rig.fleet.actors) == 4)
    assert "node-2" not in {actor.node_id for actor in rig.fleet.actors.values()}


async def test_missing_room_is_told_with_the_actor_and_both_numbers(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, nodes=1)
    await rig.controller.apply(rig.spec)
    await rig.until(lambda: len(rig.fleet.actors) == 2 and "waits" in rig.message)
    assert "actor-2 waits: needs 0.5 GPU, but the freest of 2 alive nodes, head, has 0 of 0 left" in rig.message
    assert rig.state == "DEPLOYING"


async def test_hung_actor_is_repaired_around_then_replaced_and_ended(rig: ControlRig) -> None:
    await rig.deploy()
    hung = rig.incarnation("actor-1")
    mine = [copy for copy in rig.copies() if copy.expert.index == 1]
    rig.fleet.actors[hung].hung = True
    await rig.step()
    assert all(rig.published_on(copy) == [str(hung)] for copy in mine), "the only copies stay published while they may still answer"
    await rig.until(lambda: all(str(hung) not in rig.published_on(copy) and rig.published_on(copy) for copy in mine))
    since_s = rig.clock.time_s
    await rig.until(lambda: hung not in rig.fleet.actors and rig.incarnation("actor-1") != hung)
    assert rig.clock.time_s - since_s <= SUSPECT_LIMIT_S + 1.0
    await rig.until(lambda: rig.state == "SERVING" and rig.message == "")


async def test_drain_waits_until_routers_know_the_table_without_the_copy(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, make_spec("m", "other"))
    await rig.deploy()
    assert rig.controller.table is not None
    rig.controller.report_health("router-0", rig.controller.table.epoch, (), {}, 0.0)
    rig.spec = make_spec("m")
    await rig.controller.apply(rig.spec)
    await rig.step()
    assert not any(line.startswith("drain") for line in rig.fleet.log)
    rig.controller.report_health("router-0", rig.controller.table.epoch, (), {}, 0.0)
    await rig.step()
    assert any(line.startswith("drain") for line in rig.fleet.log)


async def test_actor_that_keeps_dying_is_started_less_and_less_often(rig: ControlRig) -> None:
    await rig.deploy()
    starts: list[float] = []
    for _ in range(400):
        life = rig.incarnation("actor-0")
        if life in rig.fleet.actors:
            starts.append(rig.clock.time_s)
            rig.fleet.kill_actor(life)
        await rig.step()
    waits = [after - before for before, after in itertools.pairwise(starts)]
    assert waits[-1] > 4 * waits[0]
    assert len(starts) < 15
    assert "was lost" in rig.message


async def test_lost_router_is_started_again(rig: ControlRig) -> None:
    await rig.deploy()
    del rig.fleet.routers["router-0"]
    await rig.step()
    assert rig.state == "DEGRADED"
    await rig.until(lambda: rig.state == "SERVING")
    assert "router-0" in rig.fleet.routers


async def test_wrong_slot_is_released_imported_again_and_loaded_again(rig: ControlRig) -> None:
    await rig.deploy()
    life = rig.incarnation("actor-0")
    copy = rig.copies()[0]
    rig.fleet.log.clear()
    rig.fleet.actors[life].slots[copy].state = SlotState.FAILED
    await rig.until(lambda: rig.published_on(copy) == [] or rig.published_on(copy) != [str(life)])
    await rig.until(lambda: rig.published_on(copy) == [str(life)] and rig.state == "SERVING" and rig.message == "")
    verbs = [line.split()[0] for line in rig.fleet.log]
    assert {"release", "import_experts", "assume"} <= set(verbs)


async def test_down_ends_routers_then_actors_then_agents_and_leaves_nothing(rig: ControlRig) -> None:
    await rig.deploy()
    rig.fleet.log.clear()
    await rig.controller.down()
    assert rig.fleet.actors == {}
    assert rig.fleet.routers == {}
    assert [line.split()[1].split("-")[0] for line in rig.fleet.log] == ["router", *["actor"] * 4, "agents"]
    assert rig.controller.table is not None
    assert not rig.controller.table.copies
    await rig.deploy()


async def test_down_that_cannot_end_all_says_what_is_left(rig: ControlRig) -> None:
    await rig.deploy()

    async def stuck(incarnation: Incarnation, *, timeout_s: float) -> None:
        message = f"{incarnation} stays for {timeout_s} s"
        raise FleetError(message)

    rig.fleet.stop_actor = stuck  # type: ignore[method-assign]
    with pytest.raises(FleetError, match=r"still running after 0\.3 s: actor-"):
        await rig.controller.down(timeout_s=0.3)


async def test_lost_link_of_a_published_actor_makes_the_controller_look_at_once(rig: ControlRig) -> None:
    await rig.deploy()
    rig.controller._wake.clear()
    rig.controller.report_health("router-0", 1, [LinkReport(Incarnation("actor-0", 999), is_connected=False)])
    assert not rig.controller._wake.is_set()
    lost = [LinkReport(rig.incarnation("actor-0"), is_connected=False)]
    rig.controller.report_health("router-0", 1, lost)
    assert rig.controller._wake.is_set()
    rig.controller._wake.clear()
    rig.controller.report_health("router-0", 1, lost)
    assert not rig.controller._wake.is_set(), "what was said before is no news"


async def test_hung_router_is_given_its_time_then_ended_and_started_anew(rig: ControlRig) -> None:
    await rig.deploy()
    rig.fleet.hung_routers.add("router-0")
    since_s = rig.clock.time_s
    rig.fleet.log.clear()
    await rig.until(lambda: bool(rig.fleet.log))
    assert rig.fleet.log == ["stop router-0"]
    assert SUSPECT_LIMIT_S < rig.clock.time_s - since_s <= SUSPECT_LIMIT_S + 1.0
    await rig.until(lambda: rig.state == "SERVING" and rig.message == "")
    assert "start router-0 on head" in rig.fleet.log


async def test_router_that_answers_again_is_left_alone(rig: ControlRig) -> None:
    await rig.deploy()
    rig.fleet.log.clear()
    for _ in range(3):
        rig.fleet.hung_routers.add("router-0")
        for _ in range(int(SUSPECT_LIMIT_S / STEP_S) - 4):
            await rig.step()
        assert rig.state == "DEGRADED"
        assert "router-0 does not answer" in rig.message
        rig.fleet.hung_routers.clear()
        await rig.until(lambda: rig.state == "SERVING")
    assert rig.fleet.log == []


async def test_router_that_never_becomes_ready_is_ended_and_started_anew(rig: ControlRig) -> None:
    await rig.deploy()
    config, node_id, _ = rig.fleet.routers["router-0"]
    rig.fleet.routers["router-0"] = (config, node_id, math.inf)
    await rig.until(lambda: rig.fleet.log[-1] == "stop router-0")
    await rig.until(lambda: rig.state == "SERVING" and rig.message == "")


async def test_node_agents_are_started_a_few_at_a_time(rig: ControlRig) -> None:
    rig.fleet.import_s = 1.0
    most = 0

    def count() -> None:
        nonlocal most
        most = max(most, len(rig.fleet.importing - {"head"}))  # the head's agent runs since it read the model

    rig.after_step = count
    await rig.deploy()
    assert most == rig.spec.actors.start_parallelism
    assert sum(line.startswith("import_experts") for line in rig.fleet.log) >= 5


async def test_looks_that_keep_failing_are_logged_less_and_less_often(
    rig: ControlRig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cluster.controller.TROUBLE_PAUSE_S", 0.0)
    num_looks, enough = 0, asyncio.Event()

    async def fail(**_: Any) -> FleetObservation:
        nonlocal num_looks
        num_looks += 1
        if num_looks > 100:
            enough.set()
        message = "Ray did not answer"
        raise FleetError(message)

    rig.fleet.observe = fail  # type: ignore[method-assign]
    loop = asyncio.create_task(rig.controller.run())
    async with asyncio.timeout(10.0):
        await enough.wait()
    loop.cancel()
    assert [record.getMessage() for record in caplog.records if "in a row" in record.getMessage()] == [
        f"controller: {2**power} looks in a row failed" for power in range(7)
    ]
    assert "Ray did not answer" in rig.controller.snapshot().trouble


async def test_look_that_finds_nothing_new_plans_nothing(rig: ControlRig, monkeypatch: pytest.MonkeyPatch) -> None:
    await rig.deploy()
    await rig.until(lambda: rig.message == "" and not rig.controller._under_way)
    for _ in range(8):
        await rig.step()
    num_plans = 0

    def counted(*facts: Any) -> Decision:
        nonlocal num_plans
        num_plans += 1
        return reconcile(*facts)

    monkeypatch.setattr("cluster.controller.reconcile", counted)
    for _ in range(20):
        await rig.step()
    assert num_plans == 0
    assert rig.controller.observed_age_s() == STEP_S
    rig.fleet.kill_actor(rig.incarnation("actor-1"))
    await rig.step()
    assert num_plans == 1
    await rig.until(lambda: rig.state == "SERVING" and rig.message == "")
