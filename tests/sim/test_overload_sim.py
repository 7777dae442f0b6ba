"""Ten times more than two actors can compute, on a manual clock: the real lanes, actors that are a rate, requests that go to both and wait a second.

What must hold: nearly all of the actors' time goes into answers that are still wanted, nobody overtakes, every queue has its bound, every request ends
once, and soon after the crowd is gone nobody waits longer than for the frame before.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from statistics import median

import pytest

from cluster.core.descriptors import DType
from cluster.core.errors import Overloaded
from cluster.core.ids import ExpertId, Role
from cluster.core.link_frames import FrameStatus, Result, SegmentResult, SegmentStatus
from router_service.core.batching import FramePlan, Lane, LaneLimits
from router_service.core.fair_queue import SegmentKey
from router_service.core.runs import RunOffer, TokenBudget

FRAME_S, ROWS_PER_S = 0.001, 20_000.0
MAX_FRAME_ROWS = 1024
# So many rows per second an actor computes at most: full frames, one after the other.
PEAK_ROWS_PER_S = MAX_FRAME_ROWS / (FRAME_S + MAX_FRAME_ROWS / ROWS_PER_S)
FULL_FRAME_S = MAX_FRAME_ROWS / PEAK_ROWS_PER_S
MAX_QUEUED = 262_144
DEADLINE_S = 1.0
DIM = 4


@dataclass(eq=False)
class Request:
    """One request: as many rows for each actor. It ends once: answered, refused, late."""

    number: int
    num_rows: int
    arrived_s: float
    runs: dict[int, int] = field(default_factory=dict)
    missing: set[int] = field(default_factory=set)
    ended: str = ""
    ended_s: float = 0.0


@dataclass
class Actor:
    """Computes frames one after the other; rows whose time is up when their frame's turn comes cost nothing and are said to have expired."""

    lane: Lane
    waiting: list[tuple[FramePlan, float]] = field(default_factory=list)
    busy_s: float = 0.0


class Sim:
    """Events in the order of time."""

    def __init__(self, seed: int, *, max_queued: int = MAX_QUEUED) -> None:
        self.rng = random.Random(seed)
        self.budget = TokenBudget(max_queued)
        limits = LaneLimits(max_tokens_per_frame=MAX_FRAME_ROWS, frames_in_flight=2)
        self.actors = [Actor(Lane(1, limits, self.budget)) for _ in range(2)]
        self.requests: list[Request] = []
        self.by_run: dict[tuple[int, int], Request] = {}
        self.events: list[tuple[float, int, str, int]] = []
        self.retry_after: list[float] = []
        self.most_queued = 0
        self.now_s = 0.0
        self._count = 0

    def arrive(self, until_s: float, share_of_peak: float, sizes: tuple[int, ...] = (16, 64, 256)) -> None:
        """Let requests come from now on, at random times, with so much work for each actor."""
        at_s, mean = self.now_s, sum(sizes) / len(sizes)
        while (at_s := at_s + self.rng.expovariate(share_of_peak * PEAK_ROWS_PER_S / mean)) < until_s:
            self.requests.append(Request(len(self.requests), self.rng.choice(sizes), at_s))
            self._at(at_s, "arrival", self.requests[-1].number)

    def run(self, until_s: float) -> None:
        """Until this time, whatever is left."""
        while self.events and self.events[0][0] <= until_s:
            self.now_s, _, what, number = heapq.heappop(self.events)
            if what == "arrival":
                self._offer(self.requests[number])
            else:
                self._computed(number)
            for place, actor in enumerate(self.actors):
                self._pump(place, actor)
            self.most_queued = max(self.most_queued, self.budget.queued_tokens)
        self.now_s = until_s

    def _at(self, at_s: float, what: str, number: int) -> None:
        self._count += 1
        heapq.heappush(self.events, (at_s, self._count, what, number))

    def _offer(self, request: Request) -> None:
        try:
            for place, actor in enumerate(self.actors):
                key = SegmentKey(ExpertId("m", 0, place), b"v", Role.REPLICA, DType.BF16, DIM, 0)
                offer = RunOffer(key, request.num_rows, self.now_s + DEADLINE_S, request.number)
                request.runs[place] = actor.lane.offer(offer, self.now_s)
                request.missing.add(place)
                self.by_run[place, request.runs[place]] = request
        except Overloaded as error:
            self.retry_after.append(error.retry_after_s)
            self._end(request, "refused")

    def _end(self, request: Request, how: str) -> None:
        """Once; its rows elsewhere are wanted no more, as the pipeline does when a part of a request fails."""
        assert not request.ended
        request.ended, request.ended_s = how, self.now_s
        for place, run in request.runs.items():
            del self.by_run[place, run]
            self.actors[place].lane.withdraw(run)

    def _pump(self, place: int, actor: Actor) -> None:
        while (plan := actor.lane.next_frame(self.now_s)) is not None:
            actor.waiting.append((plan, self.now_s))
            if len(actor.waiting) == 1:
                self._begin(place, actor)
        for run in actor.lane.expire(self.now_s):
            self._end(self.by_run[place, run], "late")

    def _begin(self, place: int, actor: Actor) -> None:
        plan, sent_s = actor.waiting[0]
        rows = sum(run.num_rows for segment in plan.forward.segments for run in segment.runs if not self._is_late(run.timeout_ms, sent_s))
        took_s = FRAME_S + rows / ROWS_PER_S
        actor.busy_s += took_s
        self._at(self.now_s + took_s, "computed", place)

    def _is_late(self, timeout_ms: int, sent_s: float) -> bool:
        return self.now_s - sent_s > timeout_ms / 1000

    def _computed(self, place: int) -> None:
        actor = self.actors[place]
        plan, _ = actor.waiting.pop(0)
        parts = tuple(
            SegmentResult(one.segment_id, one.attempt, SegmentStatus.OK, one.dtype, one.dim, sum(run.num_rows for run in one.runs), (), "")
            for one in plan.forward.segments
        )
        outcome = actor.lane.frame_done(Result(plan.forward.frame_id, 1, FrameStatus.OK, 0.0, 0.0, parts), self.now_s)
        assert outcome.failed == []
        for piece in outcome.rows:
            request = self.by_run.get((place, piece.run_id))
            if request is not None and piece.is_complete:
                request.missing.discard(place)
                if not request.missing:
                    self._end(request, "answered" if self.now_s <= request.arrived_s + DEADLINE_S else "late")
        if actor.waiting:
            self._begin(place, actor)

    def answered(self, begin_s: float, end_s: float) -> list[Request]:
        """Requests that were answered in time, by when."""
        return [request for request in self.requests if request.ended == "answered" and begin_s <= request.ended_s < end_s]


