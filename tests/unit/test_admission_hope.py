"""A crowd larger than the router can serve is turned away while it still has time, at the rate at which requests really end."""

import pytest

from cluster.core.errors import Overloaded
from router_service.admission import FEW_REQUESTS, RATE_SAMPLES, RequestLimit
from router_service.core.hope import check_hope


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def crowded(clock: Clock, *, count: int, every_s: float) -> RequestLimit:
    """So many requests are under way, and one has ended in each `every_s`."""
    limit = RequestLimit(1000, clock=clock)
    for _ in range(count + RATE_SAMPLES):
        limit.enter()
    for _ in range(RATE_SAMPLES):
        clock.now_s += every_s
        limit.leave()
    return limit


def test_a_request_that_could_only_be_late_is_refused_with_the_time_to_wait() -> None:
    limit = crowded(Clock(), count=100, every_s=0.01)
    assert limit.ended_per_s == pytest.approx(100.0)
    with pytest.raises(Overloaded, match=r"101 requests would take about 1\.01 s") as refused:
        limit.enter(1.0)
    assert 0 < refused.value.retry_after_s < 1
    limit.enter(3.0)
    limit.enter(None)
    assert limit.count == 102


def test_few_requests_are_never_turned_away_however_slow_they_are() -> None:
    limit = crowded(Clock(), count=FEW_REQUESTS, every_s=10.0)
    limit.enter(0.001)


def test_requests_that_were_refused_further_on_or_given_up_say_nothing_of_how_fast_others_are_served() -> None:
    clock = Clock()
    limit = crowded(clock, count=100, every_s=0.01)
    for _ in range(10 * RATE_SAMPLES):
        limit.enter(None)
        limit.leave(in_vain=True)
    assert limit.ended_per_s == pytest.approx(100.0)
    assert limit.count == 100


def test_a_router_that_serves_nobody_any_more_is_not_taken_for_as_fast_as_it_was() -> None:
    clock = Clock()
    limit = crowded(clock, count=20, every_s=0.001)
    limit.enter(1.0)
    clock.now_s += 10.0
    with pytest.raises(Overloaded):
        limit.enter(1.0)


def test_a_rate_is_forgotten_when_nobody_is_left() -> None:
    limit = crowded(Clock(), count=20, every_s=1.0)
    for _ in range(20):
        limit.leave()
    assert limit.ended_per_s == 0.0
    for _ in range(100):
        limit.enter(0.01)


def test_the_door_turns_away_earlier_than_the_lanes_which_refuse_only_what_was_read() -> None:
    limit = crowded(Clock(), count=100, every_s=0.01)
    check_hope(101, 100.0, 2.5)
    with pytest.raises(Overloaded):
        limit.enter(2.5)
