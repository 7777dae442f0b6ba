from __future__ import annotations

import math

import pytest

from cluster.core.descriptors import DType
from cluster.core.errors import DeadlineExceeded, InvalidRequest, MessageTooLarge, Overloaded, ReplicaFaulted, ReplicaRejected
from cluster.core.ids import ExpertId, Role
from cluster.core.link_codec import encode
from cluster.core.link_frames import MAX_TRACEPARENTS, Cancel, Forward, FrameStatus, Result, SegmentResult, SegmentStatus
from router_service.core.batching import FramePlan, Lane, LaneLimits
from router_service.core.fair_queue import SegmentKey
from router_service.core.frame_draft import MAX_PIECES, Piece
from router_service.core.runs import RunOffer, TokenBudget

LIMITS = LaneLimits(max_tokens_per_frame=64, max_frame_bytes=1 << 20, frames_in_flight=2)


def lane(limits: LaneLimits = LIMITS, max_queued_tokens: int = 10_000) -> Lane:
    return Lane(3, limits, TokenBudget(max_queued_tokens))


def offer(num_rows: int = 1, *, index: int = 0, deadline_s: float = 100.0, flow: object = None, **changes: object) -> RunOffer:
    key = SegmentKey(ExpertId("m", 0, index), b"v", Role.REPLICA, DType.BF16, dim=4, attempt=0)
    of_key = {name: changes.pop(name) for name in tuple(changes) if name in SegmentKey._fields}
    return RunOffer(key._replace(**of_key), num_rows, deadline_s, flow, **changes)


def next_frame(target: Lane, now_s: float = 0.0) -> FramePlan:
    plan = target.next_frame(now_s)
    assert plan is not None
    return plan


def result(
    forward: Forward, *statuses: SegmentStatus, expired: dict[int, tuple[int, ...]] | None = None, generation: int = 3, status: FrameStatus = FrameStatus.OK
) -> Result:
    parts = []
    for number, segment in enumerate(forward.segments):
        ended = statuses[number] if statuses else SegmentStatus.OK
        dropped = (expired or {}).get(number, ())
        rows = sum(run.num_rows for place, run in enumerate(segment.runs) if place not in dropped)
        rows = rows if ended is SegmentStatus.OK else 0
        parts.append(SegmentResult(segment.segment_id, segment.attempt, ended, segment.dtype, segment.dim, rows, dropped, ""))
    return Result(forward.frame_id, generation, status, 0.0, 0.0, tuple(parts))


def rows_of(plan: FramePlan) -> int:
    return sum(piece.num_rows for piece in plan.pieces)


def test_rows_leave_at_once_while_the_window_has_room() -> None:
    target = lane()
    target.offer(offer(3), 0.0)
    assert rows_of(next_frame(target)) == 3
    target.offer(offer(4), 0.0)
    assert rows_of(next_frame(target)) == 4


def test_rows_wait_and_merge_while_the_window_is_full() -> None:
    target = lane()
    plans = []
    for _ in range(2):
        target.offer(offer(1), 0.0)
        plans.append(next_frame(target))
    for _ in range(5):
        target.offer(offer(2), 0.0)
        assert target.next_frame(0.0) is None
    target.frame_done(result(plans[0].forward), 1.0)
    merged = next_frame(target)
    assert len(merged.forward.segments) == 1
    assert [run.num_rows for run in merged.forward.segments[0].runs] == [2] * 5
    assert target.next_frame(0.0) is None


def test_a_small_frame_waits_beside_another_and_merges_while_a_large_one_overlaps() -> None:
    target = lane(LaneLimits(64, 1 << 20, frames_in_flight=2, min_overlapping_tokens=8))
    target.offer(offer(1), 0.0)
    first = next_frame(target)
    for _ in range(3):
        target.offer(offer(2), 0.0)
        assert target.next_frame(0.0) is None
    target.offer(offer(2), 0.0)
    assert rows_of(next_frame(target)) == 8
    target.offer(offer(64), 0.0)
    assert target.next_frame(0.0) is None
    target.frame_done(result(first.forward), 1.0)
    assert rows_of(next_frame(target)) == 64


def test_what_waits_beside_a_frame_leaves_when_that_frame_is_done() -> None:
    target = lane(LaneLimits(64, 1 << 20, frames_in_flight=2, min_overlapping_tokens=8))
    target.offer(offer(1), 0.0)
    first = next_frame(target)
    target.offer(offer(1), 0.0)
    assert target.next_frame(0.0) is None
    target.frame_done(result(first.forward), 1.0)
    assert rows_of(next_frame(target)) == 1


