"""One actor at a time: what makes a router suspect, eject, try again and trust it."""

from __future__ import annotations

import pytest

from kit.liveness import TICK_S, Observed, kinds
from router_service.core.verdicts import Eject, LivenessLimits, State

OTHERS = ("n1/a", "n2/a", "n3/a")


def test_a_silent_actor_that_owes_rows_is_suspected_then_ejected() -> None:
    seen = Observed("n0/a", *OTHERS)
    seen.send("n0/a", rows=96)
    seen.silent.add("n0/a")
    assert kinds(seen.wait(0.1)) == ["Suspect"]
    assert seen.liveness.state("n0/a") is State.SUSPECTED
    (verdict,) = seen.wait(0.1)
    assert isinstance(verdict, Eject)
    assert verdict.actor == "n0/a"
    assert "silent" in verdict.evidence
    assert "96 rows" in verdict.evidence
    assert verdict.since_s == pytest.approx(100.0)
    assert seen.states() == {"n0/a": State.EJECTED, **dict.fromkeys(OTHERS, State.HEALTHY)}


def test_an_idle_actor_is_never_accused_however_silent() -> None:
    seen = Observed("n0/a", *OTHERS)
    seen.warm_up("n0/a")
    seen.silent.add("n0/a")
    assert seen.wait(30.0) == []


def test_only_actors_that_owe_rows_and_are_silent_are_probed_once_in_a_while() -> None:
    seen = Observed("n0/a", "n1/a", "n2/a")
    seen.send("n0/a", "n1/a")
    seen.now_s += seen.limits.probe_s
    seen.liveness.heard("n1/a", seen.now_s)
    assert seen.liveness.to_probe(seen.now_s) == ["n0/a"]
    assert seen.liveness.to_probe(seen.now_s + seen.limits.probe_s / 2) == []
    assert seen.liveness.to_probe(seen.now_s + seen.limits.probe_s) == ["n0/a", "n1/a"]


def test_an_answer_clears_suspicion_at_once() -> None:
    seen = Observed("n0/a", *OTHERS)
    seen.send("n0/a")
    seen.silent.add("n0/a")
    seen.wait(0.12)
    assert seen.liveness.state("n0/a") is State.SUSPECTED
    seen.answer("n0/a")
    assert seen.liveness.state("n0/a") is State.HEALTHY
    assert kinds(seen.tick()) == ["Clear"]


def test_a_standstill_lasts_from_the_first_row_owed_or_the_last_frame_done_and_the_observers_own_lateness_is_no_part_of_it() -> None:
    seen = Observed("n0/a", *OTHERS)
    liveness = seen.liveness
    assert liveness.standstill_s("n0/a", seen.now_s) is None
    liveness.heard("n0/a", seen.now_s, frames_done=7)
    seen.send("n0/a")
    assert liveness.standstill_s("n0/a", seen.now_s + 0.03) == pytest.approx(0.03)
    liveness.heard("n0/a", seen.now_s + 0.03, frames_done=7)
    assert liveness.standstill_s("n0/a", seen.now_s + 0.03) == pytest.approx(0.03)
    liveness.heard("n0/a", seen.now_s + 0.03, frames_done=8)
    assert liveness.standstill_s("n0/a", seen.now_s + 0.05) == pytest.approx(0.02)
    liveness.tick(seen.now_s + 0.06, late_s=0.02)
    assert liveness.standstill_s("n0/a", seen.now_s + 0.06) == pytest.approx(0.01)
    seen.answer("n0/a")
    assert liveness.standstill_s("n0/a", seen.now_s) is None


def test_a_pong_ends_suspicion_of_silence() -> None:
    seen = Observed("n0/a", *OTHERS)
    seen.send("n0/a")
    seen.silent.add("n0/a")
    seen.wait(0.12)
    seen.silent.clear()
    seen.frames_done["n0/a"] += 1
    assert kinds(seen.wait(0.06)) == ["Clear"]


def test_a_stuck_compute_thread_behind_an_answering_loop_is_ejected() -> None:
    seen = Observed("n0/a", *OTHERS)
    seen.warm_up("n0/a")
    seen.send("n0/a")
    verdicts = seen.wait(0.24)
    assert kinds(verdicts) == ["Suspect", "Eject"]
    assert "no frame done" in verdicts[-1].evidence


def test_a_stuck_compute_thread_is_seen_even_if_older_progress_was_not_yet_reported() -> None:
    seen = Observed("n0/a", *OTHERS)
    seen.warm_up("n0/a")
    seen.pong("n0/a")
    seen.warm_up("n0/a", frames=5)  # answered since: the next Pong's count is no news
    seen.send("n0/a")
    assert kinds(seen.wait(0.24)) == ["Suspect", "Eject"]


