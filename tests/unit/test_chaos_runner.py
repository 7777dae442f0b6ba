from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest

from chaos import runner
from chaos.core.report import Record
from chaos.faults.table import FAULTS
from chaos.runner import Repetition
from chaos.session import Session
from kit.chaos import FakeCluster, FakeSession, action, scenario_file
from kit.waiting import until


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SETTLE_S", 0.0)
    monkeypatch.setattr(runner, "GUARD_S", 0.01)


async def run(session: FakeSession, during: Callable[[Repetition], Any] | None = None, **parts: Any) -> Record:
    repetition = Repetition(scenario_file(**parts), cast("Session", session), 0, seed=1)
    task = asyncio.create_task(repetition.run())
    if during is not None:
        await during(repetition)
    return await task


async def test_a_good_run_passes_and_tells_what_it_did() -> None:
    session = FakeSession()
    record = await run(session, method=[action()])
    assert (record.ending, record.reason) == ("PASSED", "")
    assert session.target.done == ["kill actor-0"]
    assert record.actions[0].target == "actor-0/g1"
    assert record.actions[0].injected_s is not None
    assert record.actions[0].recovered_s is not None
    assert record.metrics["failed"] == 0
    assert record.control_ms == [10.0] * 4
    assert Record.model_validate_json(record.model_dump_json()) == record


@pytest.mark.parametrize(("num_struck", "ending"), [(3, "PASSED"), (0, "DEVIATED")])
async def test_the_proof_that_a_fault_struck_is_recorded_and_its_lack_fails_the_run(num_struck: int, ending: str) -> None:
    record = await run(FakeSession(target=FakeCluster(num_struck=num_struck)), method=[action("stuck_compute")])
    assert record.ending == ending
    assert record.actions[0].details["struck"] == {"stuck_compute": num_struck}


async def test_nothing_is_struck_when_the_steady_state_is_not_met() -> None:
    session = FakeSession(failures=[1])
    record = await run(session, method=[action()])
    assert record.ending == "BASELINE_NOT_MET"
    assert session.target.done == []


async def test_a_cluster_that_is_not_whole_is_no_steady_state() -> None:
    session = FakeSession(lack="7 of 8 actors")
    record = await run(session, method=[action()])
    assert (record.ending, record.reason) == ("BASELINE_NOT_MET", "7 of 8 actors")
    assert session.target.done == []


async def test_a_method_beyond_the_blast_radius_strikes_nobody() -> None:
    session = FakeSession()
    record = await run(session, method=[action("lose_gpu", "gpu")])
    assert record.ending == "BAD_SCENARIO"
    assert "limits.actors: 2 would be struck and 1 are allowed" in record.reason
    assert session.target.done == []


async def test_a_deviation_afterwards_fails_the_run() -> None:
    record = await run(FakeSession(failures=[0, 1, 1, 1]), method=[action()])
    assert record.ending == "DEVIATED"
    assert record.reason.startswith("after: availability")


async def test_a_steady_state_that_comes_back_a_moment_later_is_met_and_what_failed_meanwhile_counts() -> None:
    record = await run(FakeSession(failures=[0, 1, 0, 1]), method=[action()])  # before, twice after, and the whole repetition
    assert record.ending == "PASSED"
    assert record.metrics["failed"] == 1


async def test_a_steady_state_may_ask_for_leaked_processes() -> None:
    steady = {"title": "s", "probes": [{"name": "leak", "tolerance": 0}]}
    session = FakeSession()
    session.counted["more_processes"] = 0.0
    assert (await run(session, **{"steady-state-hypothesis": steady})).ending == "PASSED"
    session.counted["more_processes"] = 2.0
    assert (await run(session, **{"steady-state-hypothesis": steady})).reason == "leak: 2 is not equal to 0"


ROLLBACK = {"name": "availability", "tolerance": 1, "within_s": 30.0}


async def test_a_rollback_is_measured_until_it_is_seen_and_is_kept() -> None:
    session = FakeSession(failures=[0, 2, 1, 0])
    record = await run(session, method=[action()], rollbacks=[ROLLBACK])
    assert (record.ending, record.reason) == ("PASSED", "")
    assert [(found.name, found.value, found.ok) for found in record.rollbacks] == [("availability", 1.0, True)]
    assert session.failures == []  # two windows were not as wanted, the third was
    assert Record.model_validate_json(record.model_dump_json()) == record


