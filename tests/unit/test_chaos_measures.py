from __future__ import annotations

from dataclasses import replace

import pytest

from chaos.core import measures
from chaos.core.observations import Request, Strike, quantile
from cluster.core.ids import ExpertId, Incarnation
from kit.chaos import MODEL, observations, request, sample

A, B, LATER = Incarnation("actor-0", 1), Incarnation("actor-1", 2), Incarnation("actor-0", 3)
KILLED = Strike("kill_actor", "actor-0/g1", frozenset({A}), at_s=10.0)
WANTED = {ExpertId(MODEL, 0, 0): 1, ExpertId(MODEL, 0, 1): 1}
BEFORE = sample(9.0, {A: "ready", B: "ready"}, {0: {A}, 1: {B}})


def test_quantiles_are_values_that_occurred() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile(range(1, 101), 0.99) == 99
    assert quantile([5.0], 0.99) == 5.0
    assert quantile([], 0.5) is None


def test_the_affected_set_is_who_was_alive_within_the_window_and_latency_counts_from_when_it_was_due() -> None:
    over, during, begun_late, later = request(9.99), request(10.5, took_s=2.0), request(11.5, took_s=0.6), request(12.0, took_s=0.5)
    seen = observations([over, during, begun_late, later], strikes=[KILLED])
    assert measures.affected(seen) == [during, begun_late]
    assert measures.latencies_ms([during]) == [pytest.approx(2000.0)]
    assert measures.control(seen) == [over]  # `during` met the fault


def test_failed_late_and_wrong_requests_are_counted() -> None:
    seen = observations(
        [request(11.0), request(11.0, status="UNAVAILABLE"), request(12.0, took_s=1.5), request(12.0, answer="bad"), request(12.0, answer="unknown")],
        wrong_answers=frozenset({"bad"}),
        unchecked_answers=frozenset({"unknown"}),
    )
    assert [measures.num_failed(seen), measures.num_late(seen), measures.num_wrong(seen), measures.num_unchecked(seen)] == [1, 1, 1, 1]
    assert measures.availability(seen) == pytest.approx(0.8)


def test_a_failure_that_does_not_say_which_expert_is_missing_is_unexplained() -> None:
    statuses = ("OK", "EXPERT_UNAVAILABLE", "DEADLINE_EXCEEDED", "LOAD_LIMIT")
    seen = observations([request(11.0, number=number, status=status) for number, status in enumerate(statuses)])
    assert (measures.num_failed(seen), measures.num_failed_unexplained(seen)) == (3, 2)


def test_only_what_answered_below_the_shadow_counts_as_a_lower_rung() -> None:
    seen = observations(
        [request(11.0, shadow=1), request(11.0, outcomes=(1, 0, 1, 1, 1, 0, 0)), request(11.0, outcomes=(2, 0, 0, 0, 0, 1, 1)), request(11.0, outcomes=())]
    )
    assert measures.num_lower_rungs(seen) == 3


def test_a_choice_that_vanished_or_was_doubled_is_unaccounted() -> None:
    seen = observations([request(11.0), request(11.0, outcomes=(3, 0, 0, 0, 0, 0, 0)), request(11.0, outcomes=(4, 1, 0, 0, 0, 0, 0))])
    assert measures.num_unaccounted(seen) == 2


def test_an_older_table_after_a_newer_one_is_a_regression_and_an_overlap_is_none() -> None:
    newer, older, beside = request(11.0, epoch=5), request(11.5, epoch=4), request(11.05, took_s=0.2, epoch=4)
    assert measures.num_epoch_regressions(observations([newer, older, beside])) == 1


def test_detection_is_the_first_sign_of_any_kind_and_a_suspicion_is_none() -> None:
    suspected = sample(10.02, {A: "suspected", B: "ready"}, {0: {A}, 1: {B}})
    ejected = sample(10.2, {A: "ejected", B: "ready"}, {0: {A}, 1: {B}})
    by_look = observations([], strikes=[KILLED], samples=(BEFORE, suspected, ejected))
    assert measures.detected_ms(by_look) == pytest.approx(200.0)
    by_answer = observations([request(10.1, shadow=1, moved=(0,)), request(10.05, moved=(1,))], strikes=[KILLED], samples=(BEFORE, ejected))
    assert measures.detected_ms(by_answer) == pytest.approx(100.0)
    by_router = observations([], strikes=[KILLED], samples=(BEFORE, ejected), counts={"router_detected_ms": 7.0})
    assert measures.detected_ms(by_router) == 7.0
    assert measures.detected_ms(observations([])) is None


