"""Many actors at once: lost nodes and GPUs, an observer that was late, and one that doubts itself."""

from __future__ import annotations

import pytest

from cluster.core.spec import LivenessSpec
from kit.liveness import TICK_S, Observed, kinds
from router_service.core.verdicts import LivenessLimits, State
from router_service.router_parts import liveness_limits

TWO_NODES = ("n0/a", "n0/b", "n0/c", "n0/d", "n1/a", "n1/b", "n1/c", "n1/d")
TWO_GPUS = ("n0/cuda:0/a", "n0/cuda:0/b", "n0/cuda:0/c", "n0/cuda:1/d", "n0/cuda:1/e", "n1/cuda:0/f")


def test_two_lost_actors_of_a_node_take_the_rest_of_it_with_them() -> None:
    seen = Observed(*TWO_NODES)
    assert [verdict.actor for verdict in seen.lose("n0/a")] == ["n0/a"]
    seen.now_s += 0.15
    verdicts = seen.lose("n0/b")
    assert [verdict.actor for verdict in verdicts] == ["n0/b", "n0/c", "n0/d"]
    assert "node n0: n0/a and n0/b" in verdicts[-1].evidence


def test_losses_further_apart_than_the_window_tell_nothing_of_the_node() -> None:
    seen = Observed(*TWO_NODES)
    seen.lose("n0/a")
    seen.now_s += 0.25
    assert [verdict.actor for verdict in seen.lose("n0/b")] == ["n0/b"]


def test_losses_on_two_nodes_are_two_losses() -> None:
    seen = Observed(*TWO_NODES)
    seen.lose("n0/a")
    seen.lose("n1/a")
    assert seen.ejected() == {"n0/a", "n1/a"}


def test_a_frozen_node_is_ejected_with_its_idle_actors() -> None:
    seen = Observed(*TWO_NODES)
    seen.send("n0/a", "n0/b", "n1/a")
    seen.silent.update(actor for actor in TWO_NODES if actor.startswith("n0"))
    seen.wait(0.1)
    seen.answer("n1/a")
    seen.wait(0.1)
    assert seen.ejected() == {"n0/a", "n0/b", "n0/c", "n0/d"}


def test_a_neighbour_that_is_ejected_and_one_that_is_suspected_speak_for_the_node() -> None:
    seen = Observed(*TWO_NODES)
    seen.silent.update(("n0/a", "n0/b"))
    seen.send("n0/a")
    seen.now_s += 0.06
    seen.send("n0/b")
    seen.wait(0.14)
    assert seen.ejected() == {"n0/a", "n0/b", "n0/c", "n0/d"}


def test_two_suspects_alone_eject_nobody() -> None:
    seen = Observed(*TWO_NODES)
    seen.silent.update(("n0/a", "n0/b"))
    seen.send("n0/a", "n0/b")
    assert kinds(seen.wait(0.18)) == ["Suspect", "Suspect"]
    assert seen.ejected() == set()


def test_a_neighbour_that_was_heard_since_stays() -> None:
    seen = Observed(*TWO_NODES)
    seen.silent.update(("n0/a", "n0/b"))
    seen.send("n0/a", "n0/b")
    seen.wait(0.1)
    seen.send("n0/c")
    seen.answer("n0/c")
    seen.wait(0.12)
    assert seen.ejected() == {"n0/a", "n0/b", "n0/d"}


def test_two_actors_of_one_of_several_gpus_take_that_gpu_only() -> None:
    seen = Observed(*TWO_GPUS)
    seen.lose("n0/cuda:0/a")
    verdicts = seen.lose("n0/cuda:0/b")
    assert seen.ejected() == {"n0/cuda:0/a", "n0/cuda:0/b", "n0/cuda:0/c"}
    assert "cuda:0 of node n0" in verdicts[-1].evidence


def test_actors_of_two_gpus_take_the_whole_node() -> None:
    seen = Observed(*TWO_GPUS)
    seen.lose("n0/cuda:0/a")
    seen.lose("n0/cuda:1/d")
    assert seen.ejected() == set(TWO_GPUS) - {"n1/cuda:0/f"}


def test_stuck_compute_threads_say_nothing_of_their_node() -> None:
    seen = Observed(*TWO_NODES)
    seen.warm_up("n0/a", "n0/b")
    seen.send("n0/a", "n0/b")
    seen.wait(0.3)
    assert seen.ejected() == {"n0/a", "n0/b"}


def test_neighbours_are_not_ejected_for_others_when_nobody_would_be_left() -> None:
    seen = Observed("n0/a", "n0/b", "n0/c", "n0/d")
    seen.lose("n0/a")
    seen.lose("n0/b")
    assert seen.ejected() == {"n0/a", "n0/b"}


def test_neighbours_that_still_answer_are_tried_at_once() -> None:
    seen = Observed(*TWO_NODES)
    seen.send("n0/c")
    seen.lose("n0/a")
    seen.lose("n0/b")
    assert seen.liveness.state("n0/c") is State.EJECTED
    seen.answer("n0/c")
    assert seen.liveness.state("n0/c") is State.ON_TRIAL


def test_a_planned_end_is_no_casualty() -> None:
    seen = Observed(*TWO_NODES)
    seen.lose("n0/a")
    seen.liveness.left("n0/a")
    seen.lose("n0/b")
    assert seen.ejected() == {"n0/b"}


