"""Everything of an expert actor that is not its front: slots with their bytes, one loader thread, one compute thread, one that expands shadows.

Callable from any thread. The runtime's lock is never taken while the workspace's is held.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from actors.blob_files import StoredBlob
from actors.compute_thread import ComputeThread, PendingFrame, Reply
from actors.copy_loader import BlobSource, CopyLoader, Loaded
from actors.core.frames import copy_of, refuse_frame, refuse_segments
from actors.core.memory import capacity_bytes
from actors.core.slots import (
    AssumeReceived,
    CancelLoad,
    CopyFailed,
    CopyLoaded,
    DrainReceived,
    DropWeights,
    Event,
    Holding,
    Instruction,
    KeepWeights,
    LoadCopy,
    ReleaseReceived,
    SegmentsEnded,
    SizedCopy,
    SlotTable,
)
from actors.device import device_label, measure_memory, self_test
from actors.expert_layouts import ExpertWeights, grouped_forward, load_weights
from actors.frame_forward import FrameForward, GroupedForward, leave_process
from actors.link_server import Progress
from actors.shadow_workspace import Expanded, ShadowWorkspace
from actors.staging import open_staging
from cluster.core.actor_config import ExpertActorConfig
from cluster.core.ids import CopyId, Role
from cluster.core.link_frames import Forward, SegmentStatus
from cluster.core.status import SlotReport
from cluster.telemetry.tracing import Tracing


class ExpertRuntime:
    """Holds copies and computes frames. `start` it, command it, `submit` frames to it, `stop` it."""

    def __init__(
        self,
        config: ExpertActorConfig,
        source: BlobSource,
        device: torch.device,
        *,
        forward: GroupedForward = grouped_forward,
        load: Callable[[StoredBlob, torch.device], ExpertWeights] = load_weights,
        max_links: int = 64,
        tracing: Tracing | None = None,
        node_id: str = "",
        clock: Callable[[], float] = time.monotonic,
        on_sticky: Callable[[BaseException], None] = leave_process,
    ) -> None:
        self._config = config
        self._staging = open_staging(device)
        self._clock = clock
        self._lock = threading.Lock()
        self._weights: dict[CopyId, ExpertWeights] = {}
        self._loaded: dict[int, Loaded] = {}
        self._expanding: list[PendingFrame] = []
        max_queued_frames = config.frames_in_flight * max_links
        capacity = capacity_bytes(
            measure_memory(device), limit_bytes=config.memory_bytes, num_gpus=config.num_gpus, max_tokens_per_frame=config.max_tokens_per_frame
        )
        self._table = SlotTable(num_slots=config.num_slots, capacity_bytes=capacity)
        labels: dict[str, str | int] = {"actor_id": config.actor_id, "generation": config.generation, "device": self.device_label, "node_id": node_id}
        self._compute = ComputeThread(
            FrameForward(self._staging, forward, on_sticky),
            incarnation=config.incarnation,
            max_queued_frames=max_queued_frames,
            clock=clock,
            prepare=self._prepare,
            on_computed=self._end_leases,
            on_death=on_sticky,
            tracing=tracing or Tracing.disabled(),
            labels=labels,
        )
        self._loader = CopyLoader(
            source,
            staging=lambda: open_staging(device),
            forward=forward,
            load=load,
            on_loaded=self._on_loaded,
            on_failed=self._on_failed,
            on_sticky=on_sticky,
        )
        self._workspace = ShadowWorkspace(
            max_experts=config.expanded_max, max_waiting=max_queued_frames, staging=lambda: open_staging(device), expand=load, on_sticky=on_sticky
        )

    @property
    def device_label(self) -> str:
        """How reports name the device."""
        return device_label(self._staging.device)

    def start(self, timeout_s: float) -> None:
        """Test the device and start the threads. A device that fails its test ends the process; TimeoutError when it says nothing in time."""
        self._compute.start(timeout_s)
        self._loader.start()
        self._workspace.start()

    def assume(self, copies: Iterable[SizedCopy], epoch: int) -> None:
        """Begin to hold copies. Raises StaleTable, or SlotsExhausted with both numbers; then nothing has changed."""
        self._handle(AssumeReceived(epoch, tuple(copies)))

    def drain(self, copies: Iterable[CopyId], epoch: int) -> None:
        """Take no new segments for copies; those under way are finished. Raises StaleTable."""
        self._handle(DrainReceived(epoch, tuple(copies)))

    def release(self, copies: Iterable[CopyId], epoch: int) -> None:
        """Free the slots of copies as soon as nothing of theirs is under way. Raises StaleTable."""
        self._handle(ReleaseReceived(epoch, tuple(copies)))

    def submit(self, frame: Forward, body: memoryview, reply: Reply) -> None:
        """Take a frame. `reply` is called exactly once: from the compute thread, or at once when the frame is refused.

        `body` must not change until the reply; nothing keeps it afterwards.
        """
        incarnation = self._config.incarnation
        if frame.generation != incarnation.generation:
            reply(refuse_frame(frame, incarnation), ())
            return
        num_rows = sum(segment.num_rows for segment in frame.segments)
        if num_rows > self._config.max_tokens_per_frame:
            message = f"a frame of {num_rows} rows is over the limit of {self._config.max_tokens_per_frame} (actors.max_tokens_per_frame)"
            reply(refuse_segments(frame, incarnation, SegmentStatus.OVERLOADED, message), ())
            return
        pending = self._admit(frame, body, reply, num_rows)
        shadows = _shadows(pending)
        if not shadows:
            self._offer(pending)
            return
        with self._lock:
            self._expanding.append(pending)
        if not self._workspace.take(shadows, partial(self._on_expanded, pending)):
            with self._lock:
                self._expanding.remove(pending)
            self._refuse_full(pending, ())

    def cancel(self, frame: Forward, segment_ids: Sequence[int]) -> None:
        """Nobody waits for these segments of this very frame any more: they are skipped unless they have begun. The frame is still answered."""
        with self._lock:
            for pending in self._expanding:
                if pending.frame is frame:
                    pending.cancelled.update(segment_ids)
        self._compute.cancel(frame, segment_ids)

    def _admit(self, frame: Forward, body: memoryview, reply: Reply, num_rows: int) -> PendingFrame:
        copies = [copy_of(segment) for segment in frame.segments]
        with self._lock:
            holdings = self._table.lease(copies)
            weights = [self._weights.get(copy) if holding is Holding.HELD else None for copy, holding in zip(copies, holdings, strict=True)]
        leases = tuple(copy for copy, holding in zip(copies, holdings, strict=True) if holding is Holding.HELD)
        return PendingFrame(frame, body, reply, holdings, weights, leases, self._clock(), num_rows)

    def _on_expanded(self, pending: PendingFrame, expanded: Expanded) -> None:
        """Compute a frame whose shadows are there; one that could not be expanded is not held, so that other copies are asked."""
        copies = [copy_of(segment) for segment in pending.frame.segments]
        with self._lock:
            self._expanding.remove(pending)
            pending.weights = [expanded.get(copy) if weights is None else weights for copy, weights in zip(copies, pending.weights, strict=True)]
            held = zip(pending.holdings, pending.weights, strict=True)
            pending.holdings = [Holding.NOT_HELD if weights is None and holding is Holding.HELD else holding for holding, weights in held]
        self._offer(pending)

    def _offer(self, pending: PendingFrame) -> None:
        if not self._compute.offer(pending):
            self._refuse_full(pending, _shadows(pending))

    def _refuse_full(self, pending: PendingFrame, taken: Sequence[CopyId]) -> None:
        self._workspace.give_back(taken)
        self._handle(SegmentsEnded(pending.leases))
        message = "the actor's frame queue is full; lower actors.frames_in_flight or add copies"
        pending.reply(refuse_segments(pending.frame, self._config.incarnation, SegmentStatus.OVERLOADED, message), ())

    def _end_leases(self, pending: PendingFrame) -> None:
        pending.weights = ()
        self._workspace.give_back(_shadows(pending))
        self._handle(SegmentsEnded(pending.leases))

    def progress(self) -> Progress:
        """How far the compute thread is, and whether a copy is on its way or being expanded."""
        return Progress(*self._compute.progress(), self._loader.is_busy or self._workspace.is_busy)

    def slots(self) -> tuple[SlotReport, ...]:
        """Every slot in use."""
        with self._lock:
            return self._table.reports()

    @property
    def capacity_bytes(self) -> int:
        """Bytes that all slots together may take."""
        return self._table.capacity_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes that the slots take."""
        with self._lock:
            return self._table.used_bytes

    @property
    def expanded_bytes(self) -> int:
        """Bytes of shadows that are expanded now, beside what the slots take."""
        return self._workspace.expanded_bytes

    @property
    def max_epoch(self) -> int:
        """The newest epoch of a command."""
        with self._lock:
            return self._table.max_epoch

    def stop(self, timeout_s: float) -> bool:
        """Take no more frames, answer those that wait, end the threads. False when one is still busy at the limit; it ends with the process."""
        deadline_s = self._clock() + timeout_s
        is_loader_done = self._loader.stop(timeout_s)
        is_workspace_done = self._workspace.stop(max(0.0, deadline_s - self._clock()))
        return self._compute.stop(max(0.0, deadline_s - self._clock())) and is_loader_done and is_workspace_done

    def _prepare(self) -> None:
        torch.set_num_threads(1)
        with self._staging.scope():
            self_test(self._staging.device)

    def _on_loaded(self, ticket: int, copy: CopyId, loaded: Loaded) -> None:
        with self._lock:
            self._loaded[ticket] = loaded
            self._apply(self._table.handle(CopyLoaded(ticket, copy, _held_bytes(loaded))))
            self._loaded.pop(ticket, None)

    def _on_failed(self, event: CopyFailed) -> None:
        self._handle(event)

    def _handle(self, event: Event) -> None:
        with self._lock:
            self._apply(self._table.handle(event))

    def _apply(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case LoadCopy():
                    self._loader.put(instruction)
                case CancelLoad(ticket):
                    self._loader.cancel(ticket)
                case KeepWeights(ticket, copy):
                    self._keep(copy, self._loaded.pop(ticket))
                case DropWeights(copy):
                    if self._weights.pop(copy, None) is None:
                        self._workspace.drop(copy)

    def _keep(self, copy: CopyId, loaded: Loaded) -> None:
        if isinstance(loaded, ExpertWeights):
            self._weights[copy] = loaded
        else:
            self._workspace.hold(copy, loaded)


def _shadows(pending: PendingFrame) -> list[CopyId]:
    return [copy for copy in pending.leases if copy.role is Role.SHADOW]


def _held_bytes(loaded: Loaded) -> int:
    """What a slot is charged: a shadow counts as packed."""
    return loaded.num_bytes if isinstance(loaded, ExpertWeights) else sum(array.nbytes for array in loaded.tensors.values())
