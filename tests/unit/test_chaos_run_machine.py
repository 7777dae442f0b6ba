from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.core.run_machine import (
    Checked,
    Ending,
    Event,
    Finish,
    GuardTripped,
    Inject,
    Injected,
    InjectFailed,
    Interrupted,
    Phase,
    Planned,
    ProbeSteadyState,
    Recover,
    Recovered,
    RecoverFailed,
    RollBack,
    RollbackMissed,
    RollbackSeen,
    RunMachine,
    SteadyStateProbed,
    Step,
    TimePassed,
    WakeAt,
)
from chaos.core.tolerance import Verdict

GOOD = (Verdict(ok=True, reason="fine"),)
BAD = (Verdict(ok=False, reason="failed: 3 is not equal to 0"),)


def begun(*method: Planned, observe_s: float = 3.0, num_rollbacks: int = 0) -> tuple[RunMachine, list[Step]]:
    """A machine whose steady state was met at 0 s, and its first steps."""
    machine = RunMachine(method, observe_s, num_rollbacks)
    assert machine.step(Checked(), 0.0) == [ProbeSteadyState("before")]
    return machine, machine.step(SteadyStateProbed("before", GOOD), 0.0)


def test_a_run_goes_through_every_phase_in_order() -> None:
    machine, steps = begun(Planned("kill", 1.0))
    assert (machine.phase, steps) == (Phase.INJECT, [WakeAt(1.0)])
    assert machine.step(TimePassed(), 1.0) == [Inject(0)]
    assert machine.step(Injected(0, 1.01), 1.02) == [WakeAt(4.01)]
    assert machine.phase is Phase.OBSERVE
    assert machine.step(TimePassed(), 4.01) == [Recover(0)]
    assert machine.phase is Phase.RECOVER
    assert machine.step(Recovered(0), 6.0) == [ProbeSteadyState("after")]
    assert machine.phase is Phase.VERIFY
    assert machine.step(SteadyStateProbed("after", GOOD), 7.0) == [Finish(Ending.PASSED, "")]
    assert machine.phase is Phase.DONE
    assert machine.step(TimePassed(), 9.0) == []


def test_a_timed_fault_is_undone_on_time_and_watched_on() -> None:
    machine, steps = begun(Planned("freeze", 0.0, seconds=0.5))
    assert steps == [Inject(0)]
    assert machine.step(Injected(0, 0.0), 0.0) == [WakeAt(0.5)]
    assert machine.step(TimePassed(), 0.5) == [Recover(0)]
    assert machine.step(Recovered(0), 0.6) == [WakeAt(3.0)]
    assert machine.step(TimePassed(), 3.0) == [ProbeSteadyState("after")]


def test_a_bad_scenario_injects_nothing() -> None:
    machine = RunMachine([Planned("kill", 0.0)], 1.0)
    assert machine.step(Checked(("nobody fits",)), 0.0) == [Finish(Ending.BAD_SCENARIO, "nobody fits")]
    assert machine.phase is Phase.ABORTED


def test_without_a_steady_state_nothing_is_injected() -> None:
    machine = RunMachine([Planned("kill", 0.0)], 1.0)
    machine.step(Checked(), 0.0)
    assert machine.step(SteadyStateProbed("before", BAD), 0.0) == [Finish(Ending.BASELINE_NOT_MET, "failed: 3 is not equal to 0")]


def test_a_deviation_after_is_told_by_its_reason() -> None:
    machine, _ = begun(observe_s=0.0)
    assert machine.phase is Phase.VERIFY
    assert machine.step(SteadyStateProbed("after", BAD), 1.0) == [Finish(Ending.DEVIATED, "after: failed: 3 is not equal to 0")]


def test_a_guard_ends_the_timeline_and_undoes_everything_the_last_first() -> None:
    machine, _ = begun(Planned("a", 0.0), Planned("b", 0.0), Planned("never", 9.0))
    machine.step(Injected(0, 0.0), 0.0)
    machine.step(Injected(1, 0.0), 0.0)
    assert machine.step(GuardTripped("availability"), 1.0) == [Recover(1), Recover(0)]
    assert machine.step(Recovered(1), 1.1) == []
    assert machine.step(Recovered(0), 1.2) == [Finish(Ending.ABORTED, "availability")]
    assert machine.phase is Phase.ABORTED


def test_an_interrupt_waits_for_an_injection_under_way_before_it_undoes_it() -> None:
    machine, steps = begun(Planned("a", 0.0))
    assert steps == [Inject(0)]
    assert machine.step(Interrupted("SIGINT"), 0.1) == []
    assert machine.step(Injected(0, 0.2), 0.2) == [Recover(0)]
    assert machine.step(Recovered(0), 0.3) == [Finish(Ending.INTERRUPTED, "SIGINT")]


def test_what_was_half_injected_is_undone_too() -> None:
    machine, _ = begun(Planned("a", 0.0))
    assert machine.step(InjectFailed(0, "refused"), 0.1) == [Recover(0)]
    assert machine.step(Recovered(0), 0.2) == [Finish(Ending.DEVIATED, "a: not injected: refused")]


def test_what_fails_after_the_injection_neither_ends_it_nor_undoes_it_twice() -> None:
    machine, _ = begun(Planned("a", 0.0), observe_s=0.0)
    machine.step(Injected(0, 0.0), 0.0)
    assert machine.step(InjectFailed(0, "the router was not asked"), 0.1) == []
    assert machine.step(Recovered(0), 0.2) == [ProbeSteadyState("after")]