@pytest.mark.parametrize("change", [{"version": b"w"}, {"role": Role.SHADOW}, {"dtype": DType.FP32}, {"dim": 5}, {"attempt": 1}, {"index": 1}])
def test_only_runs_of_one_copy_shape_and_attempt_share_a_segment(change: dict[str, object]) -> None:
    target = lane()
    target.offer(offer(1), 0.0)
    target.offer(offer(1, **change), 0.0)
    target.offer(offer(1), 0.0)
    assert [len(segment.runs) for segment in next_frame(target).forward.segments] == [2, 1]


def test_a_frame_names_what_each_run_needs() -> None:
    target = lane()
    target.offer(offer(2, deadline_s=1.5, exact=True, epoch=9, traceparent="parent"), 0.0)
    forward = next_frame(target, 1.0).forward
    run = forward.segments[0].runs[0]
    assert (forward.generation, forward.traceparents) == (3, ("parent",))
    assert (run.num_rows, run.timeout_ms, run.exact, run.epoch) == (2, 500, True, 9)


def test_a_run_without_end_of_time_can_be_sent() -> None:
    target = lane()
    target.offer(offer(1, deadline_s=math.inf), 0.0)
    assert len(encode(next_frame(target).forward)) > 0


def test_traceparents_are_told_once_and_bounded() -> None:
    target = lane()
    for number in range(40):
        target.offer(offer(1, traceparent=f"parent-{number // 2}"), 0.0)
    assert next_frame(target).forward.traceparents == tuple(f"parent-{number}" for number in range(MAX_TRACEPARENTS))


def test_a_run_larger_than_a_frame_is_spread_and_counted_complete_once() -> None:
    target = lane(LaneLimits(10, 1 << 20, 8))
    run_id = target.offer(offer(25), 0.0)
    plans = [next_frame(target) for _ in range(3)]
    assert [plan.pieces for plan in plans] == [(Piece(run_id, 0, 10),), (Piece(run_id, 10, 20),), (Piece(run_id, 20, 25),)]
    done = [target.frame_done(result(plan.forward), 1.0).rows[0] for plan in (plans[2], plans[0], plans[1])]
    assert [(piece.start, piece.stop, piece.is_complete) for piece in done] == [(20, 25, False), (0, 10, False), (10, 20, True)]
    assert target.is_idle


def test_frames_respect_the_byte_limit() -> None:
    target = lane(LaneLimits(64, 80, 8))
    for _ in range(3):
        target.offer(offer(6), 0.0)
    sizes = [next_frame(target).forward.body_bytes for _ in range(3)]
    assert sizes == [48, 48, 48]
    target.offer(offer(25), 0.0)
    assert [next_frame(target).forward.body_bytes for _ in range(3)] == [80, 80, 40]


def test_a_row_larger_than_a_frame_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="max_frame_bytes"):
        lane(LaneLimits(64, 80, 2)).offer(offer(1, dim=41), 0.0)


def test_no_frame_outgrows_its_header() -> None:
    target = lane(LaneLimits(1 << 20, 1 << 30, 2), max_queued_tokens=1 << 20)
    for number in range(MAX_PIECES + 10):
        target.offer(offer(1, index=number, version=bytes(32), traceparent="x" * 55), 0.0)
    first, second = next_frame(target), next_frame(target)
    assert len(first.pieces) == MAX_PIECES
    assert len(second.pieces) == 10
    assert len(encode(first.forward)) > MAX_PIECES


def test_queued_rows_are_bounded_over_all_lanes() -> None:
    budget = TokenBudget(10)
    first, second = Lane(1, LIMITS, budget), Lane(2, LIMITS, budget)
    first.offer(offer(6), 0.0)
    with pytest.raises(Overloaded) as caught:
        second.offer(offer(5), 0.0)
    assert not isinstance(caught.value, MessageTooLarge)
    assert 0 < caught.value.retry_after_s <= 5.0
    second.offer(offer(4), 0.0)
    next_frame(first)
    second.offer(offer(6), 0.0)
    assert budget.queued_tokens == 10


def test_a_run_that_could_never_wait_is_too_large_rather_than_early() -> None:
    with pytest.raises(MessageTooLarge):
        lane(max_queued_tokens=10).offer(offer(11), 0.0)


