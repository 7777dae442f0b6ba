"""Hot experts: hot only when many rows *and* a queue say so for some windows, cold only after many; repair's room is never used."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cluster.cluster_view import status_message
from cluster.core.health import Health, LinkReport, RouterReport
from cluster.core.ids import ExpertId, Incarnation
from cluster.core.load import Load
from cluster.core.replication import Heat, next_heat
from cluster.core.routing_table import TableCopy
from cluster.core.spec import ActorsSpec, ClusterSpec, ReplicationSpec
from cluster.core.table_draft import TableDraft
from kit.control import STEP_S, ControlRig, make_spec

SPEC = ReplicationSpec(cold_windows=5)
HOT = ExpertId("m", 0, 3)
LIVES = [Incarnation(f"actor-{index}", index + 1) for index in range(8)]


def table(num_hot: int = 1) -> TableDraft:
    holders = {ExpertId("m", 0, index): LIVES[index : index + 1] for index in range(8)} | {HOT: LIVES[3 : 3 + num_hot]}
    return TableDraft(copies={expert: tuple(TableCopy(life, "v") for life in lives) for expert, lives in holders.items()})


def load(share: float) -> Load:
    """The hot expert's rows as a multiple of an even share."""
    rest = (8 - share) / 7
    return Load(0.0, {ExpertId("m", 0, index): 1000 * (share if index == HOT.index else rest) for index in range(8)})


def queues(*age_s: float) -> Health:
    return Health({"router-0": RouterReport(0.0, {life: LinkReport(life, oldest_age_s=age) for life, age in zip(LIVES[3:], age_s, strict=False)})})


def after(windows: int, share: float, *age_s: float, heat: Heat | None = None, copies: int = 1, spec: ReplicationSpec = SPEC) -> Heat:
    heat = heat or Heat()
    for window in range(windows):
        heat = next_heat(heat, spec, table(copies), load(share), queues(*age_s), float(window) / 100)
    return heat


def test_hot_needs_rows_and_a_queue_for_some_windows_in_a_row() -> None:
    assert after(SPEC.hot_windows - 1, 3.0, 0.05).wanted() == {}
    wanted = after(SPEC.hot_windows, 3.0, 0.05).wanted()
    assert {expert: warmth.num_further for expert, warmth in wanted.items()} == {HOT: 1}
    assert wanted[HOT].why == "hot: 37 % of layer 0's rows, queue age 50 ms for 3 windows"
    assert after(20, 3.0, 0.001).wanted() == {}, "many rows that nobody waits for"
    assert after(20, 1.5, 0.5).wanted() == {}, "a queue of no expert in particular"
    broken = after(SPEC.hot_windows - 1, 3.0, 0.001, heat=after(SPEC.hot_windows - 1, 3.0, 0.05))
    assert after(SPEC.hot_windows - 1, 3.0, 0.05, heat=broken).wanted() == {}


def test_next_replica_must_be_earned_anew_and_there_are_at_most_so_many() -> None:
    heat = after(SPEC.hot_windows, 7.9, 0.05)
    assert after(10, 3.0, 0.05, 0.05, heat=heat, copies=2).wanted()[HOT].num_further == 1, "share per copy is below the threshold"
    assert after(10, 7.9, 0.05, 0.001, heat=heat, copies=2).wanted()[HOT].num_further == 1, "one of its holders is free"
    for copies in (2, 3, 4, 4, 4):
        heat = after(SPEC.hot_windows, 7.9, *[0.05] * copies, heat=heat, copies=copies)
    assert heat.wanted()[HOT].num_further == SPEC.max_replicas - 1


def test_cold_takes_longer_than_hot_and_a_warm_expert_keeps_what_it_has() -> None:
    heat = after(SPEC.hot_windows, 3.0, 0.05)
    assert after(100, 1.6, 0.0, 0.0, heat=heat, copies=2).wanted()
    assert after(SPEC.cold_windows - 1, 1.0, 0.0, 0.0, heat=heat, copies=2).wanted()
    assert after(SPEC.cold_windows, 1.0, 0.0, 0.0, heat=heat, copies=2).wanted() == {}


def test_idle_or_switched_off_nothing_is_hot() -> None:
    quiet = Load(0.0, {HOT: 10.0, ExpertId("m", 0, 0): 1.0})
    heat = Heat()
    for _ in range(20):
        heat = next_heat(heat, SPEC, table(), quiet, queues(0.5), 0.0)
    assert heat.wanted() == {}
    assert after(20, 3.0, 0.5, spec=ReplicationSpec(enabled=False)).wanted() == {}


