"""The forward of `actors.deterministic: true`: a row's output bits do not depend on what shares its segment, its frame or its group.

Matrix kernels choose their blocking, and with it the order of their sums, by the number of rows. Here every matmul has the same number: segments are
cut into tiles of TILE_ROWS rows, the last one padded with zeros, and computed one after the other. Shape legend: N rows of a frame, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from actors.expert_layouts import ExpertWeights, check_segments, expert_forward

# A compromise: one row pays for 16, which is less than twice its price, and many rows read the weights once for every 16.
TILE_ROWS = 16


@torch.no_grad()
def steady_forward(x_ND: Tensor, weights: Sequence[ExpertWeights], rows: Sequence[int]) -> Tensor:
    """As `grouped_forward`, in tiles: no grouped matmul on any device. Raises ValueError when the segments are not exactly the rows."""
    check_segments(x_ND, weights, rows)
    y_ND = torch.empty_like(x_ND)
    tile = x_ND.new_zeros((TILE_ROWS, x_ND.shape[1]))
    first = 0
    for expert, num_rows in zip(weights, rows, strict=True):
        stop = first + num_rows
        for begin in range(first, stop, TILE_ROWS):
            count = min(TILE_ROWS, stop - begin)
            # Always the same buffer: how memory is aligned may choose a kernel, too.
            tile[:count] = x_ND[begin : begin + count]
            tile[count:] = 0
            y_ND[begin : begin + count] = expert_forward(tile, expert)[:count]
        first = stop
    return y_ND