def test_the_time_to_wait_follows_the_actors_pace() -> None:
    target = lane(LaneLimits(10, 1 << 20, 1), max_queued_tokens=100)
    target.offer(offer(10), 0.0)
    plan = next_frame(target, 0.0)
    target.offer(offer(80), 0.0)
    target.frame_done(result(plan.forward), 0.5)
    with pytest.raises(Overloaded) as caught:
        target.offer(offer(50), 0.5)
    assert caught.value.retry_after_s == pytest.approx(80 / (10 / 0.5))


def test_expired_runs_are_never_sent() -> None:
    target = lane()
    late = target.offer(offer(1, deadline_s=5.0), 0.0)
    kept = target.offer(offer(2, deadline_s=9.0), 0.0)
    assert [piece.run_id for piece in next_frame(target, 5.0).pieces] == [kept]
    assert target.expire(5.0) == [late]
    assert target.expire(5.0) == []
    with pytest.raises(DeadlineExceeded):
        target.offer(offer(1, deadline_s=5.0), 5.0)


def test_a_run_that_the_actor_dropped_as_late_fails_alone() -> None:
    target = lane()
    late, kept = target.offer(offer(1), 0.0), target.offer(offer(2), 0.0)
    outcome = target.frame_done(result(next_frame(target).forward, expired={0: (0,)}), 1.0)
    assert [(run_id, type(error)) for run_id, error in outcome.failed] == [(late, DeadlineExceeded)]
    assert [(piece.run_id, piece.offset_bytes, piece.is_complete) for piece in outcome.rows] == [(kept, 0, True)]


def test_withdrawn_runs_are_never_sent() -> None:
    target = lane()
    gone = target.offer(offer(1), 0.0)
    kept = target.offer(offer(1), 0.0)
    assert target.withdraw(gone) == []
    assert [piece.run_id for piece in next_frame(target).pieces] == [kept]


def test_a_late_result_of_a_withdrawn_run_means_nothing() -> None:
    target = lane()
    gone, kept = target.offer(offer(2), 0.0), target.offer(offer(3), 0.0)
    plan = next_frame(target)
    assert target.withdraw(gone) == []
    outcome = target.frame_done(result(plan.forward), 1.0)
    assert [(piece.run_id, piece.offset_bytes) for piece in outcome.rows] == [(kept, 2 * 8)]


def test_the_actor_is_told_about_a_segment_that_nobody_waits_for() -> None:
    target = lane()
    runs = [target.offer(offer(1, index=index), 0.0) for index in (0, 0, 1)]
    plan = next_frame(target)
    assert target.withdraw(runs[0]) == []
    assert target.withdraw(runs[1]) == [Cancel(plan.forward.frame_id, (plan.forward.segments[0].segment_id,))]
    assert target.withdraw(runs[1]) == []


def test_results_of_unknown_frames_mean_nothing() -> None:
    target = lane()
    target.offer(offer(1), 0.0)
    answer = result(next_frame(target).forward)
    assert len(target.frame_done(answer, 1.0).rows) == 1
    again = target.frame_done(answer, 1.0)
    assert (again.rows, again.failed) == ([], [])


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (SegmentStatus.NOT_HELD, ReplicaRejected),
        (SegmentStatus.OVERLOADED, ReplicaRejected),
        (SegmentStatus.DRAINING, ReplicaRejected),
        (SegmentStatus.FAULTED, ReplicaFaulted),
        (SegmentStatus.OUT_OF_MEMORY, ReplicaFaulted),
    ],
)
def test_a_segment_fails_alone_with_its_error(status: SegmentStatus, error: type[Exception]) -> None:
    target = lane()
    bad, good = target.offer(offer(2), 0.0), target.offer(offer(3, index=1), 0.0)
    outcome = target.frame_done(result(next_frame(target).forward, status, SegmentStatus.OK), 1.0)
    assert [(run_id, type(found)) for run_id, found in outcome.failed] == [(bad, error)]
    assert [(piece.run_id, piece.offset_bytes) for piece in outcome.rows] == [(good, 0)]


def test_a_merged_segment_that_raised_is_retried_run_by_run() -> None:
    target = lane()
    runs = [target.offer(offer(2), 0.0) for _ in range(3)]
    target.withdraw(runs[2])
    assert target.next_frame(0.0) is not None
    poison = target.offer(offer(1), 0.0)
    mates = [target.offer(offer(1), 0.0) for _ in range(2)]
    plan = next_frame(target)
    outcome = target.frame_done(result(plan.forward, SegmentStatus.FAULTED), 1.0)
    assert (outcome.rows, outcome.failed) == ([], [])
    retry = next_frame(target)
    assert [piece.run_id for piece in retry.pieces] == [poison, *mates]
    assert [len(segment.runs) for segment in retry.forward.segments] == [1, 1, 1]
    last = target.frame_done(result(retry.forward, SegmentStatus.FAULTED, SegmentStatus.OK, SegmentStatus.OK), 2.0)
    assert [run_id for run_id, _ in last.failed] == [poison]
    assert [piece.run_id for piece in last.rows] == mates


