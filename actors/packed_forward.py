"""Answers rows for shadows that the workspace has no room for: each is expanded in the compute thread for its rows alone, one after the other.

Slow, some milliseconds for each, but no device memory is needed beyond that of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from actors.blob_files import StoredBlob
from actors.core.frames import FramePlan, Outcome, apart
from actors.device import ErrorKind
from actors.expert_layouts import ExpertWeights
from actors.frame_forward import FrameRunner, Outcomes
from actors.staging import Staging, judged
from cluster.core.link_frames import SegmentStatus


class PackedForward:
    """A frame runner that takes packed shadows beside weights, in the same thread."""

    def __init__(
        self,
        runner: FrameRunner,
        staging: Staging,
        expand: Callable[[StoredBlob, torch.device], ExpertWeights],
        on_sticky: Callable[[BaseException], None],
    ) -> None:
        self._runner = runner
        self._staging = staging
        self._expand = expand
        self._on_sticky = on_sticky

    def run(self, plan: FramePlan, body: memoryview, weights: Mapping[int, ExpertWeights], packed: Mapping[int, StoredBlob]) -> Outcomes:
        """The outcome of every planned segment, by position; `weights` and `packed` by position."""
        if not packed:
            return self._runner.run(plan, body, weights)
        others, alone = apart(plan, packed)
        outcomes = self._runner.run(others, body, weights) if others.groups else {}
        for position, part in alone.items():
            outcomes.update(self._run_alone(part, body, position, packed[position]))
        return outcomes

    def _run_alone(self, part: FramePlan, body: memoryview, position: int, packed: StoredBlob) -> Outcomes:
        try:
            weights = self._expand(packed, self._staging.device)
        except Exception as error:  # noqa: BLE001  (whatever an expansion raises becomes the outcome of its segment)
            kind, cause = judged(error, self._staging)
            if kind is ErrorKind.STICKY:
                self._on_sticky(cause)
            name = type(cause).__name__
            del cause
        else:
            return self._runner.run(part, body, {position: weights})
        # The error is gone from here on, and with it the tensors that its traceback held.
        self._staging.free()
        if kind is ErrorKind.OUT_OF_MEMORY:
            return {position: Outcome(SegmentStatus.OUT_OF_MEMORY, message="out of device memory for a shadow; lower actors.memory_bytes")}
        return {position: Outcome(SegmentStatus.FAULTED, message=name)}
