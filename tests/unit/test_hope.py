"""Rows that could only be late are refused at once; nobody else is."""

from __future__ import annotations

import pytest

from cluster.core.descriptors import DType
from cluster.core.errors import Overloaded
from cluster.core.ids import ExpertId, Role
from router_service.core.batching import Lane, LaneLimits
from router_service.core.fair_queue import FairQueue, SegmentKey, Span
from router_service.core.hope import MAX_RETRY_AFTER_S, MIN_RETRY_AFTER_S, check_hope
from router_service.core.runs import RunOffer, TokenBudget

EXPERT = ExpertId("m", 0, 0)
KEY = SegmentKey(EXPERT, b"v", Role.REPLICA, DType.BF16, 4, 0)


def test_rows_that_fit_into_half_the_time_are_taken() -> None:
    check_hope(500, 1000.0, 1.0)
    check_hope(10**9, 0.0, 1e-3)


@pytest.mark.parametrize(("rows", "left_s"), [(501, 1.0), (10**9, 1.0), (1, 1e-6)])
def test_others_are_refused_with_a_time_to_come_back(rows: int, left_s: float) -> None:
    with pytest.raises(Overloaded, match="left of the deadline") as refused:
        check_hope(rows, 1000.0, left_s)
    assert MIN_RETRY_AFTER_S <= refused.value.retry_after_s <= MAX_RETRY_AFTER_S


def test_a_few_rows_wait_for_one_turn_of_a_large_flow_and_not_for_all_of_it() -> None:
    queue = FairQueue(quantum=100)
    queue.push(Span(1, "large", KEY, 0, 50_000))
    assert queue.rows_before(8) == 100
    assert queue.rows_before(250) == 300
    queue.push(Span(2, "small", KEY, 0, 30))
    assert queue.rows_before(8) == 200
    assert queue.rows_before(10**6) == 50_030


def test_a_lane_refuses_only_behind_others_and_only_by_a_rate_of_frames_like_them() -> None:
    lane = Lane(1, LaneLimits(max_tokens_per_frame=64), TokenBudget(10_000))
    lane._tokens_per_s = 1.0
    offer = RunOffer(SegmentKey(EXPERT, b"v", Role.REPLICA, DType.BF16, 4, 0), 64, 0.001)
    assert lane.offer(offer, 0.0) == 1, "nobody is before it"
    assert lane.offer(offer, 0.0) == 2, "nothing is known of frames as large"
    lane._tokens_per_frame = 64.0
    with pytest.raises(Overloaded):
        lane.offer(offer, 0.0)
