"""The controller with shadows on a fake fleet: they are loaded apart, published last, stand in for lost experts, and never cost a replica its place."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.cluster_view import status_message
from cluster.core.ids import CopyId, Role
from cluster.core.placement import wanted_copies
from cluster.core.routing_table import TableCopy
from cluster.core.spec import ActorsSpec, ClusterSpec, ShadowSpec
from cluster.core.status import ActorObservation, SlotState
from kit.control import ControlRig, make_spec
from kit.fleet import with_shadows

SHADOW = ShadowSpec()
NUM_EXPERTS = 8  # two layers of four


def shadowed(spec: ClusterSpec, shadow: ShadowSpec | None = SHADOW) -> ClusterSpec:
    return spec.model_copy(update={"models": tuple(model.model_copy(update={"shadow": shadow}) for model in spec.models)})


@pytest.fixture
def rig(tmp_path: Path) -> ControlRig:
    return ControlRig(tmp_path, shadowed(make_spec()))


def copies_of(rig: ControlRig, role: Role, spec: ShadowSpec = SHADOW) -> list[CopyId]:
    return [copy for copy in wanted_copies(with_shadows(rig.manifest(), spec)) if copy.role is role]


def published(rig: ControlRig, copy: CopyId) -> list[TableCopy]:
    table = rig.controller.table
    return [] if table is None else [entry for entry in table.copies_of(copy.expert) if (entry.version, entry.role) == (copy.version, copy.role)]


def node_of(rig: ControlRig, entry: TableCopy) -> str:
    assert rig.controller.table is not None
    return rig.controller.table.actors[entry.incarnation.actor_id].node_id


async def test_every_expert_is_published_with_its_replica_first_and_its_shadow_on_another_node(rig: ControlRig) -> None:
    await rig.deploy()
    table = rig.controller.table
    assert table is not None
    assert len(table.copies) == NUM_EXPERTS
    for copies in table.copies.values():
        assert [copy.role for copy in copies] == [Role.REPLICA, Role.SHADOW]
        assert len({node_of(rig, copy) for copy in copies}) == 2
    decision = rig.controller.snapshot().decision
    assert decision is not None
    assert (decision.num_copies_wanted, decision.num_copies_ready) == (2 * NUM_EXPERTS, 2 * NUM_EXPERTS)
    assert rig.message == ""
    for _ in range(3):
        await rig.step()
    decision = rig.controller.snapshot().decision
    assert decision is not None
    assert decision.is_at_rest


async def test_nodes_get_exactly_the_blobs_of_what_they_hold_and_each_expert_lies_on_one_node_more(rig: ControlRig) -> None:
    await rig.deploy()
    await rig.until(lambda: bool(rig.controller.snapshot().decision and rig.controller.snapshot().decision.is_at_rest))
    stocked: Counter[str] = Counter()
    gates = set(rig.manifest().gates.values())
    for node_id, node in rig.fleet.nodes.items():
        if not node.is_head:
            held = {copy.version for actor in rig.fleet.actors.values() if actor.node_id == node_id for copy in actor.slots}
            assert node.blobs >= held | gates
            stocked.update(node.blobs - held - gates)
    assert stocked == Counter(rig.manifest().experts.values())


async def test_shadows_of_a_lost_actor_answer_until_its_experts_are_back(rig: ControlRig) -> None:
    await rig.deploy()
    mine = [copy for copy in copies_of(rig, Role.REPLICA) if copy.expert.index == 2]
    rig.fleet.kill_actor(rig.incarnation("actor-2"))
    await rig.step()
    table = rig.controller.table
    assert table is not None
    for copy in mine:
        assert [entry.role for entry in table.copies_of(copy.expert)] == [Role.SHADOW]
    assert table.is_complete("m")
    assert rig.state == "DEGRADED"
    assert "2 experts are answering from shadow" in rig.message
    rig.after_step = lambda: _assert_every_expert_is_published(rig)
    await rig.until(lambda: all(published(rig, copy) for copy in mine))
    assert "answering from shadow" not in rig.message
    await rig.until(lambda: rig.state == "SERVING" and rig.message == "")


def _assert_every_expert_is_published(rig: ControlRig) -> None:
    table = rig.controller.table
    assert table is not None
    assert len(table.copies) == NUM_EXPERTS


async def test_a_lost_node_takes_no_expert_with_it(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, shadowed(make_spec(actors=ActorsSpec(count=8, num_gpus=0.5))), nodes=4)
    await rig.deploy()
    rig.after_step = lambda: _assert_every_expert_is_published(rig)
    rig.fleet.kill_node("node-3")
    await rig.step()
    assert "answering from shadow" in rig.message


async def test_lost_replicas_are_loaded_again_before_lost_shadows(tmp_path: Path) -> None:
    """Two free slots in each of three actors are left for two replicas and two shadows; with one slot in each, replicas take them."""
    spec = shadowed(make_spec(actors=ActorsSpec(slots_per_actor=5, free_slots=1)))
    rig = ControlRig(tmp_path, spec)
    await rig.deploy()
    lost = rig.incarnation("actor-1")
    rig.fleet.start_s = 60.0
    rig.fleet.kill_actor(lost)
    mine = [copy for copy in copies_of(rig, Role.REPLICA) if copy.expert.index == 1]
    await rig.until(lambda: all(published(rig, copy) for copy in mine))
    assumed = [line for line in rig.fleet.log if line.startswith("assume")]
    shadows = [copy for copy in copies_of(rig, Role.SHADOW) if not published(rig, copy)]
    assert len(shadows) <= 1, assumed


async def test_a_lost_shadow_is_loaded_again_away_from_its_replica(rig: ControlRig) -> None:
    await rig.deploy()
    rig.fleet.start_s = 60.0
    lost = rig.incarnation("actor-0")
    shadows = [copy for copy in copies_of(rig, Role.SHADOW) if published(rig, copy)[0].incarnation == lost]
    assert shadows
    rig.fleet.kill_actor(lost)
    await rig.until(lambda: all(published(rig, copy) for copy in shadows))
    for copy in shadows:
        table = rig.controller.table
        assert table is not None
        holders = [entry.incarnation for entry in table.copies_of(copy.expert)]
        assert len(set(holders)) == len(holders) == 2


@pytest.mark.parametrize("nodes", [2, 3, 4])
async def test_a_lost_replica_is_loaded_again_away_from_its_shadow(tmp_path: Path, nodes: int) -> None:
    """Beside it, the next lost node would take both; also when the blob would have to be imported first."""
    rig = ControlRig(tmp_path, shadowed(make_spec(actors=ActorsSpec(count=nodes * 2, free_slots=4, num_gpus=0.5))), nodes=nodes)
    await rig.deploy()
    mine = [copy for copy in copies_of(rig, Role.REPLICA) if published(rig, copy)[0].incarnation == rig.incarnation("actor-0")]
    assert mine
    rig.fleet.start_s = 60.0
    rig.fleet.kill_actor(rig.incarnation("actor-0"))
    await rig.step()
    await rig.until(lambda: all(published(rig, copy) for copy in mine))
    for copy in mine:
        assert rig.controller.table is not None
        copies = rig.controller.table.copies_of(copy.expert)
        assert [entry.role for entry in copies] == [Role.REPLICA, Role.SHADOW]
        assert len({node_of(rig, entry) for entry in copies}) == 2


async def test_another_budget_replaces_the_shadows_and_touches_no_replica(rig: ControlRig) -> None:
    await rig.deploy()
    other = ShadowSpec(memory_fraction=0.3)
    before = {copy: published(rig, copy) for copy in copies_of(rig, Role.REPLICA)}
    rig.after_step = lambda: _assert_replicas(rig, before)
    await rig.controller.apply(shadowed(rig.spec, other))
    await rig.until(lambda: all(published(rig, copy) for copy in copies_of(rig, Role.SHADOW, other)) and rig.state == "SERVING")
    assert not any(published(rig, copy) for copy in copies_of(rig, Role.SHADOW))
    await rig.until(lambda: {slot.copy for actor in rig.fleet.actors.values() for slot in actor.slots.values()} == _wanted(rig, other))
    table = rig.controller.table
    assert table is not None
    assert table.models["m"].manifest == with_shadows(rig.manifest(), other).digest


def _wanted(rig: ControlRig, spec: ShadowSpec) -> set[CopyId]:
    return set(wanted_copies(with_shadows(rig.manifest(), spec)))


def _assert_replicas(rig: ControlRig, before: dict[CopyId, list[TableCopy]]) -> None:
    assert {copy: published(rig, copy) for copy in before} == before


async def test_taking_the_section_out_lets_the_shadows_go(rig: ControlRig) -> None:
    await rig.deploy()
    await rig.controller.apply(shadowed(rig.spec, None))
    await rig.until(lambda: all(slot.copy.role is Role.REPLICA for actor in rig.fleet.actors.values() for slot in actor.slots.values()))
    await rig.until(lambda: rig.state == "SERVING")
    table = rig.controller.table
    assert table is not None
    assert table.models["m"].manifest == rig.manifest().digest


async def test_shadows_outlive_the_controller_and_its_records(rig: ControlRig) -> None:
    await rig.deploy()
    table = rig.controller.table
    assert table is not None
    assumed = sum(line.startswith("assume") for line in rig.fleet.log)
    for restart in (rig.crash, rig.lose_store):
        await restart()
        if restart == rig.lose_store:
            await rig.controller.apply(rig.spec)
        await rig.until(lambda: rig.state == "SERVING" and "copies" not in rig.message)
        assert rig.controller.table is not None
        assert rig.controller.table.copies == table.copies
    assert sum(line.startswith("assume") for line in rig.fleet.log) == assumed


async def test_a_shadow_that_cannot_be_loaded_is_told_and_keeps_no_replica_from_serving(rig: ControlRig) -> None:
    rig.fleet.load_s = 1e9
    await rig.controller.apply(rig.spec)
    await rig.until(lambda: len(rig.fleet.actors) == 4 and all(actor.slots for actor in rig.fleet.actors.values()))
    for actor in rig.fleet.actors.values():
        for slot in actor.slots.values():
            if slot.copy.role is Role.REPLICA:
                slot.state = SlotState.READY
    await rig.until(lambda: rig.controller.table is not None and len(rig.controller.table.copies) == NUM_EXPERTS)
    assert "8 of 16 copies are ready" in rig.message
    assert rig.state == "DEPLOYING"


async def test_shadows_without_room_are_told(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, shadowed(make_spec(actors=ActorsSpec(slots_per_actor=3, free_slots=1))))
    await rig.deploy()
    assert "8 shadows fit on no actor beside their replicas; raise actors.slots_per_actor or actors.count" in rig.message


async def test_replacing_every_actor_keeps_every_expert_published_and_brings_shadows_home(rig: ControlRig) -> None:
    await rig.deploy()
    before = set(rig.fleet.actors)
    rig.launch = replace(rig.launch, code_digest="newer")
    await rig.crash()
    await rig.until(lambda: rig.state == "SERVING")
    rig.after_step = lambda: _assert_every_expert_is_published(rig)
    await rig.controller.apply(rig.spec, replace_differing=True)
    await rig.until(lambda: not before & set(rig.fleet.actors) and rig.state == "SERVING" and rig.message == "")
    table = rig.controller.table
    assert table is not None
    for copies in table.copies.values():
        assert [copy.role for copy in copies] == [Role.REPLICA, Role.SHADOW]
        assert len({node_of(rig, copy) for copy in copies}) == 2


async def test_status_shows_shadows_in_their_slots_and_what_is_expanded(rig: ControlRig, monkeypatch: pytest.MonkeyPatch) -> None:
    await rig.deploy()
    observe = rig.fleet._observation
    monkeypatch.setattr(rig.fleet, "_observation", lambda *of: _expanding(observe(*of)))
    rig.fleet.kill_actor(rig.incarnation("actor-3"))
    await rig.step()
    message = status_message(rig.controller)
    slots = [slot for actor in message.actors for slot in actor.slots]
    roles = [slot.role for slot in slots]
    assert roles.count(Role.SHADOW) == roles.count(Role.REPLICA) == 6
    assert {actor.expanded_bytes for actor in message.actors if actor.slots} == {4096}
    assert {(actor.expanded_max_bytes, actor.num_unexpanded) for actor in message.actors if actor.slots} == {(8192, 3)}
    (shadows,) = message.shadows
    assert (shadows.model, shadows.packed_bytes) == (message.models[0].name, sum(slot.bytes for slot in slots if slot.role == Role.SHADOW))
    assert 0 < shadows.packed_max_bytes == int(0.15 * shadows.experts_bytes)
    assert message.models[0].num_missing == 0
    assert "2 experts are answering from shadow" in message.message


def _expanding(seen: ActorObservation) -> ActorObservation:
    return seen if seen.report is None else replace(seen, report=replace(seen.report, expanded_bytes=4096, expanded_max_bytes=8192, num_unexpanded=3))
