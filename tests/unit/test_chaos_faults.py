from __future__ import annotations

import random
from dataclasses import replace

import pytest

from chaos.core.experiment import Action, Limits, Selector
from chaos.core.targets import Target, check_blast_radius, select, shadow_holder
from chaos.faults.table import FAULTS, fault_of
from chaos.plan import choose
from chaos.port import Injection
from cluster.core.errors import ConfigError, FleetError
from cluster.core.ids import ExpertId
from kit.chaos import MODEL, FakeCluster, action, order_of, scenario_file, small_inventory


def target_of(cluster: FakeCluster, fault: str) -> Target:
    kind = min(FAULTS[fault].kinds)
    target = select(cluster.inventory(), Selector.model_validate({"kind": kind, "pick": "rotate"}), model=MODEL, rng=random.Random(1))
    widen = FAULTS[fault].widen
    return target if widen is None else widen(cluster.inventory(), target, MODEL)


@pytest.mark.parametrize("fault", sorted(FAULTS))
async def test_every_fault_strikes_somebody_and_is_seen_to_be_gone(fault: str) -> None:
    cluster = FakeCluster()
    order = order_of(cluster, target_of(cluster, fault), fault, seconds=1.0)
    injection = Injection(order.target, [])
    await FAULTS[fault].inject(order, injection)
    assert cluster.done
    assert injection.strikes
    assert all(strike.gone_s is None for strike in injection.strikes)
    await FAULTS[fault].recover(order, injection)
    assert all(strike.gone_s is not None and strike.gone_s >= strike.at_s for strike in injection.strikes)
    assert cluster.stopped == set()
    assert not any(cluster.playing.values())


@pytest.mark.parametrize(
    "fault", sorted(name for name, kind in FAULTS.items() if "actor" in kind.kinds and name not in {"kill_actor", "stop_actor", "double_loss"})
)
async def test_the_proof_that_an_actor_misbehaved_is_kept(fault: str) -> None:
    cluster = FakeCluster()
    order = order_of(cluster, target_of(cluster, fault), fault, seconds=1.0)
    injection = Injection(order.target, [])
    await FAULTS[fault].inject(order, injection)
    await FAULTS[fault].recover(order, injection)
    assert set(injection.strikes[0].details["struck"].values()) == {3}


@pytest.mark.parametrize("fault", ["stuck_compute", "slow_actor", "nan_weights", "inf_weights", "flip_weights", "drop_replies", "late_replies"])
async def test_a_fault_that_no_frame_met_is_no_proof_and_an_earlier_strike_does_not_stand_in_for_it(fault: str) -> None:
    cluster = FakeCluster()
    order = order_of(cluster, target_of(cluster, fault), fault, seconds=1.0)
    first, second = Injection(order.target, []), Injection(order.target, [])
    await FAULTS[fault].inject(order, first)
    await FAULTS[fault].recover(order, first)
    cluster.num_struck = 0
    await FAULTS[fault].inject(order, second)
    with pytest.raises(FleetError, match="struck nothing in actor-0/g1"):
        await FAULTS[fault].recover(order, second)
    assert not any(cluster.playing.values())


async def test_an_actor_that_died_of_its_fault_need_not_tell_how_often_it_was_struck() -> None:
    cluster = FakeCluster(num_struck=0)
    order = order_of(cluster, target_of(cluster, "stuck_compute"), "stuck_compute", seconds=1.0)
    injection = Injection(order.target, [])
    await FAULTS["stuck_compute"].inject(order, injection)
    cluster.kill(order.target.processes[0])
    cluster.refuses = "state"
    await FAULTS["stuck_compute"].recover(order, injection)
    assert not injection.strikes[0].is_mended


@pytest.mark.parametrize("fault", ["stop_actor", "freeze_controller"])
async def test_what_runs_when_it_is_to_be_resumed_was_not_stopped(fault: str) -> None:
    cluster = FakeCluster()
    order = order_of(cluster, target_of(cluster, fault), fault, seconds=1.0)
    injection = Injection(order.target, [])
    await FAULTS[fault].inject(order, injection)
    cluster.stopped.clear()
    with pytest.raises(FleetError, match="it was not stopped"):
        await FAULTS[fault].recover(order, injection)


async def test_a_recovery_that_is_not_seen_is_an_error_and_not_assumed() -> None:
    cluster = FakeCluster()
    order = order_of(cluster, target_of(cluster, "kill_controller"), "kill_controller")
    injection = Injection(order.target, [])
    await FAULTS["kill_controller"].inject(order, injection)
    cluster.is_silent = True
    with pytest.raises(FleetError, match=r"not within 0\.2 s: a new controller answers"):
        await FAULTS["kill_controller"].recover(order, injection)


