"""What a cluster keeps up with, by requests that end when a queue of one server says so."""

from __future__ import annotations

from itertools import pairwise

import pytest

from chaos.core.observations import OK, Request
from chaos.core.peak import KEPT_SHARE, NUM_STEPS, STEP, keeps_up, rates_to_try

SERVICE_S = 0.01


def queued(rate: float, seconds: float, *, status: str = OK) -> list[Request]:
    """Requests at even times to one server that takes SERVICE_S for each."""
    free_s, found = 0.0, []
    for number in range(int(rate * seconds)):
        due_s = number / rate
        free_s = max(free_s, due_s) + SERVICE_S
        found.append(Request(number, due_s, due_s, free_s, status))
    return found


@pytest.mark.parametrize(("rate", "expected"), [(50.0, True), (99.0, True), (130.0, False), (400.0, False)])
def test_it_keeps_up_with_what_one_server_can_do_and_not_with_more(rate: float, expected: bool) -> None:
    assert keeps_up(queued(rate, 2.5), 0.5, 2.5) is expected


def test_what_fails_is_not_kept_up_with() -> None:
    requests = queued(50.0, 2.0)
    num_failed = int((1 - KEPT_SHARE) * len(requests)) + 1
    failed = [Request(one.number, one.due_s, one.sent_s, one.end_s, "OVERLOADED") for one in requests[:num_failed]]
    assert keeps_up(requests, 0.0, 2.0)
    assert not keeps_up(failed + requests[num_failed:], 0.0, 2.0)


def test_nothing_due_says_nothing() -> None:
    assert not keeps_up(queued(50.0, 1.0), 5.0, 6.0)
    assert not keeps_up([], 0.0, 1.0)


def test_requests_outside_the_window_do_not_count() -> None:
    slow = [Request(number, 0.1, 0.1, 9.0, OK) for number in range(100)]
    assert keeps_up(slow + queued(50.0, 2.0), 0.5, 2.0)


def test_rates_fall_by_equal_steps_from_the_ceiling_to_a_fifth_of_it() -> None:
    rates = list(rates_to_try(100.0))
    assert rates[0] == 100.0
    assert len(rates) == NUM_STEPS
    assert rates[-1] == pytest.approx(20.0, rel=0.05)
    assert all(lower == pytest.approx(STEP * higher) for higher, lower in pairwise(rates))