@pytest.mark.parametrize("seed", range(2))
def test_at_ten_times_the_load_the_actors_work_for_answers_that_are_wanted(seed: int) -> None:
    sim = Sim(seed)
    sim.arrive(4.0, 0.5)
    sim.run(4.0)
    assert {request.ended for request in sim.requests if request.arrived_s < 3.0} == {"answered"}
    sim.arrive(10.0, 10.0)
    sim.run(10.0)
    crowd = sim.answered(5.0, 10.0)
    assert sum(request.num_rows for request in crowd) / 5.0 >= 0.9 * PEAK_ROWS_PER_S
    assert sim.most_queued <= DEADLINE_S * PEAK_ROWS_PER_S * len(sim.actors)
    assert min(sim.retry_after) > 0
    sim.arrive(16.0, 0.5)
    sim.run(16.0)
    soon = [request for request in sim.requests if 12.0 <= request.arrived_s < 15.0]
    assert all(request.ended == "answered" for request in soon)
    assert median(request.ended_s - request.arrived_s for request in soon) <= FULL_FRAME_S
    sim.run(20.0)
    assert all(request.ended for request in sim.requests)
    assert all(actor.lane.is_idle for actor in sim.actors)
    assert sim.by_run == {}


def test_nobody_is_overtaken_by_more_than_a_turn() -> None:
    """Requests of one size are answered in the order of their arrival, however many wait."""
    sim = Sim(5)
    sim.arrive(4.0, 10.0, sizes=(64,))
    sim.run(6.0)
    order = [request.arrived_s for request in sorted(sim.answered(0.0, 6.0), key=lambda request: (request.ended_s, request.number))]
    assert len(order) > 100
    assert order == sorted(order)


def test_a_small_queue_is_bounded_by_its_limit() -> None:
    sim = Sim(6, max_queued=4096)
    sim.arrive(4.0, 10.0)
    sim.run(6.0)
    assert 0 < sim.most_queued <= 4096
    assert all(request.ended for request in sim.requests)
