"""The controller after its own end, with its records and without: what runs is taken over, and nothing is taken from routers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cluster.cluster_view import status_message
from cluster.controller import Controller
from cluster.core.descriptors import Manifest
from cluster.core.errors import StaleTable
from cluster.core.ids import Incarnation
from cluster.core.plan import WITHDRAWAL_GRACE_S
from cluster.core.spec import ActorsSpec
from cluster.store import ControlStore
from kit.control import ControlRig, make_spec


@pytest.fixture
def rig(tmp_path: Path) -> ControlRig:
    return ControlRig(tmp_path)


async def settled(rig: ControlRig) -> None:
    """Serving, and nothing left to do but what `--replace` would."""
    await rig.until(lambda: rig.state == "SERVING" and "not at home" not in rig.message)
    for _ in range(40):
        await rig.step()
    assert rig.message in ("", "router-0 runs with another config or code, or the same: it was taken over; `--replace` replaces them one at a time")


async def test_restarted_controller_adopts_what_runs_and_starts_nothing(rig: ControlRig) -> None:
    await rig.deploy()
    table = rig.controller.table
    assert table is not None
    rig.fleet.log.clear()
    before = rig.controller.generation
    await rig.crash()
    generation = rig.controller.generation
    assert rig.controller.table is not None
    assert (rig.controller.table.copies, rig.controller.table.epoch) == (table.copies, table.epoch + 1)
    for _ in range(20):
        await rig.step()
    assert [line for line in rig.fleet.log if not line.startswith("import_experts")] == []
    assert generation > before
    assert rig.state == "SERVING"


async def test_empty_store_is_rebuilt_from_what_runs_above_every_number_seen(rig: ControlRig, tmp_path: Path) -> None:
    await rig.deploy()
    rig.fleet.kill_actor(rig.incarnation("actor-0"))
    await rig.step()
    await rig.until(lambda: rig.state == "SERVING" and rig.message == "")
    table, generation = rig.controller.table, max(incarnation.generation for incarnation in rig.fleet.actors)
    lives = set(rig.fleet.actors)
    assert table is not None
    await rig.controller._cancel_under_way()
    rig.state_dir = tmp_path / "new"
    rig.restart()
    given = rig.controller.register_router(7, table.epoch)
    await rig.deploy()
    assert given == 7
    assert set(rig.fleet.actors) == lives
    assert rig.controller.table is not None
    assert rig.controller.table.epoch > table.epoch
    assert rig.controller.snapshot().memory.generation >= generation
    assert rig.controller.table.copies == table.copies


async def test_unrecorded_actor_is_stopped(rig: ControlRig) -> None:
    await rig.deploy()
    stray = Incarnation("actor-9", 999)
    config = rig.fleet.actors[rig.incarnation("actor-0")].config.model_copy(update={"actor_id": "actor-9", "generation": 999})
    await rig.fleet.start_actor(config, node_id="node-1", num_gpus=0.5, num_cpus=0.0)
    await rig.until(lambda: stray not in rig.fleet.actors)
    await rig.until(lambda: rig.state == "SERVING")
    assert rig.controller.snapshot().memory.generation >= 999


async def test_start_recorded_but_never_sent_gets_a_new_generation(rig: ControlRig) -> None:
    await rig.controller.apply(rig.spec)
    await rig.until(lambda: bool(rig.controller.snapshot().memory.actors))
    recorded = rig.incarnation("actor-0")
    await rig.controller._cancel_under_way()
    rig.fleet.actors.pop(recorded, None)
    rig.restart()
    await rig.until(lambda: rig.state == "SERVING")
    assert rig.incarnation("actor-0").generation > recorded.generation


async def test_down_cut_off_by_a_crash_goes_on_after_it(rig: ControlRig) -> None:
    await rig.deploy()
    rig.fleet.fail_next["stop_router"] = RuntimeError("the process ends here")
    with pytest.raises(RuntimeError):
        await rig.controller.down()
    rig.controller._store.close()
    rig.restart()
    ended = asyncio.Event()
    stop_agents = rig.fleet.stop_agents

    async def last(*, timeout_s: float) -> None:
        await stop_agents(timeout_s=timeout_s)
        ended.set()

    rig.fleet.stop_agents = last  # type: ignore[method-assign]
    loop = asyncio.create_task(rig.controller.run())
    async with asyncio.timeout(10.0):
        await ended.wait()
    loop.cancel()
    assert (rig.fleet.actors, rig.fleet.routers) == ({}, {})


async def test_controller_that_was_superseded_stops_and_changes_nothing(rig: ControlRig) -> None:
    await rig.deploy()
    second = Controller(rig.fleet, ControlStore(rig.state_dir), rig.launch, clock=rig.clock)
    rig.fleet.kill_actor(rig.incarnation("actor-0"))
    rig.fleet.log.clear()
    with pytest.raises(StaleTable, match="superseded"):
        await rig.controller.run()
    assert rig.fleet.log == []
    await second.close()


async def test_decisions_are_logged_in_order_and_the_chain_is_whole(rig: ControlRig) -> None:
    await rig.deploy()
    decisions = rig.controller.store.decisions(1000)
    assert [entry.sequence for entry in decisions] == list(range(1, len(decisions) + 1))
    assert {"import_model", "import_experts", "start", "assume", "publish"} <= {entry.action for entry in decisions}
    assert rig.controller.store.first_broken_decision() is None


async def test_empty_store_leaves_all_that_runs_alone_however_long_the_import_takes(rig: ControlRig) -> None:
    await rig.deploy()
    rig.spec = rig.spec.model_copy(update={"actors": ActorsSpec(count=4)})
    lives, ready, table = set(rig.fleet.actors), rig.fleet.ready_copies(), rig.routers["router-0"].table
    assert table is not None
    await rig.lose_store()
    rig.fleet.import_s = 20.0
    rig.fleet.log.clear()
    await rig.controller.apply(rig.spec)

    def as_it_was() -> None:
        assert (set(rig.fleet.actors), rig.fleet.ready_copies()) == (lives, ready)
        assert rig.routers["router-0"].table is not None
        assert rig.routers["router-0"].table.copies == table.copies

    rig.after_step = as_it_was
    for _ in range(40):
        await rig.step()
    assert rig.fleet.log == []
    assert rig.controller.table is None
    assert "model m is being read" in rig.message
    rig.after_step = lambda: None
    await settled(rig)
    assert (set(rig.fleet.actors), rig.fleet.ready_copies()) == (lives, ready)
    assert {line.split()[0] for line in rig.fleet.log} <= {"import_model", "import_experts"}
    heard = rig.routers["router-0"].table
    assert heard is not None
    assert heard.epoch > table.epoch


@pytest.mark.parametrize("is_refused", [False, True])
async def test_empty_store_keeps_copies_of_a_model_that_is_not_read_while_another_is(tmp_path: Path, is_refused: bool) -> None:
    rig = ControlRig(tmp_path, make_spec("m", "other"))
    await rig.deploy()
    lives, ready = set(rig.fleet.actors), rig.fleet.ready_copies()
    await rig.lose_store()
    kept = rig.fleet.models.pop(Path("/models/other"))
    if not is_refused:
        rig.fleet.models[Path("/models/other")] = kept
        read = rig.fleet.import_model

        async def stuck(node_id: str, **arguments: Any) -> Manifest:
            await rig.clock.sleep(30.0 if arguments["name"] == "other" else 0.0)
            return await read(node_id, **arguments)

        rig.fleet.import_model = stuck  # type: ignore[method-assign]
    await rig.controller.apply(rig.spec)
    for _ in range(60):
        await rig.step()
    assert rig.state == ("FAILED" if is_refused else "DEPLOYING")
    assert (set(rig.fleet.actors), rig.fleet.ready_copies(), rig.controller.table) == (lives, ready, None)
    rig.fleet.models[Path("/models/other")] = kept
    await rig.controller.apply(rig.spec)
    await settled(rig)
    assert set(rig.fleet.actors) == lives


async def test_empty_store_waits_for_actors_that_do_not_answer_at_once(rig: ControlRig) -> None:
    await rig.deploy()
    lives = set(rig.fleet.actors)
    await rig.lose_store()
    for actor in rig.fleet.actors.values():
        actor.hung = True
    await rig.controller.apply(rig.spec)
    for _ in range(8):
        await rig.step()
    assert set(rig.fleet.actors) == lives
    for actor in rig.fleet.actors.values():
        actor.hung = False
    await settled(rig)
    assert set(rig.fleet.actors) == lives


async def test_controller_without_records_publishes_nothing_and_is_newer_than_the_one_before(rig: ControlRig) -> None:
    await rig.deploy()
    before = rig.controller.generation
    await rig.lose_store()
    assert rig.controller.generation > before
    assert rig.controller.register_router(5, 40) == 5
    await rig.step()
    assert rig.controller.table is None
    await rig.crash()
    assert rig.controller.table is None
    lives = set(rig.fleet.actors)
    await rig.deploy()
    assert set(rig.fleet.actors) == lives
    assert rig.controller.table is not None
    assert rig.controller.table.epoch > 40


async def test_drain_waits_for_routers_also_when_the_controller_ended_in_between(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, make_spec("m", "other"))
    await rig.deploy()
    rig.routers_hear = False
    rig.spec = make_spec("m")
    await rig.controller.apply(rig.spec)
    await rig.crash()
    for _ in range(3):
        await rig.step()
    assert not any(line.startswith("drain") for line in rig.fleet.log)
    assert rig.controller.table is not None
    rig.hear()
    await rig.step()
    assert any(line.startswith("drain") for line in rig.fleet.log)


async def test_router_that_says_nothing_gets_the_time_to_hear_before_a_drain(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, make_spec("m", "other"))
    rig.routers_hear = False
    await rig.deploy()
    rig.spec = make_spec("m")
    await rig.controller.apply(rig.spec)
    since_s = rig.clock.time_s
    await rig.until(lambda: any(line.startswith("drain") for line in rig.fleet.log))
    assert WITHDRAWAL_GRACE_S <= rig.clock.time_s - since_s <= WITHDRAWAL_GRACE_S + 2.0


async def test_damaged_records_are_told_in_the_status(rig: ControlRig) -> None:
    await rig.deploy()
    await rig.controller._cancel_under_way()
    rig.controller._store.close()
    rig.controller.store.path.write_bytes(b"not a database, surely not" * 100)
    rig.restart()
    await rig.deploy()
    assert "records were damaged and set aside" in status_message(rig.controller).message
