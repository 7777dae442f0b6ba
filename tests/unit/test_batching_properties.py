from __future__ import annotations

from collections import Counter, deque

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.core.descriptors import DType
from cluster.core.errors import Overloaded
from cluster.core.ids import ExpertId, Role
from cluster.core.link_frames import Forward, FrameStatus, Result, SegmentResult, SegmentStatus
from router_service.core.batching import FramePlan, Lane, LaneLimits, PieceRows
from router_service.core.fair_queue import SegmentKey
from router_service.core.runs import RunOffer, TokenBudget

Row = tuple[int, int]


def offer(num_rows: int, *, index: int = 0, deadline_s: float = 1e9, flow: object = None, dim: int = 4) -> RunOffer:
    return RunOffer(SegmentKey(ExpertId("m", 0, index), b"v", Role.REPLICA, DType.BF16, dim, 0), num_rows, deadline_s, flow)


def body_of(plan: FramePlan) -> list[Row]:
    """A frame's body as the tags of its rows."""
    return [(piece.run_id, row) for piece in plan.pieces for row in range(piece.start, piece.stop)]


class LaneMachine(RuleBasedStateMachine):
    """Any order of offers, frames, results, faults, withdrawals, deadlines and lost links, against what must always hold."""

    @initialize(tokens=st.integers(1, 40), frames=st.integers(1, 3), max_bytes=st.sampled_from([64, 256, 1 << 20]), max_queued_tokens=st.integers(20, 200))
    def start(self, tokens: int, frames: int, max_bytes: int, max_queued_tokens: int) -> None:
        self.limits = LaneLimits(tokens, max_bytes, frames)
        self.budget = TokenBudget(max_queued_tokens)
        self.lane = Lane(1, self.limits, self.budget)
        self.now_s = 0.0
        self.offers: dict[int, RunOffer] = {}
        self.ended: Counter[int] = Counter()
        self.got: dict[int, list[int]] = {}
        self.flying: deque[FramePlan] = deque()
        self.faults = 0

    @rule(num_rows=st.integers(1, 90), index=st.integers(0, 3), life_s=st.sampled_from([1.0, 5.0, 1000.0]), flow=st.sampled_from([None, "a", "b"]))
    def offer(self, num_rows: int, index: int, life_s: float, flow: str | None) -> None:
        made = offer(num_rows, index=index, deadline_s=self.now_s + life_s, flow=flow, dim=4 + 4 * (index % 2))
        try:
            run_id = self.lane.offer(made, self.now_s)
        except Overloaded as refused:
            self.refused_for(str(refused), num_rows, life_s)
            return
        self.offers[run_id] = made
        self.got[run_id] = []

    def refused_for(self, words: str, num_rows: int, life_s: float) -> None:
        is_full = self.budget.queued_tokens + num_rows > self.budget.max_queued_tokens
        assert is_full or (self.lane.pending_tokens and life_s < 1000.0 and "left of the deadline" in words)

    @rule()
    def send(self) -> None:
        plan = self.lane.next_frame(self.now_s)
        self.note_ended(self.lane.expire(self.now_s))
        if plan is None:
            assert len(self.flying) == self.limits.frames_in_flight or self.lane.queued_tokens == 0
            return
        self.flying.append(plan)
        rows = body_of(plan)
        assert 0 < len(rows) <= self.limits.max_tokens_per_frame
        assert plan.forward.body_bytes <= self.limits.max_frame_bytes
        assert sum(segment.num_rows for segment in plan.forward.segments) == len(rows)
        assert len(set(rows)) == len(rows)
        for piece in plan.pieces:
            assert not self.ended[piece.run_id]
            assert self.offers[piece.run_id].deadline_s > self.now_s

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        plan = self.flying.popleft()
        forward, rows, parts, body, place = plan.forward, body_of(plan), [], [], 0
        for segment in forward.segments:
            status = data.draw(st.sampled_from([SegmentStatus.OK] * 6 + [SegmentStatus.FAULTED, SegmentStatus.NOT_HELD]))
            expired = tuple(number for number in range(len(segment.runs)) if data.draw(st.integers(0, 9)) == 0)
            kept: list[Row] = []
            for number, run in enumerate(segment.runs):
                if status is SegmentStatus.OK and number not in expired:
                    kept += rows[place : place + run.num_rows]
                place += run.num_rows
            body += [(row, segment.dim * 2) for row in kept]
            self.faults += status is not SegmentStatus.OK or bool(expired)
            parts.append(SegmentResult(segment.segment_id, segment.attempt, status, segment.dtype, segment.dim, len(kept), expired, ""))
        outcome = self.lane.frame_done(Result(forward.frame_id, 1, FrameStatus.OK, 0.0, 0.0, tuple(parts)), self.now_s)
        tags = [row for row, row_bytes in body for _ in range(row_bytes)]
        for piece in outcome.rows:
            self.take(piece, tags)
        self.note_ended([run_id for run_id, _ in outcome.failed])

    def take(self, piece: PieceRows, tags: list[Row]) -> None:
        """The bytes that the lane points at must be the rows it names."""
        row_bytes = self.offers[piece.run_id].key.dim * 2
        for number in range(piece.start, piece.stop):
            place = piece.offset_bytes + (number - piece.start) * row_bytes
            assert tags[place : place + row_bytes] == [(piece.run_id, number)] * row_bytes
        self.got[piece.run_id] += range(piece.start, piece.stop)
        if piece.is_complete:
            assert sorted(self.got[piece.run_id]) == list(range(self.offers[piece.run_id].num_rows))
            self.note_ended([piece.run_id])

    @precondition(lambda self: self.offers)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        run_id = data.draw(st.sampled_from(sorted(self.offers)))
        self.lane.withdraw(run_id)
        if not self.ended[run_id]:
            self.note_ended([run_id])

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0]))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def expire(self) -> None:
        self.note_ended(self.lane.expire(self.now_s))

    @rule()
    def lose(self) -> None:
        self.note_ended(self.lane.expire(self.now_s))
        self.note_ended(self.lane.lose())
        self.flying.clear()
        assert self.lane.is_idle

    def note_ended(self, run_ids: list[int]) -> None:
        for run_id in run_ids:
            self.ended[run_id] += 1
            assert self.ended[run_id] == 1

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "lane"):
            return
        assert self.lane.queued_tokens == self.budget.queued_tokens
        assert self.lane.num_frames_in_flight == len(self.flying) <= self.limits.frames_in_flight

    def teardown(self) -> None:
        """Left alone with a healthy actor, everything that has not ended completes."""
        if not hasattr(self, "lane"):
            return
        for _ in range(10_000):
            self.send()
            if not self.flying:
                break
            plan = self.flying.popleft()
            outcome = self.lane.frame_done(healthy(plan.forward), self.now_s)
            tags = [row for row, piece in zip(body_of(plan), owners(plan), strict=True) for _ in range(self.offers[piece].key.dim * 2)]
            for done in outcome.rows:
                self.take(done, tags)
        assert self.lane.is_idle
        assert all(self.ended[run_id] == 1 for run_id in self.offers)


