"""Checks the matrix products of a sampled share of frames as they are made. What it sees it does not touch: output bits are the same with and without."""

from __future__ import annotations

import random
from collections.abc import Iterable

from torch import Tensor

from actors.core.abft import BlockSums, fault_of
from actors.expert_layouts import ExpertWeights


class Audit:
    """The check of one frame. Watches products; `faults` says in words what is wrong with an expert's."""

    def __init__(self, weights: Iterable[ExpertWeights]) -> None:
        self.faults: dict[ExpertWeights, str] = {}
        self._known: dict[int, tuple[ExpertWeights, BlockSums]] = {
            # A copy of the items, made in one step: those of a shadow come a little after its first frame, from another thread.
            expert.tensors[name].data_ptr(): (expert, sums)
            for expert in weights
            for name, sums in tuple(expert.checksums.items())
        }

    def __call__(self, x_TI: Tensor, weight_OI: Tensor, y_TO: Tensor) -> None:
        """One product. A matrix without checksums, and a check that could not be made, accuse nobody."""
        known = self._known.get(weight_OI.data_ptr())
        if known is None or known[0] in self.faults:
            return
        expert, sums = known
        try:
            fault = fault_of(x_TI, weight_OI, y_TO, sums)
        except Exception:  # noqa: BLE001  (most likely no memory for the check itself; a broken device shows in the forward)
            return
        if fault is not None:
            self.faults[expert] = fault


class FrameSampler:
    """Which frames are audited: a share of them, drawn by a seeded generator, so that no rhythm of layers in the traffic escapes it."""

    def __init__(self, fraction: float, seed: int = 0) -> None:
        self._fraction = fraction
        self._draw = random.Random(seed).random  # noqa: S311  (a sample, not a secret)

    def audit(self, weights: Iterable[ExpertWeights]) -> Audit | None:
        """The audit of the next frame, or None when it is not among them."""
        return Audit(weights) if self._draw() < self._fraction else None
