"""The scale of each group of weights: chosen to lose least, among those that can be stored.

Shape legend: N groups, S weights of a group, L levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from actors.core.packing import LEVELS
from cluster.core.descriptors import CodecRecord

Array = NDArray[Any]
Floats = NDArray[np.floating[Any]]

_E4M3: np.dtype[Any] = np.dtype(ml_dtypes.float8_e4m3fn)
_BF16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
_E4M3_MAX = 448.0
_FP32_MAX = float(np.finfo(np.float32).max)
# Share of a group's largest magnitude that its top level stands for: with fewer levels, cutting the tails pays more.
_CLIPS: Mapping[int, tuple[float, ...]] = {
    8: (1.0,),
    4: tuple(1.0 - 0.04 * step for step in range(11)),
    3: tuple(1.0 - 0.05 * step for step in range(12)),
    2: tuple(1.0 - 0.05 * step for step in range(14)),
}
# Groups searched at a time: their copies stay in the second cache.
_GROUPS_AT_ONCE = 512


@dataclass(frozen=True)
class Grid:
    """The values that one codec can express, and the rounding of scales. `limit` bounds what the top level may stand for."""

    codec: CodecRecord
    limit: float = np.inf

    @cached_property
    def levels(self) -> NDArray[np.float32]:
        """Levels [L], ascending."""
        return np.array(LEVELS[self.codec.levels, self.codec.bits], np.float32)

    @cached_property
    def _bounds(self) -> NDArray[np.float32]:
        return np.array([(lower + upper) / 2 for lower, upper in pairwise(self.levels)], np.float32)

    @cached_property
    def _magnitudes(self) -> NDArray[np.float32]:
        """The levels that are not negative: every grid is its own mirror image."""
        return self.levels[len(self.levels) // 2 :]

    @property
    def top(self) -> float:
        """The largest level."""
        return float(self.levels[-1])

    @property
    def headroom_bits(self) -> int:
        """How many doublings a matrix of magnitudes below 2 can take before its largest scale leaves the range of stored scales."""
        return int(_E4M3_MAX * self.top).bit_length() - 2 if self.codec.scales == "e4m3" else 0

    @property
    def scale_dtype(self) -> np.dtype[Any]:
        """Type of a stored scale."""
        return _E4M3 if self.codec.scales == "e4m3" else _BF16

    def round_scales(self, scales: Floats) -> NDArray[np.float32]:
        """The nearest scales that can be stored, never above what keeps the top level finite; zero where a scale is too small."""
        most = min(self.limit / self.top, _E4M3_MAX if self.codec.scales == "e4m3" else np.inf)
        stored = np.minimum(scales, min(most, _FP32_MAX)).astype(np.float32).astype(self.scale_dtype)
        beyond = stored.astype(np.float64) * self.top > self.limit
        # Positive floats are ordered like their bits.
        bits = stored.view(f"u{self.scale_dtype.itemsize}")
        lowered: NDArray[np.float32] = (bits - beyond.astype(bits.dtype)).view(self.scale_dtype).astype(np.float32)
        return lowered

    def codes(self, weights: Floats, scales: Floats) -> NDArray[np.intp]:
        """The nearest level's code for each weight; `scales` broadcast. Where a scale is 0 any code is as good, so it is a middle one."""
        steps = np.divide(weights, scales, out=np.zeros(np.broadcast_shapes(weights.shape, scales.shape), np.float32), where=scales > 0, casting="same_kind")
        codes: NDArray[np.intp] = np.searchsorted(self._bounds, steps)
        return codes

    def errors(self, magnitudes_NS: NDArray[np.float32], scales_N1: NDArray[np.float32]) -> NDArray[np.float32]:
        """How far each magnitude [N, S] lies above the level that it is rounded to."""
        errors_NS: NDArray[np.float32] = magnitudes_NS - self._magnitudes[0] * scales_N1
        # A step up for each bound passed: with at most eight magnitudes this is many times faster than looking for the place of each weight.
        for lower, upper in pairwise(self._magnitudes):
            errors_NS -= (magnitudes_NS > (lower + upper) / 2 * scales_N1) * ((upper - lower) * scales_N1)
        return errors_NS


def fit_scales(weights_NS: NDArray[np.float32], grid: Grid, importance_S: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """The scale [N] of each group that loses least squared error, weighted by `importance_S`, over a small grid of clips."""
    scales_N = np.empty(len(weights_NS), np.float32)
    for begin in range(0, len(weights_NS), _GROUPS_AT_ONCE):
        part = slice(begin, begin + _GROUPS_AT_ONCE)
        scales_N[part] = _fit(weights_NS[part], grid, importance_S)
    return scales_N


def _fit(weights_NS: NDArray[np.float32], grid: Grid, importance_S: NDArray[np.float32] | None) -> NDArray[np.float32]:
    magnitudes_NS = np.abs(weights_NS)
    widest_N = magnitudes_NS.max(axis=1) / np.float32(grid.top)
    best_N = grid.round_scales(widest_N)
    loss_N = np.full(len(weights_NS), np.inf, np.float32)
    clips = _CLIPS[grid.codec.bits]
    for clip in clips if len(clips) > 1 else ():
        scales_N = grid.round_scales(widest_N * np.float32(clip))
        errors_NS = grid.errors(magnitudes_NS, scales_N[:, None])
        if importance_S is not None:
            errors_NS *= np.sqrt(importance_S)
        found_N = np.einsum("ns,ns->n", errors_NS, errors_NS)
        best_N = np.where(found_N < loss_N, scales_N, best_N)
        loss_N = np.minimum(found_N, loss_N)
    return best_N
