"""One request's tries: each part ends once, the first success wins, and nothing is asked twice."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from cluster.core.routing_table import TableCopy
from kit.lanes import copy_on
from kit.pipelines import version_of
from router_service.core.dispatch import ExpertRows
from router_service.core.flight import MAX_ATTEMPTS, Flight, Why

COPIES = [copy_on(f"a{place}", version_of(place)) for place in range(12)]


def picker(*numbers: int) -> Callable[[int, Sequence[TableCopy]], TableCopy | None]:
    """Expert i has so many copies; they are asked in order."""
    return lambda index, tried: next((copy for copy in COPIES[: numbers[index]] if copy not in tried), None)


def flight(*numbers: int) -> Flight:
    return Flight([ExpertRows(index, 2 * index, 2 * index + 2) for index in range(len(numbers))], picker(*numbers))


def test_an_error_does_not_beat_a_slow_success() -> None:
    flown = flight(2)
    first = flown.begin()[0]
    second = flown.hedge(0)
    assert (second.attempt, second.why, second.copy) == (1, Why.HEDGE, COPIES[1])
    assert flown.failed(0, second.attempt, "reset") is None
    assert not flown.has_ended
    assert flown.answered(0, first.attempt) == []
    assert flown.has_ended
    assert not flown.lost


def test_the_loser_of_a_hedge_is_withdrawn_and_its_late_answer_is_not_used() -> None:
    flown = flight(2)
    flown.begin()
    flown.hedge(0)
    assert flown.answered(0, 1) == [0]
    assert flown.answered(0, 0) is None
    assert flown.failed(0, 0, "reset") is None


def test_a_part_is_hedged_once_at_a_time_and_only_with_another_copy() -> None:
    flown = flight(3)
    flown.begin()
    assert flown.hedge(0).copy == COPIES[1]
    assert flown.hedge(0) is None
    flown.failed(0, 0, "reset")
    assert flown.hedge(0).copy == COPIES[2]
    assert flight_with_one_copy_is_not_hedged()


def flight_with_one_copy_is_not_hedged() -> bool:
    flown = flight(1)
    flown.begin()
    return flown.hedge(0) is None and not flown.has_ended


def test_a_part_without_a_copy_is_lost_at_once_and_others_are_not() -> None:
    flown = flight(0, 1)
    orders = flown.begin()
    assert [order.part for order in orders] == [1]
    assert flown.lost == {0: "it has no copies"}
    flown.answered(1, 0)
    assert flown.has_ended


def test_nobody_left_to_ask_says_how_many_were_and_why_the_last_did_not() -> None:
    flown = flight(2)
    flown.begin()
    assert flown.failed(0, 0, "one").why is Why.FAILOVER
    assert flown.failed(0, 1, "two") is None
    assert flown.lost == {0: "none of its 2 copies answered; the last one: two"}


@given(st.lists(st.integers(0, 12), min_size=1, max_size=5), st.integers(0, 10_000))
def test_under_any_order_of_events_each_part_ends_once_and_asks_no_copy_twice(numbers: list[int], seed: int) -> None:
    rng, flown = random.Random(seed), flight(*numbers)
    asked: dict[int, list[TableCopy]] = {}
    used: set[int] = set()
    for order in flown.begin():
        asked.setdefault(order.part, []).append(order.copy)
    for _ in range(200):
        if flown.has_ended:
            break
        number = rng.randrange(len(numbers))
        part = flown.parts[number]
        attempt = rng.randrange(-1, max(1, len(part.tried)) + 1)
        match rng.randrange(3):
            case 0:
                if flown.answered(number, attempt) is not None:
                    assert number not in used
                    used.add(number)
                order = None
            case 1:
                order = flown.failed(number, attempt, "reset")
            case _:
                order = flown.hedge(number)
        if order is not None:
            assert order.copy not in asked.get(number, [])
            asked.setdefault(number, []).append(order.copy)
        assert all(len(copies) <= MAX_ATTEMPTS for copies in asked.values())
    assert not (used & {number for number, part in enumerate(flown.parts) if part.lost})
    assert all(part.has_ended or part.live for part in flown.parts)
