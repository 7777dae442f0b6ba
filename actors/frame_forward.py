"""Computes a planned frame: one grouped forward for each group, and what to do when one raises.

A group that runs out of memory is cut in half once. A group that faults is computed segment by segment, so that the segment that raises fails alone.
A device that is broken ends the process: nothing it says can be trusted any more.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from actors.core.frames import FramePlan, Group, Outcome, merge_outcomes
from actors.core.magnitude import ENORMOUS, beyond_reach
from actors.device import STICKY_EXIT_CODE, ErrorKind
from actors.expert_layouts import ExpertWeights, grouped_forward
from actors.frame_audit import Audit, FrameSampler
from actors.product_watch import watching
from actors.staging import Staging, judged
from cluster.core.link_frames import SegmentStatus

GroupedForward = Callable[[torch.Tensor, Sequence[ExpertWeights], Sequence[int]], torch.Tensor]
Outcomes = dict[int, Outcome]


class FrameRunner(Protocol):
    """What computes planned frames; `FrameForward` is one."""

    def run(self, plan: FramePlan, body: memoryview, weights: Mapping[int, ExpertWeights]) -> Outcomes:
        """The outcome of every planned segment, by position; `weights` by position."""
        ...


def leave_process(error: BaseException) -> None:
    """End this process at once and abnormally, so that it is never taken for healthy: a broken device context stays broken until the process ends."""
    sys.stderr.write(f"moelastic: nothing can be computed here any more ({type(error).__name__}); this process ends with code {STICKY_EXIT_CODE}\n")
    sys.stderr.flush()
    os._exit(STICKY_EXIT_CODE)


class FrameForward:
    """The forward of one compute thread, which is inside `Staging.scope` and inference mode all the time."""

    def __init__(
        self,
        staging: Staging,
        forward: GroupedForward = grouped_forward,
        on_sticky: Callable[[BaseException], None] = leave_process,
        *,
        sampler: FrameSampler | None = None,
        on_wrong: Callable[[ExpertWeights], None] = lambda _weights: None,
    ) -> None:
        """Frames that `sampler` picks are audited; `on_wrong` is told whose matrix products failed, or who gave numbers that are too large for its weights."""
        self._staging = staging
        self._forward = forward
        self._on_sticky = on_sticky
        self._sampler = sampler
        self._on_wrong = on_wrong

    def run(self, plan: FramePlan, body: memoryview, weights: Mapping[int, ExpertWeights]) -> Outcomes:
        """The outcome of every planned segment, by position; `weights` by position. Raises nothing that a segment did."""
        audit = self._sampler.audit(weights.values()) if self._sampler is not None else None
        if audit is None:
            return self._run_all(plan, body, weights)
        with watching(audit):
            outcomes = self._run_all(plan, body, weights)
        return self._judged(outcomes, weights, audit) if audit.faults else outcomes

    def _run_all(self, plan: FramePlan, body: memoryview, weights: Mapping[int, ExpertWeights]) -> Outcomes:
        return merge_outcomes([self._run(group, body, weights, may_split=True) for group in plan.groups])

    def _judged(self, outcomes: Outcomes, weights: Mapping[int, ExpertWeights], audit: Audit) -> Outcomes:
        """Rows whose checksums failed are not sent."""
        for expert in audit.faults:
            self._on_wrong(expert)
        faults = {position: audit.faults.get(weights[position]) for position in outcomes}
        return {
            position: outcome if (fault := faults[position]) is None else Outcome(SegmentStatus.WRONG_NUMBERS, message=fault)
            for position, outcome in outcomes.items()
        }

    def _run(self, group: Group, body: memoryview, weights: Mapping[int, ExpertWeights], *, may_split: bool) -> Outcomes:
        try:
            return self._compute(group, body, weights)
        except Exception as error:  # noqa: BLE001  (whatever a forward raises becomes the outcome of its segments)
            kind, name = self._judge(error)
        # The error is gone from here on, and with it the tensors that its traceback held.
        if kind is ErrorKind.OUT_OF_MEMORY:
            self._staging.free()
            parts = group.halves() if may_split else ()
            if not parts:
                return _all(group, SegmentStatus.OUT_OF_MEMORY, "out of device memory; lower actors.max_tokens_per_frame or actors.memory_bytes")
            return merge_outcomes(self._run(part, body, weights, may_split=False) for part in parts)
        if len(group.pieces) == 1:
            return _all(group, SegmentStatus.FAULTED, name)
        return merge_outcomes(self._run(single, body, weights, may_split=may_split) for single in group.singles())

    def _compute(self, group: Group, body: memoryview, weights: Mapping[int, ExpertWeights]) -> Outcomes:
        x_ND = self._staging.load(group, body)
        used = [weights[piece.position] for piece in group.pieces]
        y_ND = self._forward(x_ND, used, [piece.num_rows for piece in group.pieces])
        if y_ND.shape != x_ND.shape or y_ND.dtype != x_ND.dtype:
            message = "a forward must return rows alike to those it got"
            raise ValueError(message)
        beyond = beyond_reach(x_ND, y_ND, [expert.reach[0] if expert.reach else None for expert in used], [piece.num_rows for piece in group.pieces])
        rows = self._staging.unload(y_ND)
        outcomes: Outcomes = {}
        offset = 0
        for piece in group.pieces:
            stop = offset + piece.num_rows * group.row_bytes
            outcomes[piece.position] = Outcome(SegmentStatus.OK, (rows[offset:stop],))
            offset = stop
        for number in beyond:
            self._on_wrong(used[number])
            outcomes[group.pieces[number].position] = Outcome(SegmentStatus.WRONG_NUMBERS, message=ENORMOUS)
        return outcomes

    def _judge(self, error: Exception) -> tuple[ErrorKind, str]:
        kind, error = judged(error, self._staging)
        if kind is ErrorKind.STICKY:
            self._on_sticky(error)
        return kind, type(error).__name__


def _all(group: Group, status: SegmentStatus, message: str) -> Outcomes:
    return {piece.position: Outcome(status, message=message) for piece in group.pieces}
