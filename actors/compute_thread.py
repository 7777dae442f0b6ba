"""The one thread that computes: a bounded queue of frames in arrival order, each planned when its turn comes, and progress that others may read."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from actors.blob_files import StoredBlob
from actors.core.frames import Buffers, Outcome, answer, copy_of, plan_frame
from actors.core.slots import Holding
from actors.expert_layouts import ExpertWeights
from actors.frame_forward import Outcomes
from actors.packed_forward import PackedForward
from cluster.core.descriptors import ExpertDescriptor
from cluster.core.ids import CopyId, Incarnation
from cluster.core.link_frames import Forward, Result, SegmentStatus
from cluster.telemetry.tracing import Span, Tracing

Reply = Callable[[Result, Buffers], None]
logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class PendingFrame:
    """A frame that was taken. `holdings` and `weights` follow its segments (None: not held); `leases` are the copies it keeps from being let go.

    `packed` are shadows, by position, that are held and have no weights, because there was no room to expand them.
    `condemned` are copies that turned out to be corrupt while it waited or was computed: nothing of theirs is sent.
    """

    frame: Forward
    body: memoryview
    reply: Reply
    holdings: Sequence[Holding]
    weights: Sequence[ExpertWeights | None]
    leases: tuple[CopyId, ...]
    arrived_s: float
    num_rows: int
    packed: dict[int, StoredBlob] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    condemned: set[CopyId] = field(default_factory=set)


class ComputeThread:
    """Takes frames from any thread, computes them in its own."""

    def __init__(
        self,
        forward: PackedForward,
        *,
        incarnation: Incarnation,
        max_queued_frames: int,
        clock: Callable[[], float],
        prepare: Callable[[], None],
        on_computed: Callable[[PendingFrame], None],
        on_death: Callable[[BaseException], None],
        tracing: Tracing,
        labels: dict[str, str | int],
    ) -> None:
        self._forward = forward
        self._incarnation = incarnation
        self._max_queued_frames = max_queued_frames
        self._clock = clock
        self._prepare = prepare
        self._on_computed = on_computed
        self._on_death = on_death
        self._tracing = tracing
        self._labels = labels
        self._changed = threading.Condition()
        self._waiting: deque[PendingFrame] = deque()
        self._current: PendingFrame | None = None
        self._frames_done = 0
        self._queued_rows = 0
        self._is_ready = False
        self._is_stopping = False
        self._thread = threading.Thread(target=self._main, name="compute", daemon=True)

    def start(self, timeout_s: float) -> None:
        """Start the thread and wait until it has prepared. Raises TimeoutError when it has not within the limit."""
        self._thread.start()
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_ready, timeout_s):
                message = f"the compute thread was not prepared within {timeout_s} s"
                raise TimeoutError(message)

    def offer(self, pending: PendingFrame) -> bool:
        """Queue a frame; False when the queue is full or the thread is stopping."""
        with self._changed:
            if self._is_stopping or len(self._waiting) >= self._max_queued_frames:
                return False
            self._waiting.append(pending)
            self._queued_rows += pending.num_rows
            self._changed.notify_all()
            return True

    def cancel(self, frame: Forward, segment_ids: Sequence[int]) -> None:
        """Skip segments of a frame that waits; one that has begun is computed to its end."""
        with self._changed:
            for pending in self._waiting:
                if pending.frame is frame:
                    pending.cancelled.update(segment_ids)

    def condemn(self, copy: CopyId) -> None:
        """A copy turned out to be corrupt: frames that wait and the one under way send nothing of it."""
        with self._changed:
            for pending in (*self._waiting, *([self._current] if self._current is not None else [])):
                pending.condemned.add(copy)

    def progress(self) -> tuple[int, float, int]:
        """Frames done, age of the oldest unanswered frame in seconds (0 when idle), rows not answered yet."""
        with self._changed:
            oldest = self._current or (self._waiting[0] if self._waiting else None)
            age_s = 0.0 if oldest is None else max(0.0, self._clock() - oldest.arrived_s)
            return self._frames_done, age_s, self._queued_rows

    def stop(self, timeout_s: float) -> bool:
        """Take no more frames, answer what is queued, end. False when the thread is still busy at the limit."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            self._serve()
        except Exception as error:  # noqa: BLE001  (a process whose compute thread is gone must not look alive)
            self._on_death(error)

    def _serve(self) -> None:
        self._prepare()
        with self._changed:
            self._is_ready = True
            self._changed.notify_all()
        while (pending := self._next()) is not None:
            self._answer(pending)
            with self._changed:
                self._current = None
                self._frames_done += 1
                self._queued_rows -= pending.num_rows
                self._changed.notify_all()
            del pending  # its weights may be on their way out

    def _next(self) -> PendingFrame | None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting) or self._is_stopping)
            if not self._waiting:
                return None
            self._current = self._waiting.popleft()
            return self._current

    def _answer(self, pending: PendingFrame) -> None:
        frame = pending.frame
        if frame.traceparents:
            parent, *links = frame.traceparents
            with self._tracing.span("expert.forward", kind="server", parent=parent, links=links, attributes=self._labels) as span:
                result, buffers = self._compute(pending)
                _describe(span, pending, result)
        else:
            result, buffers = self._compute(pending)
        self._on_computed(pending)
        try:
            pending.reply(result, buffers)
        except Exception:
            # A link that is gone must not take the other links' compute thread with it; the router sees the loss itself.
            logger.exception("a reply could not be handed to its link")

    def _compute(self, pending: PendingFrame) -> tuple[Result, Buffers]:
        begun_s = self._clock()
        queue_s = max(0.0, begun_s - pending.arrived_s)
        descriptors = [_descriptor_of(pending, position) for position in range(len(pending.weights))]
        plan = plan_frame(pending.frame, pending.holdings, descriptors, waited_s=queue_s, cancelled=frozenset(pending.cancelled))
        held = {position: weights for position, weights in enumerate(pending.weights) if weights is not None}
        outcomes = self._forward.run(plan, pending.body, held, pending.packed)
        if pending.condemned:
            outcomes = self._without_condemned(pending, outcomes)
        compute_s = max(0.0, self._clock() - begun_s)
        return answer(plan, outcomes, self._incarnation, queue_s=queue_s, compute_s=compute_s)

    def _without_condemned(self, pending: PendingFrame, outcomes: Outcomes) -> Outcomes:
        with self._changed:
            condemned = frozenset(pending.condemned)
        wrong = Outcome(SegmentStatus.WRONG_NUMBERS, message="the copy's resident weights turned out to be corrupt; use another copy")
        return {position: wrong if copy_of(pending.frame.segments[position]) in condemned else outcome for position, outcome in outcomes.items()}


def _descriptor_of(pending: PendingFrame, position: int) -> ExpertDescriptor | None:
    found = pending.weights[position] or pending.packed.get(position)
    return found.descriptor if found is not None and isinstance(found.descriptor, ExpertDescriptor) else None


def _describe(span: Span, pending: PendingFrame, result: Result) -> None:
    span.set(
        queue_s=result.queue_s,
        compute_s=result.compute_s,
        tokens=pending.num_rows,
        segments=len(pending.frame.segments),
        merged_requests=len(pending.frame.traceparents),
        bytes_received=len(pending.body),
        bytes_sent=result.body_bytes,
    )