def test_a_slow_actor_of_large_frames_that_progresses_is_not_accused() -> None:
    seen = Observed("n0/a", *OTHERS)
    for _ in range(10):
        seen.send("n0/a", rows=4096)
        assert seen.wait(2.0) == []
        seen.answer("n0/a", rows=4096, took_s=2.0)
    assert seen.tick() == []


def test_small_frames_teach_no_impatience_with_a_first_large_one() -> None:
    seen = Observed("n0/a", *OTHERS)
    seen.warm_up("n0/a", rows=2, took_s=0.002, frames=500)
    seen.send("n0/a", rows=4096)
    assert seen.wait(1.0) == []


def test_rows_of_other_routers_ahead_in_its_queue_are_allowed_for() -> None:
    seen = Observed("n0/a", *OTHERS)
    seen.warm_up("n0/a", rows=512, took_s=0.1)
    seen.send("n0/a", rows=8)
    for _ in range(20):
        seen.now_s += TICK_S
        seen.liveness.heard("n0/a", seen.now_s, frames_done=21, oldest_age_s=0.1, queued_rows=4096)
        assert seen.tick() == []


def test_progress_for_other_routers_counts() -> None:
    seen = Observed("n0/a", *OTHERS)
    seen.warm_up("n0/a")
    seen.send("n0/a")
    for _ in range(20):
        seen.frames_done["n0/a"] += 1
        assert seen.wait(0.06) == []


def test_one_stall_does_not_excuse_the_next() -> None:
    seen = Observed("n0/a", *OTHERS)
    seen.warm_up("n0/a")
    seen.send("n0/a")
    seen.now_s += 20.0
    seen.answer("n0/a", took_s=20.0)
    seen.send("n0/a")
    assert "Eject" in kinds(seen.wait(0.5))


def test_a_loading_actor_is_not_suspected() -> None:
    seen = Observed("n0/a", *OTHERS)
    seen.loading.add("n0/a")
    seen.pong("n0/a")
    seen.send("n0/a")
    assert seen.wait(60.0) == []
    seen.loading.clear()
    seen.wait(0.04)  # it says that it is done: its time begins now
    assert seen.wait(0.06) == []


def test_a_loading_actor_that_falls_silent_has_a_grace_and_no_more() -> None:
    seen = Observed("n0/a", *OTHERS)
    seen.loading.add("n0/a")
    seen.pong("n0/a")
    seen.send("n0/a")
    seen.silent.add("n0/a")
    assert seen.wait(seen.limits.loading_grace_s) == []
    assert kinds(seen.wait(0.22)) == ["Suspect", "Eject"]


def test_a_sign_of_life_that_is_no_pong_ends_no_loading() -> None:
    seen = Observed("n0/a", *OTHERS)
    seen.loading.add("n0/a")
    seen.pong("n0/a")
    seen.liveness.heard("n0/a", seen.now_s)
    seen.send("n0/a")
    seen.silent.add("n0/a")
    assert seen.wait(1.0) == []


def ejected_once() -> Observed:
    seen = Observed("n0/a", *OTHERS)
    seen.send("n0/a")
    seen.silent.add("n0/a")
    seen.wait(0.2)
    assert seen.ejected() == {"n0/a"}
    return seen


def test_an_ejected_actor_is_tried_with_one_frame_when_its_time_is_over() -> None:
    seen = ejected_once()
    assert not seen.liveness.may_send("n0/a")
    assert seen.wait(0.22) == []
    assert kinds(seen.wait(0.04)) == ["Readmit"]
    assert seen.liveness.may_send("n0/a")
    seen.send("n0/a")
    assert seen.liveness.state("n0/a") is State.ON_TRIAL
    assert not seen.liveness.may_send("n0/a")


def test_a_pong_readmits_nobody() -> None:
    seen = ejected_once()
    seen.silent.clear()
    seen.frames_done["n0/a"] += 5
    for _ in range(10):
        seen.pong("n0/a")
        assert seen.tick() == []
    assert seen.ejected() == {"n0/a"}
    seen.wait(0.3)
    seen.pong("n0/a")
    seen.tick()
    assert seen.liveness.state("n0/a") is State.ON_TRIAL


def test_success_on_real_rows_ends_the_trial() -> None:
    seen = ejected_once()
    seen.silent.clear()
    seen.wait(0.3)
    seen.send("n0/a")
    seen.answer("n0/a")
    assert seen.liveness.state("n0/a") is State.HEALTHY
    assert kinds(seen.tick()) == ["Clear"]