def healthy(forward: Forward) -> Result:
    parts = (SegmentResult(item.segment_id, item.attempt, SegmentStatus.OK, item.dtype, item.dim, item.num_rows, (), "") for item in forward.segments)
    return Result(forward.frame_id, 1, FrameStatus.OK, 0.0, 0.0, tuple(parts))


def owners(plan: FramePlan) -> list[int]:
    return [piece.run_id for piece in plan.pieces for _ in range(piece.num_rows)]


TestLaneMachine = LaneMachine.TestCase
TestLaneMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 70)), min_size=1, max_size=30), st.integers(1, 64))
def test_runs_of_one_flow_leave_in_the_order_of_their_offers(offers: list[tuple[str, int]], max_tokens: int) -> None:
    lane = Lane(1, LaneLimits(max_tokens, 1 << 20, 10_000), TokenBudget(10_000))
    flows = {lane.offer(offer(rows, flow=flow, index=rows % 2), 0.0): flow for flow, rows in offers}
    left: dict[str, list[tuple[int, int]]] = {flow: [] for flow in "abc"}
    while (plan := lane.next_frame(0.0)) is not None:
        newest = max(left.values(), key=len)
        assert newest == sorted(newest)
        frame: dict[str, list[tuple[int, int]]] = {flow: [] for flow in "abc"}
        for piece in plan.pieces:
            frame[flows[piece.run_id]] += [(piece.run_id, row) for row in range(piece.start, piece.stop)]
        for flow, rows in frame.items():
            left[flow] += sorted(rows)
    for flow, rows in left.items():
        assert rows == sorted(rows)
        assert len(rows) == sum(count for name, count in offers if name == flow)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.integers(1, 400), st.integers(1, 16), st.integers(16, 200))
def test_a_small_run_waits_for_a_few_turns_of_the_others_only(num_flows: int, backlog: int, num_rows: int, max_tokens: int) -> None:
    limits = LaneLimits(max_tokens, 1 << 20, 10_000)
    quantum = limits.quantum
    num_rows = min(num_rows, quantum)
    lane = Lane(1, limits, TokenBudget(1 << 20))
    for flow in range(num_flows):
        lane.offer(offer(backlog, flow=flow), 0.0)
    lane.next_frame(0.0)
    small = lane.offer(offer(num_rows, flow="small"), 0.0)
    bound = -(-2 * num_flows * quantum // (max_tokens - quantum + 1)) + 1
    for _ in range(bound):
        plan = lane.next_frame(0.0)
        assert plan is not None
        if any(piece.run_id == small for piece in plan.pieces):
            assert sum(piece.num_rows for piece in plan.pieces if piece.run_id == small) == num_rows
            return
    raise AssertionError((num_flows, backlog, num_rows, max_tokens))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(8, 200), st.lists(st.integers(1, 60), min_size=6, max_size=6))
def test_busy_flows_get_equal_shares_whatever_the_size_of_their_runs(num_flows: int, max_tokens: int, sizes: list[int]) -> None:
    limits = LaneLimits(max_tokens, 1 << 20, 10_000)
    lane = Lane(1, limits, TokenBudget(1 << 20))
    flows = {}
    for flow in range(num_flows):
        for _ in range(2000 // sizes[flow]):
            flows[lane.offer(offer(sizes[flow], flow=flow), 0.0)] = flow
    shares: Counter[int] = Counter()
    while sum(shares.values()) < 1500:
        plan = lane.next_frame(0.0)
        assert plan is not None
        for piece in plan.pieces:
            shares[flows[piece.run_id]] += piece.num_rows
        assert max(shares[flow] for flow in range(num_flows)) - min(shares[flow] for flow in range(num_flows)) <= 3 * limits.quantum
