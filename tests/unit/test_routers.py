"""Several routers behind one address, as the controller sees them: how many run, when one is missed, in which order they are replaced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from cluster.core.actor_config import router_ids
from cluster.core.errors import FleetError
from cluster.core.launch import router_config, router_digest
from cluster.core.routers import STARTS_WAITED_FOR
from cluster.core.spec import ActorsSpec, ClusterSpec, RouterSpec
from cluster.core.status import ActorState
from kit.control import LAUNCH, ControlRig, make_spec

STEPS = 40


def spec_of(count: int, **router: int) -> ClusterSpec:
    return make_spec().model_copy(update={"router": RouterSpec(count=count, **router)})


async def deployed(folder: Path, count: int) -> ControlRig:
    rig = ControlRig(folder, spec_of(count))
    await rig.deploy()
    return rig


def ready(rig: ControlRig) -> set[str]:
    return {name for name in rig.fleet.routers if rig.fleet.router_state(name) is ActorState.READY}


def started(rig: ControlRig) -> list[str]:
    return [line for line in rig.fleet.log if line.startswith("start router")]


def stopped(rig: ControlRig) -> list[str]:
    return [line for line in rig.fleet.log if line.startswith("stop router")]


async def test_as_many_routers_run_as_the_spec_wants_all_on_the_head_node(tmp_path: Path) -> None:
    rig = await deployed(tmp_path, 3)
    assert ready(rig) == {"router-0", "router-1", "router-2"}
    assert {node for _, node, _ in rig.fleet.routers.values()} == {"head"}
    assert len({rig.routers[name].generation for name in rig.fleet.routers}) == 3


async def test_one_of_two_that_is_lost_is_missed_by_name_and_started_again(tmp_path: Path) -> None:
    rig = await deployed(tmp_path, 2)
    del rig.fleet.routers["router-1"]
    await rig.until(lambda: rig.state == "DEGRADED")
    assert "1 of 2 routers are not ready: router-1" in rig.message
    await rig.until(lambda: rig.state == "SERVING")
    assert ready(rig) == {"router-0", "router-1"}
    assert started(rig).count("start router-0 on head") == 1


async def test_without_any_that_is_ready_the_note_says_just_that(tmp_path: Path) -> None:
    rig = await deployed(tmp_path, 2)
    rig.fleet.routers.clear()
    await rig.until(lambda: rig.state == "DEGRADED")
    assert "no router is ready" in rig.message


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
async def test_among_several_others_come_and_go_and_those_that_stay_are_left_alone(tmp_path: Path, before: int, after: int) -> None:
    rig = await deployed(tmp_path, before)
    _, differences = await rig.controller.apply(spec_of(after))
    assert not differences
    await rig.until(lambda: len(ready(rig)) == after == len(rig.fleet.routers) and rig.state == "SERVING")
    assert all(started(rig).count(f"start {name} on head") == 1 for name in router_ids(spec_of(max(before, after))))
    assert "stop router-0" not in rig.fleet.log
    assert "stop router-1" not in rig.fleet.log


async def test_a_second_router_waits_until_the_first_one_shares_its_address(tmp_path: Path) -> None:
    rig = await deployed(tmp_path, 1)
    _, differences = await rig.controller.apply(spec_of(2))
    assert list(differences) == ["router-0 runs with another config or code"]
    for _ in range(STEPS):
        await rig.step()
        assert set(rig.fleet.routers) == {"router-0"}
    assert "router-1 waits until router-0 has been replaced" in rig.message
    assert rig.state == "SERVING"
    await rig.controller.apply(spec_of(2), replace_differing=True)
    await rig.until(lambda: rig.state == "SERVING" and rig.message == "")
    assert ready(rig) == {"router-0", "router-1"}
    assert not rig.controller.snapshot().memory.replace
    log = rig.fleet.log
    assert log.index("stop router-0") < log.index("start router-1 on head")


async def test_routers_are_replaced_one_after_the_other(tmp_path: Path) -> None:
    rig = await deployed(tmp_path, 2)
    rig.launch = replace(LAUNCH, code_digest="code-2")
    await rig.crash()
    await rig.controller.apply(rig.spec, replace_differing=True)
    fewest = [2]
    rig.after_step = lambda: fewest.append(len(ready(rig)))
    await rig.until(lambda: rig.state == "SERVING" and not rig.controller.snapshot().memory.replace)
    assert min(fewest) == 1
    assert {config.code_digest for config, _, _ in rig.fleet.routers.values()} == {"code-2"}
    assert stopped(rig) == ["stop router-0", "stop router-1"]


async def moved(rig: ControlRig, address: str) -> None:
    """The controller ends; the next one listens elsewhere."""
    rig.launch = replace(LAUNCH, control_address=address)
    await rig.crash()


async def test_when_the_controller_listens_elsewhere_routers_follow_one_after_the_other(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, spec_of(3), launch=replace(LAUNCH, control_address="10.0.0.9:1"))
    await rig.deploy()
    await moved(rig, "10.0.0.9:2")
    fewest = [3]
    rig.after_step = lambda: fewest.append(len(ready(rig)))
    await rig.until(lambda: {config.control_address for config, _, _ in rig.fleet.routers.values()} == {"10.0.0.9:2"} and len(ready(rig)) == 3)
    assert min(fewest) == 2
    log = [line.split()[:2] for line in rig.fleet.log if " router-" in line][3:]
    assert log == [[verb, f"router-{number}"] for number in range(3) for verb in ("stop", "start")]


async def test_routers_that_are_not_ready_wait_for_nobody_when_the_controller_listens_elsewhere(tmp_path: Path) -> None:
    """None of them could ever become ready: their tables come from where nobody listens any more."""
    rig = ControlRig(tmp_path, spec_of(2), launch=replace(LAUNCH, control_address="10.0.0.9:1"))
    rig.fleet.start_s = 10.0
    await rig.controller.apply(rig.spec)
    await rig.until(lambda: len(rig.fleet.routers) == 2)
    assert ready(rig) == set()
    await moved(rig, "10.0.0.9:2")
    await rig.until(lambda: rig.fleet.log.count("stop router-1") == 1)
    assert ready(rig) == set()
    await rig.until(lambda: rig.state == "SERVING")
    assert {config.control_address for config, _, _ in rig.fleet.routers.values()} == {"10.0.0.9:2"}


async def test_a_router_that_is_ready_stays_while_another_is_not_though_the_controller_listens_elsewhere(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, spec_of(2), launch=replace(LAUNCH, control_address="10.0.0.9:1"))
    await rig.deploy()
    del rig.fleet.routers["router-1"]
    rig.fleet.fail_next["start_router"] = FleetError("no")
    await moved(rig, "10.0.0.9:2")
    await rig.until(lambda: "router-0 serves on its last table" in rig.message)
    assert "stop router-0" not in rig.fleet.log
    await rig.until(lambda: rig.state == "SERVING" and rig.message == "")
    assert [line for line in rig.fleet.log if line in ("start router-1 on head", "stop router-0")] == ["start router-1 on head"] * 2 + ["stop router-0"]


async def test_a_router_on_its_last_table_waits_for_others_that_never_start_for_a_limited_time(tmp_path: Path) -> None:
    limit_s = STARTS_WAITED_FOR * 10.0
    spec = spec_of(3).model_copy(update={"actors": ActorsSpec(start_timeout_s=10.0)})
    rig = ControlRig(tmp_path, spec, launch=replace(LAUNCH, control_address="10.0.0.9:1"))
    await rig.deploy()
    del rig.fleet.routers["router-0"]
    await moved(rig, "10.0.0.9:2")
    rig.after_step = lambda: rig.fleet.fail_next.update(start_router=FleetError("no"))
    rig.after_step()
    begun_s = rig.clock.now_s()
    await rig.until(lambda: f"router-1 serves on its last table, and is replaced once the others are ready, or some of them in {limit_s:g} s" in rig.message)
    await rig.until(lambda: rig.clock.now_s() >= begun_s + limit_s - 1.0)
    assert stopped(rig) == []
    await rig.until(lambda: bool(stopped(rig)))
    begun_s = rig.clock.now_s()
    await rig.until(lambda: rig.clock.now_s() >= begun_s + 5 * limit_s)
    assert stopped(rig) == ["stop router-1"], "the last one that answers stays"
    assert "router-2 serves on its last table, and is replaced once another one is ready, as none has been for long" in rig.message
    assert ready(rig) == {"router-2"}
    rig.after_step = lambda: None
    rig.fleet.fail_next.clear()
    await rig.until(lambda: rig.state == "SERVING" and rig.message == "")
    assert {config.control_address for config, _, _ in rig.fleet.routers.values()} == {"10.0.0.9:2"}


async def test_routers_that_were_taken_over_count_as_sharing_when_the_spec_says_so(tmp_path: Path) -> None:
    rig = await deployed(tmp_path, 2)
    await rig.lose_store()
    await rig.controller.apply(rig.spec)
    await rig.until(lambda: rig.state == "SERVING")
    del rig.fleet.routers["router-1"]
    await rig.until(lambda: ready(rig) == {"router-0", "router-1"})
    assert "stop router-0" not in rig.fleet.log


def test_every_router_has_a_metrics_port_of_its_own() -> None:
    fixed, free = spec_of(3, metrics_port=9100), spec_of(3)
    assert [router_config(fixed, LAUNCH, name).metrics_port for name in router_ids(fixed)] == [9100, 9101, 9102]
    assert [router_config(free, LAUNCH, name).metrics_port for name in router_ids(free)] == [0, 0, 0]


def test_metrics_ports_beyond_the_last_port_are_refused() -> None:
    assert RouterSpec(count=2, metrics_port=65_534).metrics_port == 65_534
    with pytest.raises(ValidationError, match="metrics_port: 3 routers need as many ports from 65534 on"):
        RouterSpec(count=3, metrics_port=65_534)


def test_a_router_differs_by_whether_it_shares_its_address_not_by_how_many_do() -> None:
    one, two, three = (router_digest(spec_of(count), LAUNCH) for count in (1, 2, 3))
    assert one != two == three
    assert not RouterSpec().shares_address