def test_a_recovery_that_failed_is_a_deviation() -> None:
    machine, _ = begun(Planned("a", 0.0), observe_s=0.0)
    machine.step(Injected(0, 0.0), 0.0)
    assert machine.step(RecoverFailed(0, "still gone"), 5.0) == [ProbeSteadyState("after")]
    assert machine.step(SteadyStateProbed("after", GOOD), 6.0) == [Finish(Ending.DEVIATED, "a: not recovered: still gone")]


def test_rollbacks_are_asked_for_once_everything_is_undone_and_before_the_steady_state() -> None:
    machine, _ = begun(Planned("a", 0.0), observe_s=0.0, num_rollbacks=2)
    assert machine.step(Injected(0, 0.0), 0.0) == [Recover(0)]
    assert machine.step(Recovered(0), 1.0) == [RollBack(0), RollBack(1)]
    assert machine.step(RollbackSeen(1), 1.5) == []
    assert machine.step(RollbackSeen(0), 2.0) == [ProbeSteadyState("after")]
    assert machine.step(SteadyStateProbed("after", GOOD), 3.0) == [Finish(Ending.PASSED, "")]


def test_a_rollback_that_was_not_seen_is_a_deviation() -> None:
    machine, steps = begun(observe_s=0.0, num_rollbacks=1)
    assert steps == [RollBack(0)]
    assert machine.step(RollbackMissed(0, "leak: 3 is not equal to 0"), 9.0) == [ProbeSteadyState("after")]
    assert machine.step(SteadyStateProbed("after", GOOD), 10.0) == [Finish(Ending.DEVIATED, "rollback: leak: 3 is not equal to 0")]


def test_a_run_that_was_stopped_waits_for_no_rollback() -> None:
    machine, _ = begun(Planned("a", 0.0), num_rollbacks=1)
    machine.step(Injected(0, 0.0), 0.0)
    assert machine.step(Interrupted("SIGINT"), 0.1) == [Recover(0)]
    assert machine.step(Recovered(0), 0.2) == [Finish(Ending.INTERRUPTED, "SIGINT")]
    during, _ = begun(observe_s=0.0, num_rollbacks=1)
    assert during.step(Interrupted("SIGINT"), 0.1) == [Finish(Ending.INTERRUPTED, "SIGINT")]


def test_an_interrupt_during_the_baseline_injects_nothing() -> None:
    machine = RunMachine([Planned("kill", 0.0)], 1.0)
    machine.step(Checked(), 0.0)
    assert machine.step(Interrupted("SIGTERM"), 0.5) == [Finish(Ending.INTERRUPTED, "SIGTERM")]


@pytest.mark.parametrize("ending", list(Ending))
def test_exit_codes_are_those_that_are_documented(ending: Ending) -> None:
    assert {"PASSED": 0, "DEVIATED": 1, "BAD_SCENARIO": 2, "BASELINE_NOT_MET": 3, "ABORTED": 4, "INTERRUPTED": 5}[ending.name] == ending


PLANS = st.lists(st.tuples(st.floats(0, 5), st.none() | st.floats(0.1, 5)), max_size=4)
TROUBLE = st.lists(st.sampled_from(["guard", "interrupt", "inject_fails", "recover_fails", "nothing"]), max_size=30)


def answer(step: Step, what: str, now_s: float) -> list[Event]:
    """What a runner tells of a step, in trouble or not."""
    match step:
        case ProbeSteadyState(when):
            return [SteadyStateProbed(when, GOOD)]
        case Inject(action):
            return [InjectFailed(action, "no") if what == "inject_fails" else Injected(action, now_s)]
        case Recover(action):
            return [RecoverFailed(action, "no") if what == "recover_fails" else Recovered(action)]
        case RollBack(rollback):
            return [RollbackMissed(rollback, "no") if what == "recover_fails" else RollbackSeen(rollback)]
    return []


@given(PLANS, TROUBLE, st.integers(0, 2))
def test_whatever_happens_every_begun_action_is_recovered_exactly_once_before_the_end(
    plans: list[tuple[float, float | None]], trouble: list[str], num_rollbacks: int
) -> None:
    method = [Planned(f"a{number}", at_s, seconds) for number, (at_s, seconds) in enumerate(sorted(plans, key=lambda plan: plan[0]))]
    machine, now_s = RunMachine(method, 1.0, num_rollbacks), 0.0
    waiting: list[Event] = [Checked()]
    done: list[Step] = []
    for _ in range(200):
        what = trouble.pop() if trouble else "nothing"
        if what in {"guard", "interrupt"}:
            waiting.append(GuardTripped("g") if what == "guard" else Interrupted("i"))
        for step in machine.step(waiting.pop(0) if waiting else TimePassed(), now_s):
            assert not isinstance(step, RollBack | Finish) or machine.active == []
            done.append(step)
            waiting += answer(step, what, now_s)
            now_s = max(now_s, step.at_s) if isinstance(step, WakeAt) else now_s
        if done and isinstance(done[-1], Finish):
            break
    assert isinstance(done[-1], Finish), "the machine did not end"
    begun_actions = Counter(step.action for step in done if isinstance(step, Inject))
    assert begun_actions == Counter(step.action for step in done if isinstance(step, Recover))
    assert max(begun_actions.values(), default=1) == 1