async def test_a_stopped_actor_that_was_given_up_counts_as_replaced() -> None:
    cluster = FakeCluster()
    order = order_of(cluster, target_of(cluster, "stop_actor"), "stop_actor", seconds=1.0)
    injection = Injection(order.target, [])
    await FAULTS["stop_actor"].inject(order, injection)
    cluster.kill(order.target.processes[0])
    await FAULTS["stop_actor"].recover(order, injection)
    assert not injection.strikes[0].is_mended


async def test_a_double_loss_kills_the_primary_first_and_then_its_shadow() -> None:
    cluster = FakeCluster()
    order = order_of(cluster, target_of(cluster, "double_loss"), "double_loss", delay_s=0.1)
    injection = Injection(order.target, [])
    await FAULTS["double_loss"].inject(order, injection)
    assert cluster.done == ["kill actor-0", "kill actor-2"]  # actor-2 holds the shadow of expert 0


def test_the_same_seed_chooses_alike_and_rotation_takes_turns() -> None:
    inventory = small_inventory()
    picks = [select(inventory, Selector(kind="actor", pick="random", role="primary", node=None, count=1), model=MODEL, rng=random.Random(7)) for _ in range(3)]
    assert len({pick.name for pick in picks}) == 1
    rotated = [
        select(inventory, Selector.model_validate({"kind": "actor", "pick": "rotate"}), model=MODEL, rng=random.Random(7), turn=turn) for turn in range(4)
    ]
    assert len({pick.name for pick in rotated}) == 4
    hottest = select(inventory, Selector.model_validate({"kind": "actor", "pick": "hottest"}), model=MODEL, rng=random.Random(7))
    assert hottest.actors[0].incarnation.actor_id == "actor-2"


def test_who_holds_nothing_of_the_layer_under_load_is_not_struck() -> None:
    inventory = small_inventory()
    elsewhere = [replace(actor, replicas=frozenset({ExpertId(MODEL, 2, number)})) for number, actor in enumerate(inventory.actors)]
    mixed = replace(inventory, actors=(*elsewhere[:3], inventory.actors[3]))
    names = {choose(scenario_file(method=[action()]), mixed, model=MODEL, rng=random.Random(1), number=turn)[0].target.name for turn in range(4)}
    assert names == {"actor-3/g1"}
    of_layer_2 = scenario_file(method=[action()], load={"layer": 2})
    names = {choose(of_layer_2, mixed, model=MODEL, rng=random.Random(1), number=turn)[0].target.name for turn in range(4)}
    assert names == {"actor-0/g1", "actor-1/g1", "actor-2/g1"}


def test_a_node_that_hosts_the_router_or_the_head_is_never_lost() -> None:
    inventory = small_inventory()
    names = {
        select(inventory, Selector.model_validate({"kind": "node", "pick": "rotate"}), model=MODEL, rng=random.Random(1), turn=turn).name for turn in range(6)
    }
    assert names == {"node-1", "node-2"}


@pytest.mark.parametrize(("kind", "limit"), [("gpu", "actors"), ("node", "nodes"), ("router", "routers"), ("controller", "controllers")])
def test_more_than_the_blast_radius_is_refused_by_name(kind: str, limit: str) -> None:
    target = select(small_inventory(), Selector.model_validate({"kind": kind}), model=MODEL, rng=random.Random(1))
    limits = Limits.model_validate({"actors": 9, "nodes": 9, "routers": 9, "controllers": 9, limit: 0})
    with pytest.raises(ConfigError, match=f"limits.{limit}"):
        check_blast_radius([target], limits)
    check_blast_radius([target], limits.model_copy(update={limit: 9}))


def test_nobody_who_fits_is_an_error_that_says_what_was_looked_for() -> None:
    with pytest.raises(ConfigError, match="an actor"):
        select(small_inventory(), Selector.model_validate({"kind": "actor"}), model="another", rng=random.Random(1))
    whole = select(small_inventory(), Selector.model_validate({"kind": "actor", "count": 4}), model=MODEL, rng=random.Random(1))
    with pytest.raises(ConfigError, match="no other actor holds a shadow"):
        shadow_holder(small_inventory(), whole, model=MODEL)


def test_a_fault_is_refused_on_a_target_that_it_cannot_strike() -> None:
    given = Action.model_validate({"name": "a", "at": 0, "fault": "kill_router", "target": {"kind": "actor"}})
    with pytest.raises(ConfigError, match="kill_router strikes router, not a actor"):
        fault_of(given)


async def test_a_process_that_runs_on_after_it_was_stopped_is_no_fault() -> None:
    cluster = FakeCluster(stops=False)
    order = order_of(cluster, target_of(cluster, "stop_actor"), "stop_actor", seconds=1.0)
    with pytest.raises(FleetError, match="runs on after SIGSTOP"):
        await FAULTS["stop_actor"].inject(order, Injection(order.target, []))
