"""One actor's lane: rows wait here while the actor is busy and leave together in its next frame. Sans-io; no timer, no threshold.

While fewer than `frames_in_flight` frames are under way, `next_frame` gives whatever waits. Rows that arrive meanwhile merge: the runs of one copy
become one segment, up to `max_tokens_per_frame` rows, fairly between flows. A run longer than that is spread over frames.
A merged segment that raises is retried once, each run alone, so that one request's rows never fail another's.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.core.descriptors import DType
from cluster.core.errors import DeadlineExceeded, InvalidRequest, MessageTooLarge, MoeError, Overloaded, ReplicaFaulted
from cluster.core.ids import ExpertId, Role
from cluster.core.link_frames import MAX_TRACEPARENTS, Cancel, Forward, Result, Run, Segment, SegmentResult, SegmentStatus
from router_service.core.fair_queue import FairQueue, SegmentKey, Span
from router_service.core.frame_draft import FrameDraft, Piece
from router_service.core.frame_outcome import check_result, error_of_frame, error_of_segment
from router_service.core.hope import check_hope

_MIN_RETRY_AFTER_S = 0.01
_MAX_RETRY_AFTER_S = 5.0
_RATE_WEIGHT = 0.2
_TRUSTED_FACTOR = 4
_MAX_TIMEOUT_MS = 1 << 31
_TURNS_PER_FRAME = 8


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """What one frame may hold and how many may be under way, as the actor's Welcome says.

    `min_overlapping_tokens` is ours: a frame goes out beside another one only with so many rows. Fewer would gain little by waiting at the actor
    instead of here, and here they merge with those that come meanwhile: experts read their weights once for all of them.
    """

    max_tokens_per_frame: int = 4096
    max_frame_bytes: int = 256 << 20
    frames_in_flight: int = 2
    min_overlapping_tokens: int = 0

    @property
    def quantum(self) -> int:
        """Rows of one flow's turn."""
        return max(1, self.max_tokens_per_frame // _TURNS_PER_FRAME)


class TokenBudget:
    """Rows that may wait over all lanes of a router."""

    def __init__(self, max_queued_tokens: int) -> None:
        self.max_queued_tokens = max_queued_tokens
        self.queued_tokens = 0


# Not frozen, as `SegmentRequest` is not: many are made for each call. Nobody changes them all the same.
@dataclass(slots=True, eq=False)
class RunOffer:
    """Rows of one request for one copy: what a caller asks a lane to carry. `version` is the raw digest."""

    flow: Hashable
    expert: ExpertId
    version: bytes
    role: Role
    dtype: DType
    dim: int
    attempt: int
    num_rows: int
    deadline_s: float
    exact: bool = False
    epoch: int = 0
    traceparent: str | None = None


@dataclass(slots=True, eq=False)
class _Run:
    offer: RunOffer
    offered_s: float
    spans: set[Span] = field(default_factory=set)
    frame_ids: set[int] = field(default_factory=set)
    rows_done: int = 0


class FramePlan(NamedTuple):
    """A frame to send: its header, the pieces whose rows make its body, in that order, and their rows and bytes in all."""

    forward: Forward
    pieces: tuple[Piece, ...]
    num_tokens: int
    num_bytes: int


class PieceRows(NamedTuple):
    """Rows [start, stop) of a run have come: they lie in the body from `offset_bytes` on. `is_complete`: the run has all its rows now."""

    run_id: int
    start: int
    stop: int
    offset_bytes: int
    is_complete: bool


@dataclass(slots=True)
class FrameOutcome:
    """What a Result means: rows that came, and runs that ended in an error. Runs that had ended before, withdrawn or lost, are in neither.

    `num_tokens` and `took_s` are of the frame, from its sending; 0 when it was not in flight.
    """

    num_tokens: int = 0
    took_s: float = 0.0
    rows: list[PieceRows] = field(default_factory=list)
    failed: list[tuple[int, MoeError]] = field(default_factory=list)


class _Sent(NamedTuple):
    forward: Forward
    segments: tuple[tuple[SegmentKey, tuple[Piece, ...]], ...]
    num_tokens: int
    sent_s: float


class Lane:
    """The runs of one incarnation. Every run that is offered ends exactly once: complete, failed, expired, withdrawn or lost."""

    def __init__(self, generation: int, limits: LaneLimits, budget: TokenBudget) -> None:
        self._generation = generation
        self._limits = limits
        self._budget = budget
        self._queue = FairQueue(limits.quantum)
        self._runs: dict[int, _Run] = {}
        self._in_flight: dict[int, _Sent] = {}
        self._in_flight_tokens = 0
        self._num_runs = 0
        self._num_frames = 0
        self._num_segments = 0
        self._expired: list[int] = []
        self._next_deadline_s = math.inf
        self._tokens_per_s = 0.0
        self._tokens_per_frame = 0.0
        self._last_done_s = 0.0

    @property
    def queued_tokens(self) -> int:
        """Rows that wait for a frame."""
        return self._queue.num_rows

    @property
    def pending_tokens(self) -> int:
        """Rows that wait for a frame or are under way in one."""
        return self._queue.num_rows + self._in_flight_tokens

    @property
    def num_frames_in_flight(self) -> int:
        """Frames without a Result."""
        return len(self._in_flight)

    @property
    def is_idle(self) -> bool:
        """Whether no run has still to end and no Result is due."""
        return not self._runs and not self._in_flight

    def oldest_age_s(self, now_s: float) -> float:
        """Age of the oldest run that has not ended; 0 when there is none."""
        oldest = next(iter(self._runs.values()), None)
        return now_s - oldest.offered_s if oldest is not None else 0.0

    def set_limits(self, limits: LaneLimits) -> None:
        """Take the limits of a fresh link."""
        self._limits = limits
        self._queue.quantum = limits.quantum

    def offer(self, offer: RunOffer, now_s: float) -> int:
        """Queue a run and get its number. Raises DeadlineExceeded, InvalidRequest, Overloaded with the time to wait, MessageTooLarge."""
        if offer.deadline_s <= now_s:
            message = "the deadline had passed before the rows could wait for a frame"
            raise DeadlineExceeded(message)
        if offer.num_rows < 1 or offer.dim < 1:
            message = "a segment needs at least one row of at least one element"
            raise InvalidRequest(message, field="rows")
        if offer.dim * offer.dtype.itemsize > self._limits.max_frame_bytes:
            message = f"one row is larger than a frame of {self._limits.max_frame_bytes} bytes; raise link.max_frame_bytes"
            raise InvalidRequest(message, field="rows")
        rows_before = self._queue.rows_before(offer.num_rows) + self._in_flight_tokens
        # The next frame of a crowd holds this many rows: a rate that was learned from far smaller ones says little about it.
        if rows_before and min(rows_before, self._limits.max_tokens_per_frame) <= _TRUSTED_FACTOR * self._tokens_per_frame:
            check_hope(rows_before + offer.num_rows, self._tokens_per_s, offer.deadline_s - now_s)
        self._admit(offer.num_rows)
        self._num_runs += 1
        run_id = self._num_runs
        key = SegmentKey(offer.expert, offer.version, offer.role, offer.dtype, offer.dim, offer.attempt)
        self._runs[run_id] = _Run(offer, now_s)
        flow = ("run", run_id) if offer.flow is None else offer.flow
        self._push(Span(run_id, flow, key, 0, offer.num_rows))
        self._next_deadline_s = min(self._next_deadline_s, offer.deadline_s)
        return run_id

    def next_frame(self, now_s: float) -> FramePlan | None:
        """The next frame, to be sent now, or None: the window is full, or too little waits. Runs whose time is up are left out; `expire` names them."""
        if now_s >= self._next_deadline_s:
            self._drop_expired(now_s)
        wanted = self._limits.min_overlapping_tokens if self._in_flight else 0
        if len(self._in_flight) >= self._limits.frames_in_flight or self._queue.num_rows < max(1, wanted):
            return None
        draft = FrameDraft(max_tokens=self._limits.max_tokens_per_frame, max_bytes=self._limits.max_frame_bytes)
        num_waiting = self._queue.num_rows
        for span in self._queue.fill(draft):
            self._runs[span.run_id].spans.discard(span)
        num_tokens = num_waiting - self._queue.num_rows
        self._budget.queued_tokens -= num_tokens
        return self._send(draft, num_tokens, now_s)

    def expire(self, now_s: float) -> list[int]:
        """End the runs whose time is up; gives those that ended so since the last call."""
        if now_s >= self._next_deadline_s:
            self._drop_expired(now_s)
        expired, self._expired = self._expired, []
        return expired

    def withdraw(self, run_id: int) -> list[Cancel]:
        """End a run that nobody waits for. Gives what to tell the actor about segments that have no other run left. Unknown runs are ignored."""
        run = self._runs.get(run_id)
        if run is None:
            return []
        self._end(run_id)
        cancels = [(frame_id, self._abandoned(self._in_flight[frame_id], run_id)) for frame_id in sorted(run.frame_ids)]
        return [Cancel(frame_id, segment_ids) for frame_id, segment_ids in cancels if segment_ids]

    def frame_done(self, result: Result, now_s: float) -> FrameOutcome:
        """Take a Result. Late ones, of frames that are not in flight, mean nothing.

        Raises InvalidRequest for a result that cannot belong to its frame; the link cannot be trusted then.
        """
        sent = self._in_flight.get(result.frame_id)
        if sent is None:
            return FrameOutcome()
        outcome = FrameOutcome(sent.num_tokens, now_s - sent.sent_s)
        check_result(sent.forward, result)
        del self._in_flight[result.frame_id]
        self._in_flight_tokens -= sent.num_tokens
        self._learn_rate(sent, now_s)
        for _, pieces in sent.segments:
            for piece in pieces:
                if (run := self._runs.get(piece.run_id)) is not None:
                    run.frame_ids.discard(result.frame_id)
        refused = error_of_frame(sent.forward, result)
        if refused is not None:
            for _, pieces in sent.segments:
                self._fail(pieces, refused, outcome)
            return outcome
        offset_bytes = 0
        for (key, pieces), segment in zip(sent.segments, result.segments, strict=True):
            self._segment_done(pieces, segment, offset_bytes, outcome, is_alone=bool(key.alone))
            offset_bytes += segment.num_bytes
        return outcome

    def lose(self) -> list[int]:
        """The link is gone: end every run, forget every frame. Gives the runs."""
        lost = list(self._runs)
        for run_id in lost:
            self._end(run_id)
        self._in_flight.clear()
        self._in_flight_tokens = 0
        return lost

    def abandon(self) -> list[int]:
        """The actor is not trusted to answer: end every run, but count its frames until their Results come. Gives the runs."""
        ended = list(self._runs)
        for run_id in ended:
            self._end(run_id)
        return ended

    def turn_away(self) -> list[int]:
        """Nothing more may be sent: end every run that still has rows to send. Gives them; the others await their Result."""
        waiting = [run_id for run_id, run in self._runs.items() if run.spans]
        for run_id in waiting:
            self._end(run_id)
        return waiting

    def _admit(self, num_rows: int) -> None:
        limit = self._budget.max_queued_tokens
        if num_rows > limit:
            message = f"{num_rows} rows for one expert are over the limit of {limit} (router.max_queued_tokens); send fewer tokens at a time"
            raise MessageTooLarge(message)
        if self._budget.queued_tokens + num_rows > limit:
            wait_s = self._queue.num_rows / self._tokens_per_s if self._tokens_per_s else 0.1
            message = f"{self._budget.queued_tokens} rows wait for expert actors already; the limit is {limit} (router.max_queued_tokens); retry later"
            raise Overloaded(message, retry_after_s=min(max(wait_s, _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S))

    def _push(self, span: Span) -> None:
        self._queue.push(span)
        self._runs[span.run_id].spans.add(span)
        self._budget.queued_tokens += span.num_rows

    def _end(self, run_id: int) -> _Run:
        run = self._runs.pop(run_id)
        for span in run.spans:
            self._queue.remove(span)
            self._budget.queued_tokens -= span.num_rows
        return run

    def _drop_expired(self, now_s: float) -> None:
        """Looks at all runs, so only to be called when the earliest deadline that was ever offered has passed."""
        expired = [run_id for run_id, run in self._runs.items() if run.offer.deadline_s <= now_s]
        for run_id in expired:
            self._end(run_id)
        self._expired += expired
        self._next_deadline_s = min((run.offer.deadline_s for run in self._runs.values()), default=math.inf)

    def _send(self, draft: FrameDraft, num_tokens: int, now_s: float) -> FramePlan:
        self._num_frames += 1
        frame_id, groups = self._num_frames, draft.segments()
        pieces: list[Piece] = []
        parents: dict[str, None] = {}
        segments = []
        for key, group in groups:
            segments.append(self._segment(key, group, now_s))
            pieces += group
            for piece in group:
                run = self._runs[piece.run_id]
                run.frame_ids.add(frame_id)
                if run.offer.traceparent:
                    parents[run.offer.traceparent] = None
        forward = Forward(frame_id, self._generation, tuple(parents)[:MAX_TRACEPARENTS], tuple(segments))
        self._in_flight_tokens += num_tokens
        self._in_flight[frame_id] = _Sent(forward, tuple(groups), num_tokens, now_s)
        return FramePlan(forward, tuple(pieces), num_tokens, draft.num_bytes)

    def _segment(self, key: SegmentKey, pieces: Sequence[Piece], now_s: float) -> Segment:
        self._num_segments += 1
        runs = tuple([_run_of(self._runs[piece.run_id].offer, piece, now_s) for piece in pieces])
        model, layer, index = key.expert
        return Segment(self._num_segments, key.attempt, model, layer, index, key.version, key.role, key.dtype, key.dim, runs)

    def _segment_done(self, pieces: Sequence[Piece], segment: SegmentResult, offset_bytes: int, outcome: FrameOutcome, *, is_alone: bool) -> None:
        if not segment.expired_runs and segment.status is SegmentStatus.OK:
            self._deliver(pieces, segment.dim * segment.dtype.itemsize, offset_bytes, outcome)
            return
        expired = set(segment.expired_runs)
        kept = [piece for index, piece in enumerate(pieces) if index not in expired]
        late = DeadlineExceeded("the deadline passed while the rows waited in the expert actor")
        self._fail([pieces[index] for index in sorted(expired)], late, outcome)
        error = error_of_segment(segment)
        if error is None:
            self._deliver(kept, segment.dim * segment.dtype.itemsize, offset_bytes, outcome)
        elif isinstance(error, ReplicaFaulted) and not is_alone and len(pieces) > 1:
            # Rows that were alone already share no more blame: a run in several pieces must not come back for ever.
            self._retry_alone(kept)
        else:
            self._fail(kept, error, outcome)

    def _deliver(self, pieces: Sequence[Piece], row_bytes: int, offset_bytes: int, outcome: FrameOutcome) -> None:
        for run_id, start, stop in pieces:
            run = self._runs.get(run_id)
            if run is not None:
                run.rows_done += stop - start
                is_complete = run.rows_done == run.offer.num_rows
                outcome.rows.append(PieceRows(run_id, start, stop, offset_bytes, is_complete))
                if is_complete:
                    self._end(run_id)
            offset_bytes += (stop - start) * row_bytes

    def _retry_alone(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            run = self._runs.get(piece.run_id)
            if run is not None:
                offer = run.offer
                key = SegmentKey(offer.expert, offer.version, offer.role, offer.dtype, offer.dim, offer.attempt, alone=piece.run_id)
                self._push(Span(piece.run_id, ("alone", piece.run_id), key, piece.start, piece.stop))

    def _fail(self, pieces: Sequence[Piece], error: MoeError, outcome: FrameOutcome) -> None:
        for piece in pieces:
            if piece.run_id in self._runs:
                self._end(piece.run_id)
                outcome.failed.append((piece.run_id, error))

    def _abandoned(self, sent: _Sent, run_id: int) -> tuple[int, ...]:
        """Segments of a frame in which this run was the last one that anybody waits for."""
        pairs = zip(sent.forward.segments, sent.segments, strict=True)
        return tuple(
            segment.segment_id
            for segment, (_, pieces) in pairs
            if any(piece.run_id == run_id for piece in pieces) and not any(piece.run_id in self._runs for piece in pieces)
        )

    def _learn_rate(self, sent: _Sent, now_s: float) -> None:
        elapsed_s = now_s - max(sent.sent_s, self._last_done_s)
        self._last_done_s = now_s
        if elapsed_s > 0:
            rate = sent.num_tokens / elapsed_s
            self._tokens_per_s += (_RATE_WEIGHT if self._tokens_per_s else 1.0) * (rate - self._tokens_per_s)
            self._tokens_per_frame += (_RATE_WEIGHT if self._tokens_per_frame else 1.0) * (sent.num_tokens - self._tokens_per_frame)


def _run_of(offer: RunOffer, piece: Piece, now_s: float) -> Run:
    left_ms = min((offer.deadline_s - now_s) * 1000, _MAX_TIMEOUT_MS)
    return Run(piece.stop - piece.start, max(1, math.floor(left_ms)), offer.exact, offer.epoch)