def test_exact_again_is_the_end_of_the_last_answer_that_was_not_exact() -> None:
    degraded, failed, fine = request(10.3, shadow=1), request(10.6, status="UNAVAILABLE"), request(12.0)
    assert measures.exact_again_s(observations([degraded, failed, fine], strikes=[KILLED])) == pytest.approx(0.6)
    assert measures.exact_again_s(observations([fine], strikes=[KILLED])) == 0.0
    assert measures.all_exact_again_s(observations([degraded, failed, fine], strikes=[KILLED])) == pytest.approx(0.6)
    assert measures.exact_again_s(observations([fine, request(13.0, shadow=1)], strikes=[KILLED])) is None


def test_answers_that_were_not_exact_for_experts_that_nobody_struck_are_counted_apart() -> None:
    concerned, both, elsewhere = (request(end_s, shadow=1, moved=moved) for end_s, moved in ((10.3, (0,)), (10.5, (0, 1)), (11.0, (1,))))
    seen = observations([concerned, both, elsewhere, request(12.0)], strikes=[KILLED], samples=[BEFORE])
    assert measures.exact_again_s(seen) == pytest.approx(0.5)
    assert measures.all_exact_again_s(seen) == pytest.approx(1.0)
    assert measures.num_inexact_elsewhere(seen) == 1
    failed = request(11.5, status="UNAVAILABLE")
    assert measures.exact_again_s(observations([concerned, failed, request(12.0)], strikes=[KILLED], samples=[BEFORE])) == pytest.approx(1.5)
    assert measures.num_inexact_elsewhere(observations([elsewhere])) is None


def test_copies_are_again_there_only_when_none_of_them_was_struck_and_all_links_are_ready() -> None:
    stale = sample(10.1, {A: "ready", B: "ready"}, {0: {A}, 1: {B}})
    unlinked = sample(10.5, {LATER: "connecting", B: "ready"}, {0: {LATER}, 1: {B}})
    whole = sample(11.0, {LATER: "ready", B: "ready"}, {0: {LATER}, 1: {B}})
    seen = observations([], strikes=[KILLED], samples=(BEFORE, stale, unlinked, whole), wanted_replicas=WANTED)
    assert measures.copies_again_s(seen) == pytest.approx(1.0)
    assert measures.num_missing_copies(seen) == 0
    assert measures.copies_again_s(observations([], strikes=[KILLED], samples=(BEFORE, stale), wanted_replicas=WANTED)) is None


def test_a_stopped_actor_counts_again_once_it_goes_on() -> None:
    stopped = Strike("stop_actor", "actor-0/g1", frozenset({A}), at_s=10.0, gone_s=10.4, is_mended=True)
    samples = tuple(sample(at_s, {A: "ready", B: "ready"}, {0: {A}, 1: {B}}) for at_s in (9.0, 10.2, 10.5))
    assert measures.copies_again_s(observations([], strikes=[stopped], samples=samples, wanted_replicas=WANTED)) == pytest.approx(0.5)


def test_an_answer_of_a_life_that_had_left_the_table_is_stale() -> None:
    gone = sample(10.5, {B: "ready"}, {0: {B}, 1: {B}})
    early, stale = request(10.6, took_s=0.2, generations=(1, 2)), request(11.0, generations=(1, 2))
    assert measures.num_stale(observations([early, stale], samples=(BEFORE, gone))) == 1


def test_an_answer_by_a_table_that_nobody_has_looked_at_yet_is_not_stale() -> None:
    """It was healed and is listed again, by a table that came between the last look and the end."""
    gone = replace(sample(10.5, {B: "ready"}, {0: {B}, 1: {B}}), epoch=7)
    old, new = (request(11.0, generations=(1, 2), epoch=epoch) for epoch in (7, 8))
    assert measures.num_stale(observations([old, new], samples=(BEFORE, gone))) == 1


def test_only_ejections_of_those_who_were_not_struck_are_false() -> None:
    both = sample(10.5, {A: "ejected", B: "ejected"}, {0: {A}, 1: {B}})
    assert measures.num_ejections(observations([], strikes=[KILLED], samples=(BEFORE, both))) == 1


def test_the_gap_is_the_longest_time_without_an_answer() -> None:
    seen = observations([request(9.0), request(10.1), request(13.1), request(19.9)], strikes=[KILLED])
    assert measures.gap_ms(seen) == pytest.approx(6800.0)


def test_amplification_is_rows_sent_over_rows_needed() -> None:
    assert measures.amplification(observations([request(11.0)], counts={"rows_sent": 11.0, "rows_needed": 10.0})) == pytest.approx(1.1)
    assert measures.amplification(observations([request(11.0, num_extra_rows=1)])) == pytest.approx(1.25)


def test_a_request_survives_its_line_of_json() -> None:
    original = request(11.0, generations=(1, 2), moved=(3,), answer="x")
    assert Request.from_list(original.as_list()) == original
