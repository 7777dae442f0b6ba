"""The one thread that computes: a bounded queue of frames in arrival order, each planned when its turn comes, and progress that others may read."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from queue import SimpleQueue

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
        prepare: Callable[[], AbstractContextManager[object]],
        on_computed: Callable[[PendingFrame], None],
        on_death: Callable[[BaseException], None],
        tracing: Tracing,
        labels: dict[str, str | int],
    ) -> None:
        """`prepare` is called in the thread, first; all frames are computed inside of what it gives."""
        self._forward = forward
        self._incarnation = incarnation
        self._max_queued_frames = max_queued_frames
        self._clock = clock
        self._prepare = prepare
        self._on_computed = on_computed
        self._on_death = on_death
        self._tracing = tracing
        self._labels = labels
        self._lock = threading.Lock()
        # Frames that wait; None ends the thread. Both sides of such a queue are C.
        self._waiting: SimpleQueue[PendingFrame | None] = SimpleQueue()
        # Those and the one under way, the oldest first.
        self._unanswered: deque[PendingFrame] = deque()
        self._frames_done = 0
        self._queued_rows = 0
        self._is_ready = threading.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._main, name="compute", daemon=True)

    def start(self, timeout_s: float) -> None:
        """Start the thread and wait until it has prepared. Raises TimeoutError when it has not within the limit."""
        self._thread.start()
        if not self._is_ready.wait(timeout_s):
            message = f"the compute thread was not prepared within {timeout_s} s"
            raise TimeoutError(message)

    def offer(self, pending: PendingFrame) -> bool:
        """Queue a frame; False when the queue is full or the thread is stopping."""
        with self._lock:
            if self._is_stopping or self._waiting.qsize() >= self._max_queued_frames:
                return False
            self._unanswered.append(pending)
            self._queued_rows += pending.num_rows
            self._waiting.put(pending)
            return True

    def cancel(self, frame: Forward, segment_ids: Sequence[int]) -> None:
        """Skip segments of a frame that waits; one that has begun is computed to its end."""
        with self._lock:
            for pending in self._unanswered:
                if pending.frame is frame:
                    pending.cancelled.update(segment_ids)

    def condemn(self, copy: CopyId) -> None:
        """A copy turned out to be corrupt: frames that wait and the one under way send nothing of it."""
        with self._lock:
            for pending in self._unanswered:
                pending.condemned.add(copy)

    def progress(self) -> tuple[int, float, int]:
        """Frames done, age of the oldest unanswered frame in seconds (0 when idle), rows not answered yet."""
        with self._lock:
            age_s = max(0.0, self._clock() - self._unanswered[0].arrived_s) if self._unanswered else 0.0
            return self._frames_done, age_s, self._queued_rows

    def stop(self, timeout_s: float) -> bool:
        """Take no more frames, answer what is queued, end. False when the thread is still busy at the limit."""
        with self._lock:
            if not self._is_stopping:
                self._is_stopping = True
                self._waiting.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            self._serve()
        except Exception as error:  # noqa: BLE001  (a process whose compute thread is gone must not look alive)
            self._on_death(error)

    def _serve(self) -> None:
        with self._prepare():
            self._is_ready.set()
            while (pending := self._waiting.get()) is not None:
                self._answer(pending)
                with self._lock:
                    self._unanswered.popleft()
                    self._frames_done += 1
                    self._queued_rows -= pending.num_rows
                del pending  # its weights may be on their way out

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
        with self._lock:
            cancelled = frozenset(pending.cancelled)
        descriptors = [_descriptor_of(pending, position) for position in range(len(pending.weights))]
        plan = plan_frame(pending.frame, pending.holdings, descriptors, waited_s=queue_s, cancelled=cancelled)
        held = {position: weights for position, weights in enumerate(pending.weights) if weights is not None}
        outcomes = self._forward.run(plan, pending.body, held, pending.packed)
        if pending.condemned:
            outcomes = self._without_condemned(pending, outcomes)
        compute_s = max(0.0, self._clock() - begun_s)
        return answer(plan, outcomes, self._incarnation, queue_s=queue_s, compute_s=compute_s)

    def _without_condemned(self, pending: PendingFrame, outcomes: Outcomes) -> Outcomes:
        with self._lock:
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