def hot_rig(folder: Path, **actors: int) -> ControlRig:
    spec: ClusterSpec = make_spec(actors=ActorsSpec(**actors)).model_copy(update={"replication": ReplicationSpec(cold_windows=4)})  # type: ignore[arg-type]
    return ControlRig(folder, spec)


def heat_up(rig: ControlRig, *experts: ExpertId) -> None:
    """Traffic in which these experts get most rows and their actors are behind."""
    router = rig.routers["router-0"]
    router.tokens = {copy.expert: 5000 if copy.expert in experts else 100 for copy in rig.copies()}
    router.window_s = STEP_S
    router.queue_age_s = {f"actor-{expert.index}": 0.1 for expert in experts}


async def test_hot_expert_gets_a_replica_in_a_free_slot_and_loses_it_when_cold_without_a_gap(tmp_path: Path) -> None:
    rig = hot_rig(tmp_path)
    await rig.deploy()
    hot = ExpertId("m", 1, 2)
    copy = next(copy for copy in rig.copies() if copy.expert == hot)

    def never_without() -> None:
        assert all(rig.published_on(copy) for copy in rig.copies())
        assert rig.state == "SERVING"

    rig.after_step = never_without
    heat_up(rig, hot)
    await rig.until(lambda: len(rig.published_on(copy)) == 2)
    entry = status_message(rig.controller).hot[0]
    assert (entry.layer, entry.index) == (1, 2)
    assert entry.reason.startswith("hot: ")
    assert entry.actor_id in {life.partition("/")[0] for life in rig.published_on(copy)} - {"actor-2"}
    whys = [decision.reason for decision in rig.controller.store.decisions() if decision.action == "assume" and decision.target.startswith(f"{hot} on")]
    assert [why.partition(":")[0] for why in whys] == ["hot"], "the record says why it was copied"
    heat_up(rig)
    await rig.until(lambda: len(rig.published_on(copy)) == 1)
    await rig.until(lambda: len(rig.fleet.ready_copies()[copy]) == 1)
    assert rig.published_on(copy) == [str(rig.incarnation("actor-2"))]


@pytest.mark.parametrize("free_slots", [0, 1, 2])
async def test_room_that_repair_needs_is_never_used(tmp_path: Path, free_slots: int) -> None:
    rig = hot_rig(tmp_path, free_slots=free_slots)
    await rig.deploy()
    heat_up(rig, *(ExpertId("m", layer, 1) for layer in range(2)))
    for _ in range(60):
        await rig.step()
    held = {life: len(actor.slots) for life, actor in rig.fleet.actors.items()}
    num_slots = 2 + free_slots
    num_further = sum(held.values()) - len(rig.copies())
    assert (num_further > 0) == (4 * free_slots > num_slots)
    if num_further:
        assert 4 * num_slots - sum(held.values()) >= num_slots
    else:
        assert "no slot is free beside what repair may need" in rig.message


async def test_further_replicas_make_room_for_lost_experts(tmp_path: Path) -> None:
    rig = hot_rig(tmp_path, free_slots=2)
    rig.spec = rig.spec.model_copy(update={"replication": ReplicationSpec(reserve_actors=0, max_replicas=4)})
    await rig.deploy()
    for _ in range(3):
        heat_up(rig, *(ExpertId("m", layer, 0) for layer in range(2)))
        for _ in range(40):
            rig.routers["router-0"].queue_age_s = {f"actor-{index}": 0.1 for index in range(4)}
            await rig.step()
    assert sum(len(actor.slots) for actor in rig.fleet.actors.values()) > len(rig.copies())
    rig.fleet.start_s = 1e6
    for name in ("actor-2", "actor-3"):
        rig.fleet.kill_actor(rig.incarnation(name))
        await rig.step()
    await rig.until(lambda: all(rig.published_on(copy) for copy in rig.copies()))


def test_random_loads_never_want_more_than_allowed_and_settle_once_all_is_even() -> None:
    for seed in range(50):
        rng, heat = random.Random(seed), Heat()
        for window in range(60):
            copies = rng.randint(1, 4)
            heat = next_heat(heat, SPEC, table(copies), load(rng.uniform(0.1, 7.9)), queues(*[rng.uniform(0, 0.1) for _ in range(4)]), window / 100)
            assert all(0 < warmth.num_further < SPEC.max_replicas for warmth in heat.wanted().values())
        heat = after(SPEC.cold_windows * SPEC.max_replicas, 1.0, 0.0, heat=heat)
        assert heat.wanted() == {}
