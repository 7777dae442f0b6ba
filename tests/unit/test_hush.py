"""Silences that ended well: how they lengthen what a node is given, how far, and for how long."""

from __future__ import annotations

import pytest

from kit.liveness import TICK_S, Observed, kinds
from router_service.core.hush import FACTOR, HALF_LIFE_S, Hush
from router_service.core.verdicts import State

OTHERS = ("n1/a", "n2/a", "n3/a")


def survive(seen: Observed, actor: str, silent_s: float) -> None:
    """An actor that owes rows says nothing for so long, and answers."""
    seen.send(actor)
    seen.silent.add(actor)
    seen.wait(silent_s)
    seen.silent.discard(actor)
    seen.answer(actor)
    seen.tick()
    assert seen.liveness.state(actor) is State.HEALTHY


def ejected_after_s(seen: Observed, actor: str) -> float:
    """An actor falls silent for good: after how long it gets no rows any more."""
    seen.send(actor)
    seen.silent.add(actor)
    begun_s = seen.now_s
    while seen.liveness.state(actor) is not State.EJECTED:
        assert seen.now_s - begun_s < 5.0
        seen.wait(TICK_S)
    return seen.now_s - begun_s


def test_a_silence_that_ended_well_lengthens_the_next_of_its_node_and_of_no_other() -> None:
    seen = Observed("n0/a", "n0/b", *OTHERS)
    survive(seen, "n0/a", 0.16)
    assert ejected_after_s(seen, "n1/a") == pytest.approx(seen.limits.eject_s, abs=1.5 * TICK_S)
    assert ejected_after_s(seen, "n0/b") == pytest.approx(FACTOR * 0.16, abs=2 * TICK_S)


def test_suspicion_comes_as_early_as_ever() -> None:
    seen = Observed("n0/a", *OTHERS)
    survive(seen, "n0/a", 0.16)
    seen.send("n0/a")
    seen.silent.add("n0/a")
    assert kinds(seen.wait(0.1)) == ["Suspect"]


def test_it_fades() -> None:
    seen = Observed("n0/a", *OTHERS)
    survive(seen, "n0/a", 0.16)
    seen.now_s += HALF_LIFE_S
    assert ejected_after_s(seen, "n0/a") == pytest.approx(seen.limits.eject_s, abs=1.5 * TICK_S)


def test_it_has_a_limit_and_the_limit_never_shortens_what_was_asked_for() -> None:
    hush = Hush()
    hush.learn(5.0, 0.0)
    assert hush.patience_s(0.2, 1.0, 0.0) == 1.0
    assert hush.patience_s(3.0, 1.0, 0.0) == 3.0
    assert Hush().patience_s(0.2, 1.0, 0.0) == 0.2


def test_silences_that_ended_in_an_ejection_teach_nothing() -> None:
    seen = Observed("n0/a", "n0/b", *OTHERS)
    usual_s = ejected_after_s(seen, "n0/a")
    seen.silent.discard("n0/a")
    seen.answer("n0/a")
    seen.wait(1.0)  # else the two would speak for their node
    assert ejected_after_s(seen, "n0/b") == pytest.approx(usual_s, abs=1.5 * TICK_S)


def test_a_silence_that_the_observer_did_not_hear_to_its_end_teaches_nothing() -> None:
    seen = Observed("n0/a", *OTHERS)
    seen.send("n0/a")
    seen.now_s += 0.5
    seen.answer("n0/a")  # it comes first, then the beat that says how late it is
    seen.tick(late_s=0.48)
    assert ejected_after_s(seen, "n0/a") == pytest.approx(seen.limits.eject_s, abs=1.5 * TICK_S)


def test_on_a_busy_machine_the_observer_is_late_too_and_learns_all_the_same() -> None:
    seen = Observed("n0/a", *OTHERS)
    seen.send("n0/a")
    seen.silent.add("n0/a")
    seen.wait(0.14)
    seen.silent.discard("n0/a")
    seen.now_s += 0.04
    seen.answer("n0/a")
    seen.tick(late_s=0.02)
    assert ejected_after_s(seen, "n0/a") == pytest.approx(FACTOR * 0.16, abs=2 * TICK_S)


def test_what_is_known_of_a_node_goes_with_the_last_of_its_actors() -> None:
    seen = Observed("n0/a", "n0/b", *OTHERS)
    survive(seen, "n0/a", 0.16)
    seen.liveness.left("n0/a")
    assert set(seen.liveness._hushes) == {"n0", "n1", "n2", "n3"}
    seen.liveness.left("n0/b")
    assert set(seen.liveness._hushes) == {"n1", "n2", "n3"}


def test_a_loading_actor_may_be_silent_and_that_teaches_nothing() -> None:
    seen = Observed("n0/a", "n0/b", *OTHERS)
    seen.loading.add("n0/a")
    seen.send("n0/a")
    seen.pong("n0/a")
    survive(seen, "n0/a", 0.8)
    assert ejected_after_s(seen, "n0/b") == pytest.approx(seen.limits.eject_s, abs=1.5 * TICK_S)


def test_a_compute_thread_that_stands_still_behind_a_loop_that_answers_is_judged_as_ever() -> None:
    usual, hushed = Observed("n0/a", *OTHERS), Observed("n0/a", *OTHERS)
    survive(hushed, "n0/a", 0.16)
    took_s = []
    for seen in (usual, hushed):
        seen.warm_up("n0/a")
        seen.send("n0/a")
        begun_s = seen.now_s
        while seen.liveness.state("n0/a") is not State.EJECTED:
            assert seen.now_s - begun_s < 5.0
            seen.wait(TICK_S)
        took_s.append(seen.now_s - begun_s)
    assert took_s[1] == pytest.approx(took_s[0], abs=1.5 * TICK_S)
