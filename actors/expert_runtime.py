"""Everything of an expert actor that is not its front: slots with their bytes, and threads that load, compute, expand shadows, read weights again.

Callable from any thread. The runtime's lock is never taken while the workspace's is held.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch

from actors.blob_files import StoredBlob
from actors.compute_thread import ComputeThread, PendingFrame, Reply
from actors.copy_loader import BlobSource, CopyLoader, Loaded
from actors.core.abft import WRONG_WEIGHTS, block_sums
from actors.core.frames import copy_of, refuse_frame, refuse_segments
from actors.core.magnitude import reach_of
from actors.core.memory import capacity_bytes, expansions_reserved
from actors.core.slots import (
    AssumeReceived,
    CancelLoad,
    CopyCorrupted,
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
from actors.expert_layouts import ExpertWeights, load_weights, with_packed
from actors.frame_audit import FrameSampler
from actors.frame_forward import FrameForward, FrameRunner, GroupedForward, leave_process
from actors.packed_forward import PackedForward
from actors.progress import Progress
from actors.redigest import Redigester, Resident, digests_of, resident_of
from actors.shadow_workspace import Expanded, ShadowWorkspace
from actors.staging import forwarding, open_staging
from actors.widened_forward import forward_of
from cluster.core.actor_config import ExpertActorConfig
from cluster.core.ids import CopyId, Role
from cluster.core.link_frames import Forward, SegmentStatus
from cluster.core.status import SlotReport
from cluster.scheduling import give_way
from cluster.telemetry.tracing import Tracing

logger = logging.getLogger(__name__)


class ExpertRuntime:
    """Holds copies and computes frames. `start` it, command it, `submit` frames to it, `stop` it."""

    def __init__(
        self,
        config: ExpertActorConfig,
        source: BlobSource,
        device: torch.device,
        *,
        forward: GroupedForward | None = None,
        load: Callable[[StoredBlob, torch.device], ExpertWeights] = load_weights,
        max_links: int = 64,
        tracing: Tracing | None = None,
        node_id: str = "",
        clock: Callable[[], float] = time.monotonic,
        on_sticky: Callable[[BaseException], None] = leave_process,
        hinder: Callable[[FrameRunner], FrameRunner] | None = None,
    ) -> None:
        """`hinder` may put something between the compute thread and its forward: the fault port does, where chaos is allowed."""
        self._config = config
        self._incarnation = config.incarnation
        self._staging = open_staging(device)
        forward = forward or forward_of(config.layout, device, deterministic=config.deterministic)
        self._clock = clock
        self._load = load
        self._lock = threading.Lock()
        self._weights: dict[CopyId, ExpertWeights] = {}
        self._loaded: dict[int, Resident] = {}
        self._expanding: list[PendingFrame] = []
        max_queued_frames = config.frames_in_flight * max_links
        self._table = _slot_table(config, device)
        labels: dict[str, str | int] = {"actor_id": config.actor_id, "generation": config.generation, "device": self.device_label, "node_id": node_id}
        sampler = FrameSampler(config.abft_fraction, config.generation) if config.abft_fraction > 0 else None
        runner = FrameForward(self._staging, forward, on_sticky, sampler=sampler, on_wrong=self._on_wrong)
        self._compute = ComputeThread(
            PackedForward(runner if hinder is None else hinder(runner), self._staging, load, on_sticky),
            incarnation=self._incarnation,
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
            load=self._load_checked,
            on_loaded=self._on_loaded,
            on_failed=self._on_failed,
            on_sticky=on_sticky,
        )
        self._workspace = ShadowWorkspace(
            max_experts=config.expanded_max,
            max_waiting=max_queued_frames,
            idle_s=config.expanded_idle_s,
            clock=clock,
            staging=lambda: open_staging(device),
            expand=self._load,
            complete=self._add_checksums,
            on_sticky=on_sticky,
        )
        self._redigester = Redigester(config.redigest_s, staging=lambda: open_staging(device), on_changed=self._on_changed, on_sticky=on_sticky)

    @property
    def device_label(self) -> str:
        """How reports name the device."""
        return device_label(self._staging.device)

    def start(self, timeout_s: float) -> None:
        """Test the device and start the threads. A device that fails its test ends the process; TimeoutError when it says nothing in time."""
        self._compute.start(timeout_s)
        self._loader.start()
        self._workspace.start()
        self._redigester.start()

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
        incarnation = self._incarnation
        if frame.generation != incarnation.generation:
            reply(refuse_frame(frame, incarnation), ())
            return
        num_rows = sum([segment.num_rows for segment in frame.segments])
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

    def warm(self, copy: CopyId) -> None:
        """Expand a shadow that rows are likely for, off the compute thread; nothing for a copy that is not held or needs no expansion."""
        self._workspace.warm(copy)

    def cool(self, copy: CopyId) -> None:
        """The replica of a shadow is back: what the expanded shadow takes is free for others."""
        self._workspace.cool(copy)

    def replicas(self) -> list[CopyId]:
        """Every replica that is held, in order."""
        with self._lock:
            return sorted(self._weights)

    def exchange(self, copy: CopyId, change: Callable[[ExpertWeights], ExpertWeights]) -> bool:
        """Answer with other weights for a held replica from now on; frames under way keep theirs. For faults. False when it is not held."""
        with self._lock:
            if copy not in self._weights:
                return False
            self._weights[copy] = changed = change(self._weights[copy])
            self._redigester.keep(resident_of(copy, changed))
            return True

    def _admit(self, frame: Forward, body: memoryview, reply: Reply, num_rows: int) -> PendingFrame:
        copies = [copy_of(segment) for segment in frame.segments]
        with self._lock:
            holdings = self._table.lease(copies)
            weights = [self._weights.get(copy) if holding is Holding.HELD else None for copy, holding in zip(copies, holdings, strict=True)]
        leases = tuple([copy for copy, holding in zip(copies, holdings, strict=True) if holding is Holding.HELD])
        return PendingFrame(frame, body, reply, holdings, weights, leases, self._clock(), num_rows)

    def _on_expanded(self, pending: PendingFrame, expanded: Expanded) -> None:
        """Compute a frame whose shadows are there; one that could not be expanded is not held, so that other copies are asked."""
        copies = [copy_of(segment) for segment in pending.frame.segments]
        with self._lock:
            self._expanding.remove(pending)
            found = [expanded.get(copy) if weights is None else weights for copy, weights in zip(copies, pending.weights, strict=True)]
            pending.weights = [weights if isinstance(weights, ExpertWeights) else None for weights in found]
            pending.packed = {position: packed for position, packed in enumerate(found) if isinstance(packed, StoredBlob)}
            held = zip(pending.holdings, found, strict=True)
            pending.holdings = [Holding.NOT_HELD if weights is None and holding is Holding.HELD else holding for holding, weights in held]
        self._offer(pending)

    def _offer(self, pending: PendingFrame) -> None:
        if not self._compute.offer(pending):
            self._refuse_full(pending, _shadows(pending))

    def _refuse_full(self, pending: PendingFrame, taken: Sequence[CopyId]) -> None:
        self._workspace.give_back(taken)
        self._handle(SegmentsEnded(pending.leases))
        message = "the actor's frame queue is full; lower actors.frames_in_flight or add copies"
        pending.reply(refuse_segments(pending.frame, self._incarnation, SegmentStatus.OVERLOADED, message), ())

    def _end_leases(self, pending: PendingFrame) -> None:
        pending.weights = ()
        self._workspace.give_back(_shadows(pending))
        self._handle(SegmentsEnded(pending.leases))

    def progress(self) -> Progress:
        """How far the compute thread is, with frames that wait for an expansion, and whether a copy is on its way or being expanded."""
        frames_done, oldest_age_s, queued_rows = self._compute.progress()
        with self._lock:
            for pending in self._expanding:
                oldest_age_s = max(oldest_age_s, self._clock() - pending.arrived_s)
                queued_rows += pending.num_rows
        return Progress(frames_done, oldest_age_s, queued_rows, self._loader.is_busy or self._workspace.is_busy)

    def slots(self) -> tuple[SlotReport, ...]:
        """Every slot in use."""
        with self._lock:
            return self._table.reports()

    @property
    def capacity_bytes(self) -> int:
        """Bytes that all slots together may take; on a device, without those that are set aside for shadows in slots to be expanded."""
        with self._lock:
            return self._table.capacity_bytes - self._table.reserved_bytes

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
    def expanded_max_bytes(self) -> int:
        """Bytes that the shadows in slots take at most when they are expanded, `expanded_max` of them at once."""
        with self._lock:
            return self._table.largest_expanded_bytes(self._config.expanded_max)

    @property
    def num_unexpanded(self) -> int:
        """How many times rows were answered by a shadow for which there was no room."""
        return self._workspace.num_unexpanded

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
        is_redigester_done = self._redigester.stop(max(0.0, deadline_s - self._clock()))
        return self._compute.stop(max(0.0, deadline_s - self._clock())) and is_loader_done and is_workspace_done and is_redigester_done

    def _prepare(self) -> AbstractContextManager[object]:
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")  # images for GPUs may ask for TF32 by an environment variable; checksums would call it wrong
        if self._staging.device.type == "cpu":
            give_way(self._config.compute_niceness)
        with self._staging.scope():
            self_test(self._staging.device)
        return forwarding(self._staging)

    def _load_checked(self, blob: StoredBlob, device: torch.device) -> ExpertWeights:
        """Weights with what is needed to check them later, taken while they are known to be right."""
        weights = self._load(blob, device)
        if self._config.layout == "packed" and blob.kind == "expert":
            weights = with_packed(weights)
        weights.digests.update(digests_of(weights.tensors))
        self._add_checksums(weights)
        return weights

    def _add_checksums(self, weights: ExpertWeights) -> None:
        if self._config.abft_fraction > 0:
            weights.checksums.update({name: block_sums(tensor) for name, tensor in weights.tensors.items() if tensor.dim() > 1})
            reach = reach_of(weights.descriptor, weights.tensors)
            weights.reach.extend([] if reach is None else [reach])

    def _on_wrong(self, weights: ExpertWeights) -> None:
        """Checksums failed, or an output is beyond reach: see whether the weights are to blame, and if they are a shadow's, expand it again.

        Packed matrices are not used any more.
        """
        if weights.packed:
            logger.warning("an expert's checksums failed: its packed matrices are not used any more, it answers as with actors.layout mapped")
            weights.packed.clear()
        self._redigester.suspect(weights)
        self._workspace.discard(weights)

    def _on_changed(self, resident: Resident) -> None:
        """Resident weights are corrupt: nothing of this copy is answered any more, and the slot says why."""
        with self._lock:
            if not self._redigester.is_kept(resident):
                return
            for pending in self._expanding:
                pending.condemned.add(resident.copy)
            self._compute.condemn(resident.copy)
            self._apply(self._table.handle(CopyCorrupted(resident.copy, f"REPLICA_CORRUPT: {WRONG_WEIGHTS}")))

    def _on_loaded(self, ticket: int, copy: CopyId, loaded: Loaded) -> None:
        resident = resident_of(copy, loaded)
        with self._lock:
            self._loaded[ticket] = resident
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
                    self._redigester.drop(copy)
                    if self._weights.pop(copy, None) is None:
                        self._workspace.drop(copy)

    def _keep(self, copy: CopyId, resident: Resident) -> None:
        self._redigester.keep(resident)
        if isinstance(resident.loaded, ExpertWeights):
            self._weights[copy] = resident.loaded
        else:
            self._workspace.hold(copy, resident.loaded)


def _slot_table(config: ExpertActorConfig, device: torch.device) -> SlotTable:
    memory = measure_memory(device)
    capacity = capacity_bytes(
        memory,
        limit_bytes=config.memory_bytes,
        num_gpus=config.num_gpus,
        max_tokens_per_frame=config.max_tokens_per_frame,
        has_checksums=config.abft_fraction > 0,
    )
    return SlotTable(num_slots=config.num_slots, capacity_bytes=capacity, num_reserved=expansions_reserved(memory, config.expanded_max))


def _shadows(pending: PendingFrame) -> list[CopyId]:
    return [copy for copy in pending.leases if copy.role is Role.SHADOW]


def _held_bytes(loaded: Loaded) -> int:
    """What a slot is charged: a shadow counts as packed."""
    return loaded.num_bytes if isinstance(loaded, ExpertWeights) else sum(array.nbytes for array in loaded.tensors.values())