def test_late_answers_of_one_that_resumed_bring_its_trial_at_once() -> None:
    seen = ejected_once()
    seen.answer("n0/a")
    assert seen.liveness.state("n0/a") is State.ON_TRIAL
    seen.answer("n0/a")  # a second old frame is no trial
    assert seen.liveness.state("n0/a") is State.ON_TRIAL
    assert kinds(seen.tick()) == ["Readmit"]


def fail_trial(seen: Observed) -> float:
    """Wait for the next trial and fail it; how long it had to be waited for."""
    began_s = seen.now_s
    while seen.liveness.state("n0/a") is State.EJECTED:
        seen.wait(TICK_S)
    waited_s = seen.now_s - began_s
    seen.send("n0/a")
    seen.wait(0.2)
    assert seen.ejected() == {"n0/a"}
    return waited_s


def test_each_failed_trial_doubles_the_time_up_to_its_limit() -> None:
    seen = ejected_once()
    waited_s = [fail_trial(seen) for _ in range(10)]
    assert waited_s == pytest.approx([0.25, 0.5, 1, 2, 4, 8, 16, 30, 30, 30], abs=TICK_S)


def test_one_that_flaps_serves_its_time_whatever_it_answers_late() -> None:
    seen = ejected_once()
    seen.silent.clear()
    seen.answer("n0/a")
    seen.send("n0/a")
    seen.answer("n0/a")
    assert seen.liveness.state("n0/a") is State.HEALTHY
    seen.send("n0/a")
    seen.silent.add("n0/a")
    seen.wait(0.2)
    seen.answer("n0/a")
    assert seen.liveness.state("n0/a") is State.EJECTED
    assert "Readmit" not in kinds(seen.wait(0.46))
    assert "Readmit" in kinds(seen.wait(0.06))


def test_ejections_are_forgotten_in_health() -> None:
    seen = ejected_once()
    assert fail_trial(seen) == pytest.approx(0.25, abs=TICK_S)
    seen.silent.clear()
    seen.wait(0.6)
    seen.send("n0/a")
    seen.answer("n0/a")
    seen.wait(2 * seen.limits.forgive_s)
    seen.send("n0/a")
    seen.silent.add("n0/a")
    seen.wait(0.2)
    assert fail_trial(seen) == pytest.approx(0.25, abs=TICK_S)


def test_a_lost_actor_is_ejected_until_it_is_back_and_its_time_is_over() -> None:
    seen = Observed("n0/a", *OTHERS)
    seen.send("n0/a")
    assert kinds(seen.lose("n0/a")) == ["Eject"]
    assert seen.lose("n0/a") == []
    assert seen.wait(1.0) == []
    seen.join("n0/a")
    assert seen.liveness.state("n0/a") is State.EJECTED
    assert kinds(seen.tick()) == ["Readmit"]
    seen.send("n0/a")
    seen.answer("n0/a")
    assert kinds(seen.tick()) == ["Clear"]


def test_links_that_flap_wait_longer_each_time() -> None:
    seen = Observed("n0/a", *OTHERS)
    for away_s in (0.25, 0.5, 1.0):
        seen.lose("n0/a")
        seen.join("n0/a")
        assert kinds(seen.wait(away_s - 2 * TICK_S)) == []
        assert kinds(seen.wait(3 * TICK_S)) == ["Readmit"]
        seen.send("n0/a")
        seen.answer("n0/a")
        seen.tick()


def test_a_loss_overtakes_what_was_still_to_be_told() -> None:
    seen = Observed("n0/a", *OTHERS)
    seen.send("n0/a")
    seen.silent.add("n0/a")
    seen.wait(0.12)
    seen.answer("n0/a")
    assert kinds(seen.lose("n0/a")) == ["Eject"]
    assert seen.tick() == []


def test_one_that_is_lost_again_before_anybody_heard_that_it_was_back_was_never_back() -> None:
    seen = ejected_once()
    seen.answer("n0/a")
    assert seen.lose("n0/a") == []
    assert seen.ejected() == {"n0/a"}
    assert seen.wait(1.0) == []


def test_an_actor_that_left_is_forgotten() -> None:
    seen = ejected_once()
    seen.answer("n0/a")
    seen.liveness.left("n0/a")
    assert seen.tick() == []
    assert seen.liveness.state("n0/a") is State.HEALTHY
    seen.liveness.answered("n0/a", 8, 0.1, seen.now_s)
    seen.liveness.heard("n0/a", seen.now_s)
    seen.liveness.sent("n0/a", 8, seen.now_s)
    assert seen.lose("n0/a") == []
    assert seen.wait(1.0) == []


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"liveness\.suspect_s"):
        LivenessLimits(suspect_s=0.3, eject_s=0.2)
    with pytest.raises(ValueError, match=r"liveness\.first_readmit_s"):
        LivenessLimits(first_readmit_s=31.0)