def test_the_end_of_an_ejected_actor_is_no_casualty() -> None:
    seen = Observed(*TWO_NODES)
    seen.warm_up("n0/a")
    seen.send("n0/a")
    seen.wait(0.3)
    assert seen.ejected() == {"n0/a"}
    assert seen.lose("n0/a") == []
    assert [verdict.actor for verdict in seen.lose("n0/b")] == ["n0/b"]


@pytest.mark.parametrize("num_silent", [3, 4])
def test_an_observer_that_hears_less_than_half_doubts_itself(num_silent: int) -> None:
    actors = [f"n{index}/a" for index in range(5)]
    seen = Observed(*actors)
    seen.silent.update(actors[:num_silent])
    seen.send(*actors[:num_silent])
    assert seen.wait(5.0) == []
    assert seen.liveness.doubts_itself
    seen.answer(*actors[1:num_silent])
    seen.wait(0.02)
    assert not seen.liveness.doubts_itself
    assert seen.ejected() == {actors[0]}


def test_doubt_of_oneself_does_not_excuse_for_ever_those_that_are_heard_and_do_nothing() -> None:
    actors = [f"n{index}/a" for index in range(5)]
    seen = Observed(*actors)
    seen.warm_up(*actors[:3])
    seen.send(*actors[:3])
    assert seen.wait(1.9) == []
    assert seen.liveness.doubts_itself
    seen.wait(0.2)
    assert seen.ejected() == set(actors[:3])


def test_half_of_the_actors_silent_is_no_reason_to_doubt() -> None:
    actors = [f"n{index}/a" for index in range(4)]
    seen = Observed(*actors)
    seen.silent.update(actors[:2])
    seen.send(*actors[:2])
    seen.wait(0.2)
    assert seen.ejected() == set(actors[:2])


def test_actors_that_were_ejected_before_count_when_the_observer_doubts_itself() -> None:
    actors = [f"n{index}/a" for index in range(4)]
    seen = Observed(*actors)
    seen.silent.update(actors)
    for actor in actors:
        seen.send(actor)
        seen.wait(0.21)
    assert len(seen.ejected()) <= 2


def test_resets_are_believed_even_in_doubt() -> None:
    actors = [f"n{index}/a" for index in range(5)]
    seen = Observed(*actors)
    seen.silent.update(actors[:3])
    seen.send(*actors[:3])
    seen.wait(0.3)
    assert seen.liveness.doubts_itself
    for actor in actors[1:]:
        seen.lose(actor)
    assert seen.ejected() == set(actors[1:])


@pytest.mark.parametrize("late_s", [0.3, 5.0, 600.0])
def test_a_late_observer_accuses_nobody(late_s: float) -> None:
    seen = Observed(*TWO_NODES)
    seen.send("n0/a")
    seen.now_s += 0.02 + late_s
    assert seen.tick(late_s=late_s) == []
    assert seen.wait(0.06) == []


def test_what_was_heard_just_after_a_pause_is_not_taken_to_lie_in_the_future() -> None:
    seen = Observed(*TWO_NODES)
    seen.send("n0/a")
    seen.now_s += 10.0
    seen.liveness.heard("n0/a", seen.now_s)
    seen.silent.add("n0/a")
    assert seen.tick(late_s=9.98) == []
    assert kinds(seen.wait(0.2)) == ["Suspect", "Eject"]


def test_a_late_observer_still_ejects_those_that_stay_silent() -> None:
    seen = Observed(*TWO_NODES)
    seen.send("n0/a")
    seen.silent.add("n0/a")
    seen.wait(0.04)
    seen.now_s += 3.0
    assert seen.tick(late_s=3.0) == []
    assert kinds(seen.wait(0.16)) == ["Suspect", "Eject"]


@pytest.mark.parametrize("stopped", [("n0/a",), ("n0/a", "n0/b")])
@pytest.mark.parametrize("resumes_after_s", [0.05, 0.1, 0.18, 0.25])
def test_by_default_a_stop_of_up_to_a_quarter_second_ejects_nobody(stopped: tuple[str, ...], resumes_after_s: float) -> None:
    """Late rows are hedged long before; an ejection would cost the actor its trial, and the cluster a repair, for what is over already."""
    seen = Observed("n0/a", "n0/b", "n1/a", "n1/b", "n2/a", limits=LivenessLimits())
    seen.warm_up(*stopped)
    seen.send(*stopped)
    seen.silent.update(stopped)
    resumes_s = seen.now_s + resumes_after_s
    while seen.now_s + TICK_S <= resumes_s:
        seen.wait(TICK_S)
    seen.now_s = resumes_s
    seen.silent.clear()
    seen.answer(*stopped)
    seen.wait(1.0)
    assert "Eject" not in kinds(seen.log)
    assert set(seen.states().values()) == {State.HEALTHY}


@pytest.mark.parametrize("stopped", [("n0/a",), ("n0/a", "n0/b")])
def test_by_default_a_stop_of_over_a_third_of_a_second_ejects_who_stopped(stopped: tuple[str, ...]) -> None:
    seen = Observed("n0/a", "n0/b", "n1/a", "n1/b", "n2/a", limits=LivenessLimits())
    seen.warm_up(*stopped)
    seen.send(*stopped)
    seen.silent.update(stopped)
    seen.wait(0.34)
    assert seen.ejected() == set(stopped)


def test_the_spec_and_the_limits_agree_on_their_defaults() -> None:
    assert liveness_limits(LivenessSpec()) == LivenessLimits()
