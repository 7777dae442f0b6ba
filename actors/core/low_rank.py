"""Low-rank parts of packed matrices: two thin factors of 8-bit codes, which stand for a whole matrix or for what rounding left of it.

left [R, K] and right [K, W] hold whole numbers from -127 to 127; a weight comes back as sum(left * right) * left_scale[row] * right_scale[column]. The sum is
of whole numbers below 2**24, exact in fp32 in any order, so that every library's matrix product gives the same bits.
Shape legend: R rows of a matrix, W its columns, K rank, N calibration rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_TOP = 127
# 1040 * 127 * 127 is the last such product below 2**24.
MAX_RANK = 1040
# Share of the mean input power that is added to every input's, as in error compensation.
_DAMPING = 0.01
_BF16 = np.dtype(ml_dtypes.bfloat16)


def rank_of(shape: tuple[int, int], percent: int) -> int:
    """The rank whose factors have `percent` of a matrix's elements; at least 1."""
    rows, width = shape
    return min(max(1, rows * width * percent // (100 * (rows + width))), rows, width, MAX_RANK)


def factor_layout(name: str, shape: tuple[int, int], rank: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Type and shape of a matrix's factors, in storage order."""
    rows, width = shape
    codes = np.dtype(np.uint8)
    return {
        f"{name}.left": (codes, (rows, rank)),
        f"{name}.left_scales": (_BF16, (rows,)),
        f"{name}.right": (codes, (rank, width)),
        f"{name}.right_scales": (_BF16, (width,)),
    }


def fit_factors(name: str, weights_RW: NDArray[np.floating[Any]], rank: int, inputs_NW: NDArray[np.floating[Any]] | None) -> dict[str, Array]:
    """The packed factors that lose least squared error of the weights, or, with calibration rows, of their products with these rows (Eckart-Young)."""
    metric_WW: NDArray[np.float64] = np.eye(weights_RW.shape[1]) if inputs_NW is None else _metric(inputs_NW)
    left_RS, power_S, right_SW = np.linalg.svd(weights_RW.astype(np.float64) @ metric_WW, full_matrices=False)
    half_K = np.sqrt(power_S[:rank])
    right_KW = half_K[:, None] * np.linalg.solve(metric_WW.T, right_SW[:rank].T).T
    left, left_scales = _rounded(left_RS[:, :rank] * half_K)
    right, right_scales = _rounded(right_KW.T)
    packed = (left, left_scales, np.ascontiguousarray(right.T), right_scales)
    return dict(zip(factor_layout(name, (weights_RW.shape[0], weights_RW.shape[1]), rank), packed, strict=True))


def product(name: str, packed: Mapping[str, Array]) -> NDArray[np.float32]:
    """The matrix [R, W] that packed factors stand for."""
    sums_RW: NDArray[np.float32] = _whole(packed[f"{name}.left"]) @ _whole(packed[f"{name}.right"])
    sums_RW *= packed[f"{name}.left_scales"].astype(np.float32)[:, None]
    sums_RW *= packed[f"{name}.right_scales"].astype(np.float32)
    return sums_RW


def _metric(inputs_NW: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """A lower triangular root [W, W] of the inputs' second moment."""
    wide_NW = inputs_NW.astype(np.float64)
    moment_WW: NDArray[np.float64] = wide_NW.T @ wide_NW / max(len(wide_NW), 1)
    power = float(np.trace(moment_WW)) / len(moment_WW)
    moment_WW[np.diag_indices(len(moment_WW))] += _DAMPING * power if power > 0.0 else 1.0
    root: NDArray[np.float64] = np.linalg.cholesky(moment_WW).astype(np.float64)
    return root


def _rounded(rows_RK: NDArray[np.float64]) -> tuple[NDArray[np.uint8], Array]:
    """Codes with a scale for each row."""
    scales = (np.abs(rows_RK).max(axis=1) / _TOP).astype(_BF16)
    steps = scales.astype(np.float64)[:, None]
    whole = np.divide(rows_RK, steps, out=np.zeros_like(rows_RK), where=steps > 0.0)
    return np.clip(np.rint(whole), -_TOP, _TOP).astype(np.int8).view(np.uint8), scales


def _whole(codes: Array) -> NDArray[np.float32]:
    # A byte that no encoder writes, -128, must not leave the range in which sums are exact.
    return np.maximum(codes.view(np.int8), -_TOP).astype(np.float32)
