"""One actor's lane: rows wait here while the actor is busy and leave together in its next frame. Sans-io; no timer, no threshold.

While fewer than `frames_in_flight` frames are under way, `next_frame` gives whatever waits. Rows that arrive meanwhile merge: the runs of one copy
become one segment, up to `max_tokens_per_frame` rows, fairly between flows. A run longer than that is spread over frames.
A merged segment that raises is retried once, each run alone, so that one request's rows never fail another's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.core.errors import DeadlineExceeded, InvalidRequest, MoeError, ReplicaFaulted
from cluster.core.link_frames import MAX_TRACEPARENTS, Cancel, Forward, Result, Run, Segment, SegmentResult, SegmentStatus
from router_service.core.fair_queue import SegmentKey
from router_service.core.frame_draft import FrameDraft, Piece
from router_service.core.frame_outcome import check_result, error_of_frame, error_of_segment
from router_service.core.hope import check_hope
from router_service.core.runs import RunOffer, Runs, TokenBudget

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
        self._runs = Runs(budget, limits.quantum)
        self._in_flight: dict[int, _Sent] = {}
        self._in_flight_tokens = 0
        self._num_frames = 0
        self._num_segments = 0
        self._tokens_per_s = 0.0
        self._tokens_per_frame = 0.0
        self._last_done_s = 0.0

    @property
    def queued_tokens(self) -> int:
        """Rows that wait for a frame."""
        return self._runs.queue.num_rows

    @property
    def pending_tokens(self) -> int:
        """Rows that wait for a frame or are under way in one."""
        return self._runs.queue.num_rows + self._in_flight_tokens

    @property
    def num_frames_in_flight(self) -> int:
        """Frames without a Result."""
        return len(self._in_flight)

    @property
    def is_idle(self) -> bool:
        """Whether no run has still to end and no Result is due."""
        return not self._runs.by_id and not self._in_flight

    def oldest_age_s(self, now_s: float) -> float:
        """Age of the oldest run that has not ended; 0 when there is none."""
        oldest = next(iter(self._runs.by_id.values()), None)
        return now_s - oldest.offered_s if oldest is not None else 0.0

    def set_limits(self, limits: LaneLimits) -> None:
        """Take the limits of a fresh link."""
        self._limits = limits
        self._runs.queue.quantum = limits.quantum

    def offer(self, offer: RunOffer, now_s: float) -> int:
        """Queue a run and get its number. Raises DeadlineExceeded, InvalidRequest, Overloaded with the time to wait, MessageTooLarge."""
        if offer.deadline_s <= now_s:
            message = "the deadline had passed before the rows could wait for a frame"
            raise DeadlineExceeded(message)
        if offer.num_rows < 1 or offer.key.dim < 1:
            message = "a segment needs at least one row of at least one element"
            raise InvalidRequest(message, field="rows")
        if offer.key.dim * offer.key.dtype.itemsize > self._limits.max_frame_bytes:
            message = f"one row is larger than a frame of {self._limits.max_frame_bytes} bytes; raise link.max_frame_bytes"
            raise InvalidRequest(message, field="rows")
        rows_before = self._runs.queue.rows_before(offer.num_rows) + self._in_flight_tokens
        # The next frame of a crowd holds this many rows: a rate that was learned from far smaller ones says little about it.
        if rows_before and min(rows_before, self._limits.max_tokens_per_frame) <= _TRUSTED_FACTOR * self._tokens_per_frame:
            check_hope(rows_before + offer.num_rows, self._tokens_per_s, offer.deadline_s - now_s)
        return self._runs.add(offer, now_s, self._tokens_per_s)

    def next_frame(self, now_s: float) -> FramePlan | None:
        """The next frame, to be sent now, or None: the window is full, or too little waits. Runs whose time is up are left out; `expire` names them."""
        runs = self._runs
        if now_s >= runs.next_deadline_s:
            runs.drop_expired(now_s)
        wanted = self._limits.min_overlapping_tokens if self._in_flight else 0
        if len(self._in_flight) >= self._limits.frames_in_flight or runs.queue.num_rows < max(1, wanted):
            return None
        draft = FrameDraft(max_tokens=self._limits.max_tokens_per_frame, max_bytes=self._limits.max_frame_bytes)
        return self._send(draft, runs.fill(draft), now_s)

    def expire(self, now_s: float) -> list[int]:
        """End the runs whose time is up; gives those that ended so since the last call."""
        runs = self._runs
        if now_s >= runs.next_deadline_s:
            runs.drop_expired(now_s)
        expired, runs.expired = runs.expired, []
        return expired

    def withdraw(self, run_id: int) -> list[Cancel]:
        """End a run that nobody waits for. Gives what to tell the actor about segments that have no other run left. Unknown runs are ignored."""
        run = self._runs.by_id.get(run_id)
        if run is None:
            return []
        self._runs.end(run_id)
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
                if (run := self._runs.by_id.get(piece.run_id)) is not None:
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
        lost = list(self._runs.by_id)
        for run_id in lost:
            self._runs.end(run_id)
        self._in_flight.clear()
        self._in_flight_tokens = 0
        return lost

    def abandon(self) -> list[int]:
        """The actor is not trusted to answer: end every run, but count its frames until their Results come. Gives the runs."""
        ended = list(self._runs.by_id)
        for run_id in ended:
            self._runs.end(run_id)
        return ended

    def turn_away(self) -> list[int]:
        """Nothing more may be sent: end every run that still has rows to send. Gives them; the others await their Result."""
        waiting = [run_id for run_id, run in self._runs.by_id.items() if run.spans]
        for run_id in waiting:
            self._runs.end(run_id)
        return waiting

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
                run = self._runs.by_id[piece.run_id]
                run.frame_ids.add(frame_id)
                if run.offer.traceparent:
                    parents[run.offer.traceparent] = None
        forward = Forward(frame_id, self._generation, tuple(parents)[:MAX_TRACEPARENTS], tuple(segments))
        self._in_flight_tokens += num_tokens
        self._in_flight[frame_id] = _Sent(forward, tuple(groups), num_tokens, now_s)
        return FramePlan(forward, tuple(pieces), num_tokens, draft.num_bytes)

    def _segment(self, key: SegmentKey, pieces: Sequence[Piece], now_s: float) -> Segment:
        self._num_segments += 1
        runs = tuple([_run_of(self._runs.by_id[piece.run_id].offer, piece, now_s) for piece in pieces])
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
            run = self._runs.by_id.get(run_id)
            if run is not None:
                run.rows_done += stop - start
                is_complete = run.rows_done == run.offer.num_rows
                outcome.rows.append(PieceRows(run_id, start, stop, offset_bytes, is_complete))
                if is_complete:
                    self._runs.end(run_id)
            offset_bytes += (stop - start) * row_bytes

    def _retry_alone(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if piece.run_id in self._runs.by_id:
                self._runs.put_back_alone(*piece)

    def _fail(self, pieces: Sequence[Piece], error: MoeError, outcome: FrameOutcome) -> None:
        for piece in pieces:
            if piece.run_id in self._runs.by_id:
                self._runs.end(piece.run_id)
                outcome.failed.append((piece.run_id, error))

    def _abandoned(self, sent: _Sent, run_id: int) -> tuple[int, ...]:
        """Segments of a frame in which this run was the last one that anybody waits for."""
        pairs = zip(sent.forward.segments, sent.segments, strict=True)
        return tuple(
            segment.segment_id
            for segment, (_, pieces) in pairs
            if any(piece.run_id == run_id for piece in pieces) and not any(piece.run_id in self._runs.by_id for piece in pieces)
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