def test_a_run_cut_over_two_merged_frames_that_both_fault_is_retried_alone_once() -> None:
    target = lane(LaneLimits(16, 1 << 20, 2))
    poison, mate = (target.offer(offer(12), 0.0) for _ in range(2))
    merged = [next_frame(target) for _ in range(2)]
    assert [[run.num_rows for run in plan.forward.segments[0].runs] for plan in merged] == [[8, 8], [4, 4]]
    target.withdraw(mate)
    for plan in merged:
        assert target.frame_done(result(plan.forward, SegmentStatus.FAULTED), 1.0).failed == []
    alone = next_frame(target)
    assert [run.num_rows for run in alone.forward.segments[0].runs] == [8, 4]
    assert [run_id for run_id, _ in target.frame_done(result(alone.forward, SegmentStatus.FAULTED), 2.0).failed] == [poison]
    assert target.is_idle


@pytest.mark.parametrize(("generation", "status"), [(4, FrameStatus.OK), (3, FrameStatus.WRONG_GENERATION), (9, FrameStatus.WRONG_GENERATION)])
def test_nothing_of_another_generation_is_used(generation: int, status: FrameStatus) -> None:
    target = lane()
    run_id = target.offer(offer(1), 0.0)
    outcome = target.frame_done(result(next_frame(target).forward, generation=generation, status=status), 1.0)
    assert outcome.rows == []
    assert [(failed, type(error)) for failed, error in outcome.failed] == [(run_id, ReplicaRejected)]


@pytest.mark.parametrize("field", ["segment_id", "attempt", "dim", "dtype", "num_rows", "expired_runs"])
def test_a_result_that_cannot_belong_to_its_frame_is_refused(field: str) -> None:
    target = lane()
    target.offer(offer(2), 0.0)
    good = result(next_frame(target).forward)
    wrong = {"segment_id": 99, "attempt": 1, "dim": 5, "dtype": DType.FP32, "num_rows": 1, "expired_runs": (7,)}[field]
    segment = good.segments[0]
    values = {name: getattr(segment, name) for name in SegmentResult._fields} | {field: wrong}
    bad = Result(good.frame_id, 3, FrameStatus.OK, 0.0, 0.0, (SegmentResult(**values),))
    with pytest.raises(InvalidRequest):
        target.frame_done(bad, 1.0)
    with pytest.raises(InvalidRequest):
        target.frame_done(Result(good.frame_id, 3, FrameStatus.OK, 0.0, 0.0, ()), 1.0)
    assert target.lose() == [1]


def test_a_lost_link_ends_every_run_and_frees_the_window() -> None:
    target = lane(LaneLimits(4, 1 << 20, 1))
    runs = [target.offer(offer(3), 0.0) for _ in range(4)]
    stale = next_frame(target)
    assert target.lose() == runs
    assert target.is_idle
    assert target.queued_tokens == 0
    fresh = target.offer(offer(1), 1.0)
    assert [piece.run_id for piece in next_frame(target).pieces] == [fresh]
    assert target.frame_done(result(stale.forward), 1.0).rows == []


def test_a_drained_actor_turns_away_only_what_is_not_on_its_way() -> None:
    target = lane(LaneLimits(4, 1 << 20, 1))
    sent, cut, waiting = (target.offer(offer(rows, flow="one"), 0.0) for rows in (2, 3, 1))
    plan = next_frame(target)
    assert plan.pieces == (Piece(sent, 0, 2), Piece(cut, 0, 2))
    assert target.turn_away() == [cut, waiting]
    assert [piece.run_id for piece in target.frame_done(result(plan.forward), 1.0).rows] == [sent]
    assert target.is_idle


def test_age_is_that_of_the_oldest_run_that_has_not_ended() -> None:
    target = lane()
    assert target.oldest_age_s(1.0) == 0.0
    first = target.offer(offer(1), 1.0)
    target.offer(offer(1), 3.0)
    assert target.oldest_age_s(5.0) == 4.0
    target.withdraw(first)
    assert target.oldest_age_s(5.0) == 2.0
