"""Error compensation: each column's rounding error is made up for by the columns that follow it, as the inputs of real rows weigh it.

GPTQ (Frantar et al. 2023, section 3.3: fixed order, blocks of columns, Cholesky form). It changes which codes are chosen, never how they are stored.
Shape legend: R rows of a matrix (outputs), W its columns (inputs), B columns of a block, G groups of a row, S columns of a group, N calibration rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.core.scales import Grid, fit_scales

# Share of the mean input power that is added to every input's, so that inputs never seen do not take all errors. 0.01 to 0.1 measured alike.
_DAMPING = 0.01


def compensated(
    weights_RW: NDArray[np.float32], inputs_NW: NDArray[np.floating[Any]], grid: Grid, group_size: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes [R, W] and scales [R, G] whose matrix product with the input rows is close to the weights'."""
    factor_WW = _error_factor(inputs_NW)
    # Columns lie in memory one after the other: all arithmetic here is by column.
    rest_WR = np.ascontiguousarray(weights_RW.T, np.float64)
    codes_WR = np.empty(rest_WR.shape, np.uint8)
    scales = []
    for begin in range(0, len(rest_WR), group_size):
        group = slice(begin, begin + group_size)
        rest_SR = rest_WR[group]
        importance_S = 1.0 / np.square(np.diag(factor_WW)[group])
        importance_S /= importance_S.max()
        scales_R = fit_scales(np.ascontiguousarray(rest_SR.T, np.float32), grid, importance_S.astype(np.float32))
        errors_SR = _round_group(rest_SR, codes_WR[group], scales_R, grid, factor_WW[group, group])
        rest_WR[group.stop :] -= factor_WW[group, group.stop :].T @ errors_SR
        scales.append(scales_R)
    return codes_WR.T, np.stack(scales, axis=1)


def _round_group(
    rest_SR: NDArray[np.float64], codes_SR: NDArray[np.uint8], scales_R: NDArray[np.float32], grid: Grid, factor_SS: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Write a group's codes, column after column; the errors [S, R] in units of the factor's diagonal."""
    errors_SR = np.empty_like(rest_SR)
    for column, rest_R in enumerate(rest_SR):
        wanted_R = rest_R - factor_SS[:column, column] @ errors_SR[:column]
        codes_R = grid.codes(wanted_R, scales_R)
        codes_SR[column] = codes_R
        errors_SR[column] = (wanted_R - grid.levels[codes_R] * scales_R) / factor_SS[column, column]
    return errors_SR


def _error_factor(inputs_NW: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """The upper Cholesky factor [W, W] of the inverse second moment of the inputs."""
    wide_NW = inputs_NW.astype(np.float64)
    moment_WW = wide_NW.T @ wide_NW
    width = len(moment_WW)
    power = float(np.trace(moment_WW)) / width
    moment_WW[np.diag_indices(width)] += _DAMPING * power if power > 0.0 else 1.0
    factor: NDArray[np.float64] = np.linalg.cholesky(np.linalg.inv(moment_WW)).T
    return factor
