"""New goals for what runs: models come and go, actors shrink in number, code and settings change, checkpoints turn out wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.cluster_view import status_message
from cluster.core.errors import ConfigError
from cluster.core.placement import wanted_copies
from cluster.core.spec import ActorsSpec, ControlSpec, StoreSpec
from kit.control import LAUNCH, ControlRig, make_spec
from kit.fleet import make_manifest


@pytest.fixture
def rig(tmp_path: Path) -> ControlRig:
    return ControlRig(tmp_path)


async def test_removed_model_is_unpublished_then_drained_then_released(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, make_spec("m", "other"))
    await rig.deploy()
    copy = rig.copies("other")[0]
    rig.spec = make_spec("m")
    rig.fleet.log.clear()
    await rig.controller.apply(rig.spec)
    assert rig.published_on(copy) == []
    await rig.until(lambda: all(held.expert.model == "m" for held in rig.fleet.ready_copies()))
    await rig.until(lambda: not any(slot.expert.model == "other" for actor in rig.fleet.actors.values() for slot in actor.slots))
    verbs = [line.split()[0] for line in rig.fleet.log if "other:0/0" in line]
    assert verbs == ["drain", "release"]
    assert rig.controller.table is not None
    assert set(rig.controller.table.models) == {"m"}


async def test_shrunk_goal_moves_copies_before_it_stops_actors(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, make_spec(actors=ActorsSpec(slots_per_actor=6)))
    await rig.deploy()
    rig.spec = make_spec(actors=ActorsSpec(slots_per_actor=6, count=2))
    await rig.controller.apply(rig.spec)

    def never_without() -> None:
        assert all(rig.published_on(copy) for copy in rig.copies())

    rig.after_step = never_without
    await rig.until(lambda: len(rig.fleet.actors) == 2 and rig.state == "SERVING")
    assert {incarnation.actor_id for incarnation in rig.fleet.actors} == {"actor-0", "actor-1"}


async def test_other_code_is_reported_and_left_alone_without_replace(rig: ControlRig) -> None:
    await rig.deploy()
    lives = set(rig.fleet.actors)
    rig.launch = replace(LAUNCH, code_digest="code-2")
    await rig.crash()
    _, differences = await rig.controller.apply(rig.spec)
    assert len(differences) == 5
    assert "runs other code (code-1, now code-2)" in differences[0]
    for _ in range(20):
        await rig.step()
    assert set(rig.fleet.actors) == lives
    assert "--replace" in rig.message
    assert rig.state == "SERVING"


async def test_replace_renews_actors_one_at_a_time_and_every_expert_stays_published(rig: ControlRig) -> None:
    await rig.deploy()
    old = set(rig.fleet.actors)
    rig.launch = replace(LAUNCH, code_digest="code-2")
    await rig.crash()
    await rig.controller.apply(rig.spec, replace_differing=True)

    def one_at_a_time() -> None:
        assert all(rig.published_on(copy) for copy in rig.copies())
        assert len(rig.fleet.actors) >= 3

    rig.after_step = one_at_a_time
    await rig.until(lambda: not old & set(rig.fleet.actors) and rig.state == "SERVING" and rig.message == "")
    await rig.until(lambda: not rig.controller.snapshot().memory.replace)
    assert {actor.config.code_digest for actor in rig.fleet.actors.values()} == {"code-2"}
    assert rig.fleet.routers["router-0"][0].code_digest == "code-2"


async def test_replace_without_a_free_slot_waits_and_says_so(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, make_spec(actors=ActorsSpec(free_slots=0)))
    await rig.deploy()
    old = set(rig.fleet.actors)
    rig.launch = replace(LAUNCH, code_digest="code-2")
    await rig.crash()
    await rig.controller.apply(rig.spec, replace_differing=True)
    await rig.until(lambda: "no free slot" in rig.message)
    assert "actors.standby" in rig.message
    assert all(rig.published_on(copy) for copy in rig.copies())
    assert old == set(rig.fleet.actors)


async def test_refused_checkpoint_fails_by_name_and_is_not_read_again_until_applied(rig: ControlRig) -> None:
    source = rig.spec.models[0].path
    manifest = rig.fleet.models.pop(source)
    await rig.controller.apply(rig.spec)
    await rig.until(lambda: rig.state == "FAILED")
    assert "/models/m: there is no checkpoint in this folder" in rig.message
    rig.fleet.models[source] = manifest
    for _ in range(200):
        await rig.step()
    assert rig.state == "FAILED"
    await rig.deploy()


async def test_model_whose_path_now_holds_other_weights_is_refused_and_goes_on(rig: ControlRig) -> None:
    await rig.deploy()
    lives = set(rig.fleet.actors)
    moved = rig.spec.models[0].model_copy(update={"path": Path("/models/moved")})
    rig.fleet.models[moved.path] = make_manifest("m", salt="x", source="/models/moved")
    rig.spec = rig.spec.model_copy(update={"models": (moved,)})
    await rig.controller.apply(rig.spec)
    await rig.until(lambda: "digests differ" in rig.message)
    assert set(rig.fleet.actors) == lives
    assert all(rig.published_on(copy) for copy in rig.copies())


async def test_goal_that_contradicts_itself_is_refused_with_the_remedy(rig: ControlRig) -> None:
    await rig.deploy()
    with pytest.raises(ConfigError, match=r"cannot hold 8 copies; raise actors.count to 8 or actors.slots_per_actor to 4"):
        await rig.controller.apply(make_spec(actors=ActorsSpec(count=2, slots_per_actor=1)))
    with pytest.raises(ConfigError, match="controller of its own"):
        await rig.controller.apply(rig.spec.model_copy(update={"name": "else"}))
    await rig.step()
    assert rig.state == "SERVING"


async def test_one_slot_per_actor_serves_each_copy_from_an_actor_of_its_own(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, make_spec(actors=ActorsSpec(slots_per_actor=1)))
    await rig.deploy()
    assert len(rig.fleet.actors) == 8
    assert len({tuple(rig.published_on(copy)) for copy in rig.copies()}) == 8


async def test_two_replicas_lie_on_two_nodes(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, make_spec(replicas=2))
    await rig.deploy()
    for holders in rig.fleet.ready_copies().values():
        assert len({rig.fleet.actors[incarnation].node_id for incarnation in holders}) == 2


async def test_same_goal_again_changes_nothing(rig: ControlRig) -> None:
    await rig.deploy()
    rig.fleet.log.clear()
    revision, differences = await rig.controller.apply(rig.spec)
    await rig.step()
    assert (revision, differences, rig.state, rig.fleet.log) == (1, (), "SERVING", [])


@pytest.mark.parametrize("is_refused", [False, True])
async def test_path_corrected_while_the_wrong_one_is_read_serves_the_right_weights(rig: ControlRig, is_refused: bool) -> None:
    if is_refused:
        del rig.fleet.models[rig.spec.models[0].path]
    right = rig.spec.models[0].model_copy(update={"path": Path("/models/right")})
    rig.fleet.models[right.path] = make_manifest("m", salt="right", source="/models/right")
    rig.fleet.import_s = 3.0
    await rig.controller.apply(rig.spec)
    for _ in range(4):
        await rig.step()
    rig.spec = rig.spec.model_copy(update={"models": (right,)})
    await rig.controller.apply(rig.spec)
    await rig.until(lambda: rig.state == "SERVING" and rig.message == "")
    assert set(rig.fleet.ready_copies()) == set(wanted_copies(rig.fleet.models[right.path]))
    assert rig.controller.snapshot().memory.models["m"].path == "/models/right"


async def test_actors_wait_for_a_new_model_that_is_still_read(rig: ControlRig) -> None:
    await rig.deploy()
    lives = set(rig.fleet.actors)
    rig.spec = make_spec("other")
    rig.fleet.models[Path("/models/other")] = make_manifest("other", source="/models/other")
    rig.fleet.import_s = 10.0
    await rig.controller.apply(rig.spec)
    await rig.until(lambda: rig.state == "SERVING" and rig.message == "")
    assert set(rig.fleet.actors) == lives
    assert set(rig.fleet.ready_copies()) == set(rig.copies("other"))


async def test_status_does_not_say_serving_before_all_that_differs_is_replaced(rig: ControlRig) -> None:
    await rig.deploy()
    rig.launch = replace(LAUNCH, code_digest="code-2")
    await rig.crash()
    await rig.step()
    assert rig.state == "SERVING"
    await rig.controller.apply(rig.spec, replace_differing=True)
    states = []

    def told() -> None:
        states.append(rig.state)
        configs = [actor.config for actor in rig.fleet.actors.values()] + [router[0] for router in rig.fleet.routers.values()]
        is_done = len(configs) == 5 and all(config.code_digest == "code-2" for config in configs)
        assert is_done or rig.state == "DEPLOYING"

    told()
    rig.after_step = told
    await rig.until(lambda: rig.state == "SERVING")
    assert states.count("DEPLOYING") > 10
    assert rig.message == ""


async def test_settings_of_the_controller_itself_are_told_until_it_is_replaced(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, launch=replace(LAUNCH, control=ControlSpec(), store=StoreSpec()))
    await rig.deploy()
    control = ControlSpec(observe_timeout_s=3.0, reconcile_s=0.5)
    rig.spec = rig.spec.model_copy(update={"control": control, "store": StoreSpec(max_bytes=7)})
    told = ("control.observe_timeout_s is 5.0 in the running controller, now 3.0", "store.max_bytes is None in the running controller, now 7")
    assert (await rig.controller.apply(rig.spec))[1] == told
    await rig.step()
    assert status_message(rig.controller).differences == list(told)
    assert "it changes when the controller is replaced" in rig.message
    rig.launch = replace(LAUNCH, control=control, store=rig.spec.store)
    await rig.crash()
    await rig.until(lambda: rig.state == "SERVING" and rig.message == "")
    assert not status_message(rig.controller).differences
