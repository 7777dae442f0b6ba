"""Checksums of matrix products (algorithm-based fault tolerance): they catch flipped bits in resident weights and in computed rows.

For y = x W^T the sum of a block of outputs must equal x times the sum of the block's rows of W, which is taken once, from verified weights. After
V-ABFT (arXiv 2602.08043) and FT-Transformer (arXiv 2504.02211), with two changes. Outputs are summed in blocks of 64 to 128: the rounding of the others
does not hide a fault. And a sum that is off accuses nobody: it is a suspicion, at a threshold low enough to miss little, and the block is then computed
again in fp64, which acquits rounding and convicts a fault with certainty. So there are no false alarms, whatever the weights and rows are like.

Shape legend: T rows, I inputs of a matrix, O outputs, B blocks of W outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

WRONG_PRODUCT = "a matrix product came out wrong here; the device or its memory may be failing"
WRONG_WEIGHTS = "resident weights are not those that were loaded; load the copy again"

# One rounding to the output's type errs by at most this share of a number, and by 0.42 of it in the mean square where significands are spread evenly. So
# the sum of a block errs by 0.42 x the share x the block's norm: SUSPICION is 4.8 such deviations. A rare needless second look costs a tenth of a millisecond.
ROUNDING: Mapping[torch.dtype, float] = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
SUSPICION = 2.0
# Sums inside a product are taken in fp32: what I terms of norm |x| |w| may lose, per square root of I, with a factor for the order of summation.
_SUMMING = 4 * 2.0**-24
# A second look allows each number this many roundings, since a device may round partial sums, too; and the kept sums the roundings they were taken with.
_SLACK = 4.0
_SUMMED = 8 * 2.0**-24
_NEAR_LARGEST = 0.99
_SMALLEST = torch.finfo(torch.float32).tiny
# What is suspected is a share of a block's norm, what harms a share of the row's: the fewer outputs there are, the fewer a block may have.
_BLOCK_ROWS = 64
_MAX_BLOCK_ROWS = 128
_MIN_BLOCK_ROWS = 16
_ENOUGH_BLOCKS = 8
_MANY_BLOCKS = 16
# Numbers of a side that are widened together. On the CPU few enough that they stay in its caches, and that the allocator keeps their memory: fresh pages
# for each look would cost as much as the look. Elsewhere each look is a wait for the device.
_TILE_ON_CPU = 1 << 19
_TILE = 1 << 22
_MAX_SECOND_LOOKS = 16


@dataclass(frozen=True, slots=True, eq=False)
class BlockSums:
    """What is kept of one matrix [O, I], in fp32 on its device: 1/64 to 1/32 of a bf16 matrix's bytes.

    `largest_row_norm` bounds every healthy output: |y| <= |x| times it.
    """

    sums_BI: Tensor
    norms_B: Tensor
    largest_row_norm: float

    @property
    def num_blocks(self) -> int:
        """B."""
        return self.sums_BI.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes kept."""
        return self.sums_BI.nbytes + self.norms_B.nbytes


def block_sums(weight_OI: Tensor) -> BlockSums:
    """The sums of a matrix that is known to be right; there when this returns, on every stream, for the last of them is read from the device."""
    width = _block_rows(weight_OI.shape[0])
    blocks_BWI = weight_OI.view(-1, width, weight_OI.shape[1])
    row_norms_BW = torch.linalg.vector_norm(blocks_BWI, dim=2, dtype=torch.float32)
    return BlockSums(blocks_BWI.sum(1, dtype=torch.float32), torch.linalg.vector_norm(row_norms_BW, dim=1), float(row_norms_BW.max()))


