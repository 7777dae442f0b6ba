"""A bound on what an expert can answer, from the norms of its weights: beyond it a number is wrong, whatever the rows were like.

A flipped exponent makes numbers finite and enormous: 2^128 times what they were, where a weight below 2 loses its highest exponent bit to a flip. The
bound is loose, by some powers of ten, and that is enough for those. No rounding of healthy weights breaks it, so there are no false alarms.

Shape legend: T rows of one expert, N rows of a frame, D model width, F inner width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.core.descriptors import ExpertDescriptor

ENORMOUS = "an output is larger than these weights can make it; a bit of them or of a product may have flipped"

# Three products, each rounded and summed in whatever order and type a device likes, and two steps between: each far below twice the sum of magnitudes.
_SLACK = 8.0
# Nothing below is enormous; numbers near the smallest that a type holds are rounded by more than their share of themselves.
_FLOOR = 1.0
_TILE_ROWS = 256


@dataclass(frozen=True, slots=True)
class Reach:
    """No healthy output is larger than `constant` + `linear` r + `square` r^2, r the norm of the row; `width` is D."""

    width: int
    constant: float
    linear: float
    square: float

    def limit(self, x_peak: float) -> float:
        """What no output exceeds for rows whose numbers do not exceed `x_peak`; infinite for rows or weights that are not finite."""
        norm = math.sqrt(self.width) * x_peak
        limit = _SLACK * (self.constant + norm * (self.linear + norm * self.square))
        return max(_FLOOR, limit) if math.isfinite(limit) else math.inf


def reach_of(descriptor: ExpertDescriptor, tensors: Mapping[str, Tensor]) -> Reach | None:
    """The bound of an expert whose weights are known to be right; None for an activation that there is no such bound for.

    |x w| <= |x| |w| for each row w of a matrix, and no activation makes a number larger, but for the square of relu2.
    """
    is_square = descriptor.activation == "relu2" and descriptor.swiglu_limit is None
    if descriptor.gated:
        if is_square:
            return None
        norms, biases = _rows(tensors, "gate_up")
        (gate_F, up_F), (gate_bias_F, up_bias_F) = norms.chunk(2), biases.chunk(2)
        up_bias_F = up_bias_F + (0.0 if descriptor.swiglu_limit is None else abs(descriptor.swiglu_up_offset))
    else:
        up_F, up_bias_F = _rows(tensors, "up")
        gate_F, gate_bias_F = (up_F, up_bias_F) if is_square else (torch.zeros_like(up_F), torch.ones_like(up_F))
    down_DF = tensors["down"]
    hidden_F3 = torch.stack([gate_bias_F * up_bias_F, gate_F * up_bias_F + up_F * gate_bias_F, gate_F * up_F], dim=1)
    largest_3 = torch.stack([(tile.abs().float() @ hidden_F3).amax(0) for tile in torch.split_with_sizes(down_DF, _tiles(len(down_DF)))]).amax(0)
    constant, linear, square = largest_3.tolist()
    bias = tensors.get("down_bias")
    return Reach(descriptor.hidden_size, constant + (0.0 if bias is None else float(bias.abs().max())), linear, square)


def _tiles(num_rows: int) -> list[int]:
    return [min(_TILE_ROWS, num_rows - first) for first in range(0, num_rows, _TILE_ROWS)]


def _rows(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """The norm of each row of a matrix, and the magnitude of its bias."""
    norms = torch.linalg.vector_norm(tensors[name], dim=1, dtype=torch.float32)
    bias = tensors.get(f"{name}_bias")
    return norms, torch.zeros_like(norms) if bias is None else bias.float().abs()


def beyond_reach(x_ND: Tensor, y_ND: Tensor, reaches: Sequence[Reach | None], rows: Sequence[int]) -> list[int]:
    """Segments with a finite number that is beyond their expert's reach; segment g has `rows[g]` rows. Numbers that are not finite are the router's to judge.

    One look at all outputs acquits nearly every frame: no limit is below the floor. If it does not, one look at all rows and the strictest limit, and only
    if that does not either, each segment is looked at by itself.
    """
    known = [reach for reach in reaches if reach is not None]
    if not known:
        return []
    y_peak = _peak(y_ND)
    if y_peak <= _FLOOR:  # NaN fails this comparison and the next one
        return []
    x_peak = _peak(x_ND)
    if y_peak <= min([reach.limit(x_peak) for reach in known]):
        return []
    parts = zip(reaches, torch.split_with_sizes(x_ND, list(rows)), torch.split_with_sizes(y_ND, list(rows)), strict=True)
    return [number for number, (reach, x_TD, y_TD) in enumerate(parts) if reach is not None and _is_beyond(reach, x_TD, y_TD)]


def _peak(rows_ND: Tensor) -> float:
    """The largest magnitude, in one read from the device."""
    least, most = torch.stack(torch.aminmax(rows_ND)).tolist()
    return float(max(-least, most))


def _is_beyond(reach: Reach, x_TD: Tensor, y_TD: Tensor) -> bool:
    return _peak(y_TD.masked_fill(~y_TD.isfinite(), 0.0)) > reach.limit(_peak(x_TD))