async def test_a_rollback_that_is_not_seen_in_time_fails_the_run() -> None:
    never = FakeSession(failures=[0, 4])
    record = await run(never, method=[action()], rollbacks=[ROLLBACK | {"within_s": 1e-6}])
    assert record.ending == "DEVIATED"
    assert "rollback: not within 1e-06 s: availability: 0 is not equal to 1" in record.reason
    assert [found.ok for found in record.rollbacks] == [False]


async def test_a_guard_ends_the_run_and_what_was_stopped_goes_on() -> None:
    session = FakeSession(failures=[0, *[4] * 1000])
    steady = {"title": "s", "probes": [{"name": "availability", "tolerance": ">= 0.5", "mode": "continuous"}]}
    record = await run(session, method=[action("stop_actor")], observe_s=30.0, **{"steady-state-hypothesis": steady})
    assert record.ending == "ABORTED"
    assert session.target.done == ["stop actor-0", "resume actor-0"]


@pytest.mark.parametrize("fault", ["stop_actor", "stuck_compute", "nan_weights"])
async def test_an_interrupt_heals_before_it_ends(fault: str) -> None:
    session = FakeSession()

    async def interrupt(repetition: Repetition) -> None:
        await until(lambda: bool(session.target.done))
        repetition.interrupt("SIGTERM")

    record = await run(session, interrupt, method=[action(fault)], observe_s=30.0)
    assert (record.ending, record.reason) == ("INTERRUPTED", "SIGTERM")
    assert session.target.stopped == set()
    assert not any(session.target.playing.values())


@pytest.mark.parametrize(("name", "words"), [("inject", "not injected: ZeroDivisionError"), ("recover", "not recovered: ZeroDivisionError")])
async def test_a_fault_that_fails_in_a_way_that_nobody_foresaw_ends_the_run_all_the_same(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def breaks(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(FAULTS, "kill_actor", replace(FAULTS["kill_actor"], **{name: breaks}))
    async with asyncio.timeout(30.0):
        record = await run(FakeSession(), method=[action()])
    assert record.ending == "INTERRUPTED"
    assert words in record.reason


async def test_an_injection_that_fails_half_way_is_undone() -> None:
    session = FakeSession(target=FakeCluster(refuses="stuck_compute"))
    record = await run(session, method=[action("stuck_compute")])
    assert record.ending == "DEVIATED"
    assert "not injected" in record.reason
    assert "heal actor-0" in session.target.done


async def test_the_record_keeps_the_proof_that_a_fault_struck() -> None:
    record = await run(FakeSession(), method=[action("stuck_compute")])
    assert record.ending == "PASSED"
    assert record.actions[0].details["struck"] == {"stuck_compute": 3}


async def test_a_repetition_whose_fault_struck_nothing_does_not_pass() -> None:
    session = FakeSession(target=FakeCluster(num_struck=0))
    record = await run(session, method=[action("stuck_compute")])
    assert record.ending == "DEVIATED"
    assert "not recovered: stuck_compute struck nothing" in record.reason
    assert not any(session.target.playing.values())


async def test_a_cancelled_run_heals_all_the_same() -> None:
    session = FakeSession()
    repetition = Repetition(scenario_file(method=[action("stop_actor")], observe_s=30.0), cast("Session", session), 0, seed=1)
    task = asyncio.create_task(repetition.run())
    await until(lambda: bool(session.target.done))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert session.target.done == ["stop actor-0", "resume actor-0"]


async def test_an_error_of_our_own_ends_the_run_and_heals() -> None:
    session = FakeSession()

    def broken(_begin_s: float) -> float:
        message = "bug"
        raise ValueError(message)

    session.distrust_s = broken  # type: ignore[method-assign]
    record = await run(session, method=[action("stop_actor")], observe_s=30.0)
    assert (record.ending, record.reason) == ("INTERRUPTED", "ValueError: bug")
    assert session.target.done == ["stop actor-0", "resume actor-0"]


async def test_a_control_run_strikes_nobody_and_passes() -> None:
    session = FakeSession()
    record = await run(session)
    assert record.ending == "PASSED"
    assert session.target.done == []
