"""How well a shadow stands for its primary: what comes out of it, and what became of its weights.

Shape legend: N calibration rows, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.core.errors import ConfigError

Array = NDArray[Any]
Forward = Callable[[Array, Mapping[str, Array]], Array]


@dataclass(frozen=True, slots=True)
class Fidelity:
    """A shadow beside its primary on the same rows.

    `relative_error`: root of the squared difference of the outputs over the squared outputs of the primary; 1 is what an output of zeros would have,
    infinity stands for a shadow whose output is not finite. `cosine`: mean over rows; `cosine_min`: of the worst row. `weight_snr_db`: of the matrices.
    """

    relative_error: float
    cosine: float
    cosine_min: float
    weight_snr_db: float
    num_rows: int


def fidelity(rows_ND: Array, primary: Mapping[str, Array], shadow: Mapping[str, Array], forward: Forward) -> Fidelity:
    """Compare two sets of tensors of one expert.

    Args:
        rows_ND: calibration rows that the gate sends to this expert.
        primary: the expert's tensors in compute layout.
        shadow: the decoded shadow's.
        forward: rows and tensors to outputs [N, D], in fp32.

    Raises ConfigError when there are no rows, or the primary's own outputs are not finite.
    """
    expected_ND = forward(rows_ND, primary).astype(np.float64)
    found_ND = forward(rows_ND, shadow).astype(np.float64)
    if not len(expected_ND) or not np.isfinite(expected_ND).all():
        message = f"calibration rows: {len(expected_ND)} rows with finite outputs are too few to measure a shadow; use other text"
        raise ConfigError(message)
    snr_db = weight_snr_db(primary, shadow)
    if not np.isfinite(found_ND).all():
        return Fidelity(math.inf, -1.0, -1.0, snr_db, len(expected_ND))
    cosines_N = _cosines(expected_ND, found_ND)
    error = _ratio(_power(expected_ND - found_ND), _power(expected_ND))
    return Fidelity(math.sqrt(error), float(cosines_N.mean()), float(cosines_N.min()), snr_db, len(expected_ND))


def weight_snr_db(primary: Mapping[str, Array], shadow: Mapping[str, Array]) -> float:
    """Signal to noise of all weight matrices together, in dB; infinite where nothing was lost."""
    signal = noise = 0.0
    for name, array in primary.items():
        if array.ndim > 1:
            wide = array.astype(np.float64)
            signal += _power(wide)
            noise += _power(wide - shadow[name].astype(np.float64))
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 and noise < math.inf else -math.inf


def _cosines(expected_ND: NDArray[np.float64], found_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine of each row; 1 where both are zero, 0 where one is."""
    expected_ND, found_ND = _scaled(expected_ND), _scaled(found_ND)
    lengths_N = np.linalg.norm(expected_ND, axis=1) * np.linalg.norm(found_ND, axis=1)
    cosines_N = np.where(expected_ND.any(axis=1) | found_ND.any(axis=1), 0.0, 1.0)
    np.divide(np.einsum("nd,nd->n", expected_ND, found_ND), lengths_N, out=cosines_N, where=lengths_N > 0.0)
    return np.clip(cosines_N, -1.0, 1.0)


def _scaled(rows_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows with a largest magnitude of 1, so that no square is lost to underflow."""
    widest_N1 = np.abs(rows_ND).max(axis=1, keepdims=True, initial=0.0)
    scaled_ND = np.zeros_like(rows_ND)
    np.divide(rows_ND, widest_N1, out=scaled_ND, where=widest_N1 > 0.0)
    return scaled_ND


def _power(values: NDArray[np.float64]) -> float:
    return float(np.square(values).sum())


def _ratio(part: float, whole: float) -> float:
    if part == 0.0:
        return 0.0
    return part / whole if whole > 0.0 else math.inf
