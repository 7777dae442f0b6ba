"""The runs of one actor's lane: who waits for rows, how many rows may wait, and until when. What frames hold of them is the lane's affair. Sans-io."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

from cluster.core.errors import MessageTooLarge, Overloaded
from router_service.core.fair_queue import FairQueue, Frame, SegmentKey, Span
from router_service.core.hope import MAX_RETRY_AFTER_S, MIN_RETRY_AFTER_S


class TokenBudget:
    """Rows that may wait over all lanes of a router."""

    def __init__(self, max_queued_tokens: int) -> None:
        self.max_queued_tokens = max_queued_tokens
        self.queued_tokens = 0


# Not frozen, as `SegmentRequest` is not: many are made for each call. Nobody changes them all the same.
@dataclass(slots=True, eq=False)
class RunOffer:
    """Rows of one request for one copy: what a caller asks a lane to carry. `flow` is whose turn they take; None: one of their own."""

    key: SegmentKey
    num_rows: int
    deadline_s: float
    flow: Hashable = None
    exact: bool = False
    epoch: int = 0
    traceparent: str | None = None


@dataclass(slots=True, eq=False)
class OpenRun:
    """An offer that was taken: its rows that no frame holds yet, the frames that hold others, and how many have come."""

    offer: RunOffer
    offered_s: float
    spans: set[Span]
    frame_ids: set[int] = field(default_factory=set)
    rows_done: int = 0


class Runs:
    """Those that have not ended, by number in the order they came; `queue` holds what waits of them for a frame."""

    def __init__(self, budget: TokenBudget, quantum: int) -> None:
        self.by_id: dict[int, OpenRun] = {}
        self.queue = FairQueue(quantum)
        self.next_deadline_s = math.inf
        self.expired: list[int] = []
        self._budget = budget
        self._num_runs = 0

    def add(self, offer: RunOffer, now_s: float, tokens_per_s: float) -> int:
        """Take an offer and give it a number. Raises MessageTooLarge, and Overloaded with the time in which what waits here leaves at such a rate."""
        budget, num_rows = self._budget, offer.num_rows
        limit = budget.max_queued_tokens
        if num_rows > limit:
            message = f"{num_rows} rows for one expert are over the limit of {limit} (router.max_queued_tokens); send fewer tokens at a time"
            raise MessageTooLarge(message)
        if budget.queued_tokens + num_rows > limit:
            wait_s = self.queue.num_rows / tokens_per_s if tokens_per_s else 0.1
            message = f"{budget.queued_tokens} rows wait for expert actors already; the limit is {limit} (router.max_queued_tokens); retry later"
            raise Overloaded(message, retry_after_s=min(max(wait_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S))
        self._num_runs = run_id = self._num_runs + 1
        flow = ("run", run_id) if offer.flow is None else offer.flow
        span = Span(run_id, flow, offer.key, 0, num_rows)
        self.by_id[run_id] = OpenRun(offer, now_s, {span})
        self.queue.push(span)
        budget.queued_tokens += num_rows
        self.next_deadline_s = min(self.next_deadline_s, offer.deadline_s)
        return run_id

    def put_back_alone(self, run_id: int, start: int, stop: int) -> None:
        """Rows [start, stop) of a run that a frame held wait once more, for a segment of their own."""
        run = self.by_id[run_id]
        span = Span(run_id, ("alone", run_id), run.offer.key._replace(alone=run_id), start, stop)
        run.spans.add(span)
        self.queue.push(span)
        self._budget.queued_tokens += stop - start

    def fill(self, frame: Frame) -> int:
        """Move rows that wait into a frame; how many."""
        num_waiting = self.queue.num_rows
        for span in self.queue.fill(frame):
            self.by_id[span.run_id].spans.discard(span)
        num_tokens = num_waiting - self.queue.num_rows
        self._budget.queued_tokens -= num_tokens
        return num_tokens

    def end(self, run_id: int) -> None:
        """A run has ended, however; what waits of it is dropped."""
        for span in self.by_id.pop(run_id).spans:
            self.queue.remove(span)
            self._budget.queued_tokens -= span.num_rows

    def drop_expired(self, now_s: float) -> None:
        """End the runs whose time is up. Looks at all of them, so only to be called when `next_deadline_s`, the earliest ever offered, has passed."""
        expired = [run_id for run_id, run in self.by_id.items() if run.offer.deadline_s <= now_s]
        for run_id in expired:
            self.end(run_id)
        self.expired += expired
        self.next_deadline_s = min((run.offer.deadline_s for run in self.by_id.values()), default=math.inf)