def fault_of(x_TI: Tensor, weight_OI: Tensor, y_TO: Tensor, sums: BlockSums) -> str | None:
    """What is wrong with the product y = x W^T, before any bias, in words; None when nothing is.

    Rows that are not finite are the router's to judge, with one exception: numbers that no healthy weights could have made so large are a fault here.
    """
    step = max(1, (_TILE_ON_CPU if y_TO.device.type == "cpu" else _TILE) // max(weight_OI.shape))
    for first in range(0, x_TI.shape[0], step):
        stop = first + step
        slack_TB = _slack(x_TI[first:stop], y_TO[first:stop], sums)
        least, most = torch.aminmax(slack_TB)
        # NaN fails both comparisons; an infinite slack is a norm that overflowed.
        if float(least) >= 0.0 and float(most) < math.inf:
            continue
        for row, block in _places(slack_TB):
            fault = _second_look(x_TI[first + row], weight_OI, y_TO[first + row], sums, block)
            if fault is not None:
                return fault
    return None


def _block_rows(num_outputs: int) -> int:
    """The largest divisor of O that makes enough blocks of at most 64, or many of at most 128, or O itself where there is none worth it."""
    most = max(min(_BLOCK_ROWS, num_outputs // _ENOUGH_BLOCKS), min(_MAX_BLOCK_ROWS, num_outputs // _MANY_BLOCKS), _MIN_BLOCK_ROWS)
    for width in range(most, _MIN_BLOCK_ROWS - 1, -1):
        if num_outputs % width == 0:
            return width
    return num_outputs


def _slack(x_TI: Tensor, y_TO: Tensor, sums: BlockSums) -> Tensor:
    """How far each block of each row is from suspicion [T, B]; negative, infinite or NaN is suspicious."""
    wide_TI = x_TI.float()
    y_TBW = y_TO.float().view(y_TO.shape[0], sums.num_blocks, -1)  # widened once: sum and norm would each do so for themselves
    width, num_inputs = y_TBW.shape[2], x_TI.shape[1]
    error_TB = y_TBW.sum(2).sub_((sums.sums_BI @ wide_TI.t()).t()).abs_()  # the few sums first: the other way round takes half as long again
    norms_TB = torch.linalg.vector_norm(y_TBW, dim=2)
    norms_T = torch.linalg.vector_norm(wide_TI, dim=1)
    summing = _SUMMING * math.sqrt(num_inputs * width)
    return torch.addr(norms_TB, norms_T, sums.norms_B, beta=SUSPICION * ROUNDING[y_TO.dtype], alpha=summing).sub_(error_TB)


def _places(slack_TB: Tensor) -> list[tuple[int, int]]:
    """The rows and blocks that are suspected, the worst first, and no more than a few: one fault convicts."""
    slack = slack_TB.masked_fill(~slack_TB.isfinite(), -math.inf).flatten()
    worst = torch.topk(slack, min(_MAX_SECOND_LOOKS, slack.numel()), largest=False)
    return [divmod(int(place), slack_TB.shape[1]) for place, value in zip(worst.indices, worst.values, strict=True) if value < 0.0]


def _second_look(x_I: Tensor, weight_OI: Tensor, y_O: Tensor, sums: BlockSums, block: int) -> str | None:
    """Compute one block of one row again, in fp64, and compare number by number, then with the sum of the weights."""
    width = weight_OI.shape[0] // sums.num_blocks
    places = slice(block * width, (block + 1) * width)
    wide_I, block_WI, found_W = x_I.double(), weight_OI[places].double(), y_O[places].double()
    norm = float(torch.linalg.vector_norm(wide_I))
    if not math.isfinite(norm * sums.largest_row_norm):
        return None
    if norm * sums.largest_row_norm > _NEAR_LARGEST * torch.finfo(y_O.dtype).max:
        # Healthy weights may overflow here: that a number is not finite proves nothing.
        found_W = torch.where(found_W.isfinite(), found_W, block_WI @ wide_I)
    expected_W = block_WI @ wide_I
    # Comparisons with NaN are false, so each asks for what is right.
    sum_error = (expected_W.sum() - sums.sums_BI[block].double() @ wide_I).abs()
    if not bool(sum_error <= norm * (float(sums.norms_B[block]) * math.sqrt(width) * _SUMMED + _SMALLEST * math.sqrt(width * len(x_I)))):
        return WRONG_WEIGHTS
    reach_W = torch.linalg.vector_norm(block_WI, dim=1) * norm
    # Kernels may take numbers below the smallest normal one for zero.
    vanishing = torch.finfo(y_O.dtype).tiny + _SMALLEST * math.sqrt(len(x_I)) * norm
    allowed_W = _SLACK * (expected_W.abs() * ROUNDING[y_O.dtype] + reach_W * (_SUMMING * math.sqrt(len(x_I)))) + vanishing
    return None if bool(((found_W - expected_W).abs() <= allowed_W).all()) else WRONG_PRODUCT
