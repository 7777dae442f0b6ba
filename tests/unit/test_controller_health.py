"""What the controller does with routers' words: actors that are sent nothing, wrong numbers, devices that fail again and again."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.cluster_view import status_message
from cluster.core.health import LinkReport, Wrong
from cluster.core.ids import CopyId, ExpertId, Incarnation, Role
from cluster.core.memory import MAX_DISTRUSTED, Memory, without_stored_copy
from cluster.core.spec import ActorsSpec, ClusterSpec, RepairSpec
from cluster.core.status import GpuFault, GpuReading, SlotState
from kit.control import STEP_S, ControlRig, make_spec

EJECTED = "no progress for 0.2 s"


@pytest.fixture
def rig(tmp_path: Path) -> ControlRig:
    return ControlRig(tmp_path)


def spec_with(**repair: float) -> ClusterSpec:
    return make_spec().model_copy(update={"repair": RepairSpec(**repair)})


def eject(rig: ControlRig, name: str, *, is_connected: bool = True) -> Incarnation:
    """The router sends it nothing from here on."""
    life = rig.incarnation(name)
    router = rig.routers["router-0"]
    router.out[life] = LinkReport(life, is_connected=is_connected, is_ejected=is_connected, evidence=EJECTED)
    router.hear(rig.controller)
    return life


def copies_of(rig: ControlRig, index: int) -> list[CopyId]:
    return [copy for copy in rig.copies() if copy.expert.index == index]


def stands_elsewhere(rig: ControlRig, copies: list[CopyId], life: Incarnation) -> bool:
    return all(set(rig.published_on(copy)) - {str(life)} for copy in copies)


@pytest.mark.parametrize("is_connected", [True, False])
async def test_ejected_actors_experts_are_assumed_at_once_while_ray_knows_of_nothing(rig: ControlRig, is_connected: bool) -> None:
    await rig.deploy()
    since_s, life = rig.clock.time_s, eject(rig, "actor-1", is_connected=is_connected)
    assert rig.controller._wake.is_set()
    await rig.step()
    assumed = [line for line in rig.fleet.log if line.startswith("assume")][-2:]
    assert all("m:0/1" in line or "m:1/1" in line for line in assumed)
    await rig.until(lambda: stands_elsewhere(rig, copies_of(rig, 1), life))
    assert rig.clock.time_s - since_s <= rig.fleet.load_s + 2 * STEP_S
    assert all(str(life) in rig.published_on(copy) for copy in copies_of(rig, 1)), "the router must be able to find out that it is back"
    assert life in rig.fleet.actors


async def test_further_copies_go_only_once_the_actor_has_been_trusted_for_a_while(rig: ControlRig) -> None:
    await rig.deploy()
    life, mine = eject(rig, "actor-1"), copies_of(rig, 1)
    await rig.until(lambda: stands_elsewhere(rig, mine, life))
    rig.routers["router-0"].out.clear()
    since_s = rig.clock.time_s
    await rig.until(lambda: all(rig.published_on(copy) == [str(life)] for copy in mine))
    assert rig.clock.time_s - since_s >= rig.spec.repair.settle_s
    await rig.until(lambda: rig.message == "" and all(len(lives) == 1 for lives in rig.fleet.ready_copies().values()))
    assert rig.incarnation("actor-1") == life


async def test_flapping_ejections_move_copies_once(rig: ControlRig) -> None:
    await rig.deploy()
    num_before = len(rig.fleet.log)
    for _ in range(8):
        life = eject(rig, "actor-1")
        for _ in range(4):
            await rig.step()
        rig.routers["router-0"].out.clear()
        for _ in range(8):
            await rig.step()
    moved = [line for line in rig.fleet.log[num_before:] if line.startswith(("assume", "drain", "release"))]
    assert len([line for line in moved if line.startswith("assume")]) == 2
    assert not any(line.startswith(("drain", "release")) for line in moved)
    assert life in rig.fleet.actors


async def test_ejected_actor_that_is_silent_is_killed_and_replaced(rig: ControlRig) -> None:
    await rig.deploy()
    life = eject(rig, "actor-1")
    rig.fleet.actors[life].silent_since_s = since_s = rig.clock.time_s
    await rig.until(lambda: life not in rig.fleet.actors)
    assert f"kill {life}" in rig.fleet.log
    assert rig.spec.repair.replace_after_s <= rig.clock.time_s - since_s <= rig.spec.repair.replace_after_s + 4 * STEP_S
    await rig.until(lambda: rig.state == "SERVING" and rig.message == "")
    assert rig.incarnation("actor-1") != life


async def test_stuck_actor_that_answers_the_controller_is_killed_after_a_while_unless_it_moves(rig: ControlRig) -> None:
    await rig.deploy()
    stuck, slow = eject(rig, "actor-1"), eject(rig, "actor-2")
    since_s = rig.clock.time_s
    rig.fleet.actors[stuck].oldest_age_s = rig.fleet.actors[slow].oldest_age_s = 1.0

    def moves() -> None:
        if slow in rig.fleet.actors:
            rig.fleet.actors[slow].frames_done += 1

    rig.after_step = moves
    await rig.until(lambda: stuck not in rig.fleet.actors)
    assert rig.spec.repair.stuck_after_s <= rig.clock.time_s - since_s <= rig.spec.repair.stuck_after_s + 4 * STEP_S
    assert slow in rig.fleet.actors


async def test_idle_actor_that_stays_ejected_is_not_killed_before_it_is_given_up(rig: ControlRig) -> None:
    await rig.deploy()
    life, since_s = eject(rig, "actor-1"), rig.clock.time_s
    await rig.until(lambda: life not in rig.fleet.actors)
    assert rig.clock.time_s - since_s >= rig.spec.repair.give_up_after_s


async def test_router_that_falls_silent_is_not_believed(rig: ControlRig) -> None:
    await rig.deploy()
    life = eject(rig, "actor-1")
    rig.routers_hear = False
    await rig.until(lambda: not rig.controller.snapshot().memory.doubts)
    for _ in range(int(2 * rig.spec.repair.give_up_after_s / STEP_S)):
        await rig.step()
    assert life in rig.fleet.actors


async def test_router_that_ejects_most_of_those_that_answer_has_nobody_killed(rig: ControlRig) -> None:
    await rig.deploy()
    lives = [eject(rig, f"actor-{index}") for index in range(3)]
    for life in lives:
        rig.fleet.actors[life].oldest_age_s = 1.0
    for _ in range(int(3 * rig.spec.repair.stuck_after_s / STEP_S)):
        await rig.step()
    assert set(lives) <= set(rig.fleet.actors)


async def test_so_many_actors_a_minute_are_killed_and_no_more(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, spec_with(max_replacements_per_minute=1))
    await rig.deploy()
    lives = [eject(rig, name) for name in ("actor-1", "actor-2")]
    for life in lives:
        rig.fleet.actors[life].silent_since_s = rig.clock.time_s
    for _ in range(int(30 / STEP_S)):
        await rig.step()
    assert len([line for line in rig.fleet.log if line.startswith("kill")]) == 1


async def test_lost_actors_are_started_anew_only_when_everything_is_exact_again_and_one_at_a_time(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, make_spec(actors=ActorsSpec(free_slots=4)), nodes=4)
    await rig.deploy()
    rig.fleet.load_s = 1.0
    most = 0

    def check() -> None:
        nonlocal most
        starting = [actor for actor in rig.fleet.actors.values() if rig.clock.time_s < actor.ready_at_s]
        most = max(most, len(starting))
        if starting:
            assert all(rig.published_on(copy) for copy in rig.copies()), "a process starts while experts are lost"

    rig.after_step = check
    for name in ("actor-1", "actor-2"):
        rig.fleet.kill_actor(rig.incarnation(name))
    await rig.step()
    await rig.until(lambda: rig.state == "SERVING" and rig.message == "")
    assert most == 1


async def test_full_cluster_ends_a_hung_actor_before_it_can_start_the_next(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, nodes=2)
    await rig.deploy()
    life = eject(rig, "actor-1")
    rig.fleet.actors[life].silent_since_s = rig.clock.time_s
    await rig.until(lambda: rig.incarnation("actor-1") != life and rig.state == "SERVING" and rig.message == "")


def accuse(rig: ControlRig, copy: CopyId, life: Incarnation, kind: str = "non_finite") -> None:
    router = rig.routers["router-0"]
    router.wrong = [Wrong(life, copy, kind)]
    router.hear(rig.controller)


async def test_copy_with_wrong_numbers_is_replaced_then_loaded_again_from_a_blob_verified_anew(rig: ControlRig) -> None:
    await rig.deploy()
    life, (copy, other) = rig.incarnation("actor-1"), copies_of(rig, 1)
    accuse(rig, copy, life)
    await rig.until(lambda: rig.published_on(copy) not in ([], [str(life)]))
    assert rig.published_on(other) == [str(life)], "nothing else of this actor is moved"
    log = len(rig.fleet.log)
    await rig.until(lambda: rig.published_on(copy) == [str(life)])
    ours = [line for line in rig.fleet.log[log:] if str(life) in line]
    assert [line.split()[0] for line in ours] == ["drain", "release", "assume"]
    assert (rig.fleet.actors[life].node_id, copy.version) in rig.fleet.verified_anew
    await rig.until(lambda: rig.message == "")


async def test_copy_withdrawn_for_wrong_numbers_is_not_published_again_by_a_restarted_controller(rig: ControlRig) -> None:
    """Routers have forgotten it with the table that dropped it: only the records know."""
    await rig.deploy()
    life, copy = rig.incarnation("actor-1"), copies_of(rig, 1)[0]
    accuse(rig, copy, life)
    await rig.until(lambda: rig.published_on(copy) not in ([], [str(life)]))
    assert rig.fleet.actors[life].slots[copy].state is SlotState.READY
    log = len(rig.fleet.log)
    await rig.crash()
    await rig.until(lambda: rig.published_on(copy) == [str(life)])
    ours = [line.split()[0] for line in rig.fleet.log[log:] if str(life) in line]
    assert ours == ["drain", "release", "assume"]
    await rig.until(lambda: rig.message == "")


async def test_blob_that_was_not_verified_anew_when_the_controller_ended_is_by_the_next_one_and_then_trusted(rig: ControlRig) -> None:
    await rig.deploy()
    life, copy = rig.incarnation("actor-1"), copies_of(rig, 1)[0]
    blob = (rig.fleet.actors[life].node_id, copy.version)
    rig.fleet.import_s = 60.0
    accuse(rig, copy, life)
    await rig.until(lambda: blob in rig.fleet.verified_anew)
    await rig.crash()  # nobody knows whether it was
    rig.fleet.verified_anew.clear()
    rig.fleet.import_s = 0.0
    await rig.until(lambda: rig.published_on(copy) not in ([], [str(life)]))
    await rig.until(lambda: rig.published_on(copy) == [str(life)] and rig.message == "")
    assert rig.fleet.verified_anew == [blob]
    assert rig.controller.snapshot().memory.distrusted == ()
    await rig.crash()
    log = len(rig.fleet.log)
    await rig.until(lambda: any(line.startswith("import_experts") and line.endswith(blob[0]) for line in rig.fleet.log[log:]))
    assert rig.fleet.verified_anew == [blob], "once was enough"


def test_of_very_many_distrusted_blobs_the_oldest_are_forgotten_and_each_counts_once() -> None:
    copies = [CopyId(ExpertId("m", 0, number), f"{number:064x}", Role.REPLICA) for number in range(MAX_DISTRUSTED + 2)]
    memory = Memory()
    for copy in [*copies, copies[5]]:
        memory = without_stored_copy(memory, "node-1", copy)
    expected = [copy.version for copy in copies[2:] if copy != copies[5]] + [copies[5].version]
    assert [version for _, version in memory.distrusted] == expected


async def test_only_copy_with_wrong_numbers_stays_while_nothing_else_can_answer(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, make_spec(actors=ActorsSpec(free_slots=0)))
    await rig.deploy()
    life, copy = rig.incarnation("actor-1"), copies_of(rig, 1)[0]
    accuse(rig, copy, life)
    for _ in range(20):
        await rig.step()
    assert rig.published_on(copy) == [str(life)]
    assert "gave wrong numbers (non_finite)" in rig.message


async def test_one_of_two_replicas_with_wrong_numbers_leaves_the_table_at_once(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, make_spec(replicas=2))
    await rig.deploy()
    life, copy = rig.incarnation("actor-1"), copies_of(rig, 1)[0]
    accuse(rig, copy, life, "checksum")
    await rig.step()
    assert str(life) not in rig.published_on(copy)
    assert rig.published_on(copy)
    await rig.until(lambda: rig.state == "SERVING" and rig.message == "" and len(rig.published_on(copy)) == 2)


async def test_copy_that_went_bad_by_itself_is_held_elsewhere_at_once(rig: ControlRig) -> None:
    await rig.deploy()
    life, copy = rig.incarnation("actor-1"), copies_of(rig, 1)[0]
    slot = rig.fleet.actors[life].slots[copy]
    slot.state = SlotState.FAILED
    since_s = rig.clock.time_s
    await rig.until(lambda: rig.published_on(copy) not in ([], [str(life)]))
    assert rig.clock.time_s - since_s <= rig.fleet.load_s + 3 * STEP_S
    await rig.until(lambda: rig.state == "SERVING" and rig.message == "")
    assert (rig.fleet.actors[life].node_id, copy.version) in rig.fleet.verified_anew


async def fail_device(rig: ControlRig, node_id: str, times: int) -> None:
    """Kill whatever comes up on a node, so many times."""
    for _ in range(times):
        await rig.until(lambda: bool(rig.controller.snapshot().memory.quarantined) or any(a.node_id == node_id and a.slots for a in rig.fleet.actors.values()))
        for life in [life for life, actor in rig.fleet.actors.items() if actor.node_id == node_id]:
            rig.fleet.kill_actor(life)
        for _ in range(int(8 / STEP_S)):
            await rig.step()


async def test_device_that_fails_again_and_again_is_quarantined_until_it_is_released(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, nodes=5)
    await rig.deploy()
    node_id = rig.fleet.actors[rig.incarnation("actor-1")].node_id
    await fail_device(rig, node_id, 3)
    device = f"{node_id}/cpu"
    assert set(rig.controller.snapshot().memory.quarantined) == {device}
    await rig.until(lambda: rig.state == "SERVING" and all(rig.published_on(copy) for copy in rig.copies()))
    await rig.crash()
    for _ in range(40):
        await rig.step()
        assert all(actor.node_id != node_id for actor in rig.fleet.actors.values())
    assert f"`moelastic gpu release {device}` ends that" in rig.message
    assert [entry.device for entry in status_message(rig.controller).quarantined] == [device]
    assert not rig.controller.release_device("node-x/cpu")
    assert rig.controller.release_device(device)
    assert rig.controller.snapshot().memory.quarantined == {}
    assert [entry.action for entry in rig.controller.store.decisions(1000) if entry.action in ("quarantine", "release_device")] == [
        "quarantine",
        "release_device",
    ]


async def test_device_is_not_quarantined_when_the_others_have_no_room_for_its_copies(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, make_spec(actors=ActorsSpec(free_slots=0)))
    await rig.deploy()
    await fail_device(rig, rig.fleet.actors[rig.incarnation("actor-1")].node_id, 4)
    assert rig.controller.snapshot().memory.quarantined == {}
    assert "is not quarantined, although it failed 3 times within 600 s" in rig.message


async def test_error_that_a_driver_blames_on_its_device_moves_its_copies_away_and_stops_its_actors(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, nodes=5)
    await rig.deploy()
    life = rig.incarnation("actor-1")
    node_id = rig.fleet.actors[life].node_id
    rig.fleet.gpus[node_id] = (GpuReading(0, "cpu", "GPU-1", "H100", 100),)
    rig.fleet.gpu_faults[node_id] = (GpuFault(rig.clock.unix_s() - 1, "cpu", 13, is_device=False),)
    for _ in range(8):
        await rig.step()
    assert rig.controller.snapshot().memory.quarantined == {}
    rig.fleet.gpu_faults[node_id] += (GpuFault(rig.clock.unix_s(), "cpu", 79, is_device=True),)

    def never_without() -> None:
        assert all(rig.published_on(copy) for copy in rig.copies())

    rig.after_step = never_without
    await rig.until(lambda: life not in rig.fleet.actors)
    assert "Xid 79" in rig.message
    gpu = next(node for node in status_message(rig.controller).nodes if node.node_id == node_id).gpus[0]
    assert (gpu.device, gpu.uuid, gpu.name, gpu.last_xid, gpu.quarantine) == ("cpu", "GPU-1", "H100", 79, "its driver reported Xid 79")
    assert f"stop {life}" in rig.fleet.log
    rig.controller.release_device(f"{node_id}/cpu")
    for _ in range(8):
        await rig.step()
    assert rig.controller.snapshot().memory.quarantined == {}, "an error that was taken up counts once"
    await rig.crash()
    for _ in range(8):
        await rig.step()
    assert rig.controller.snapshot().memory.quarantined == {}, "and the release outlives the controller"


@pytest.mark.parametrize("ahead_s", [0.0, 3600.0])
async def test_an_error_after_the_release_counts_although_the_listener_began_anew(tmp_path: Path, ahead_s: float) -> None:
    """A node's clock may be ahead of ours: what it told before the release is past by its own time."""
    rig = ControlRig(tmp_path, nodes=5)
    await rig.deploy()
    node_id = rig.fleet.actors[rig.incarnation("actor-1")].node_id
    for _ in range(2):
        rig.fleet.gpu_faults[node_id] = (GpuFault(rig.clock.unix_s() + ahead_s, "cpu", 79, is_device=True),)
        await rig.until(lambda: bool(rig.controller.snapshot().memory.quarantined))
        assert rig.controller.release_device(f"{node_id}/cpu")
        for _ in range(8):
            await rig.step()
        assert rig.controller.snapshot().memory.quarantined == {}
        rig.fleet.gpu_faults.clear()  # the agent was restarted: its list begins anew
        await rig.step()
