"""Error compensation against the definition it is derived from, and by what it does to outputs on rows it has not seen."""

import ml_dtypes
import numpy as np
import pytest

from actors.core.codecs import CODECS, decode, encode
from actors.core.compensation import compensated
from actors.core.scales import Grid, fit_scales
from cluster.core.descriptors import CodecRecord, ExpertDescriptor
from cluster.core.errors import CheckpointError

GRID = Grid(CODECS["int2"])
PLAIN = ExpertDescriptor(hidden_size=96, intermediate_size=64, gated=False, activation="relu")


def correlated_rows(seed: int, num_rows: int, width: int) -> np.ndarray:
    """Rows in which few directions carry most of the power, as hidden states do."""
    mixing = np.random.default_rng(99).standard_normal((width, width)) * np.geomspace(1.0, 0.03, width)[:, None]
    return (np.random.default_rng(seed).standard_normal((num_rows, width)) @ mixing).astype(np.float32)


def matrix(seed: int, rows: int, width: int) -> np.ndarray:
    return (200 * np.random.default_rng(seed).standard_normal((rows, width))).astype(np.float32)


def column_by_column(weights: np.ndarray, inputs: np.ndarray, size: int, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Optimal Brain Quantization in fixed order (Frantar et al. 2023, equations 2 and 3): eliminate each column from the inverse of what remains."""
    rest = weights.astype(np.float64)
    wide = inputs.astype(np.float64)
    moment = wide.T @ wide
    moment += 0.01 * np.trace(moment) / len(moment) * np.eye(len(moment))
    codes, scales = np.zeros(weights.shape, np.uint8), []
    for column in range(weights.shape[1]):
        inverse = np.linalg.inv(moment[column:, column:])
        if column % size == 0:
            end = min(column + size, weights.shape[1])
            importance = np.array([1 / np.linalg.inv(moment[place:, place:])[0, 0] for place in range(column, end)], np.float32)
            scales.append(fit_scales(rest[:, column:end].astype(np.float32), grid, importance))
        codes[:, column] = grid.codes(rest[:, column], scales[-1])
        error = rest[:, column] - grid.levels[codes[:, column]] * scales[-1]
        rest[:, column:] -= np.outer(error, inverse[0] / inverse[0, 0])
    return codes, np.stack(scales, axis=1)


@pytest.mark.parametrize(("width", "size"), [(24, 8), (21, 8), (5, 8)])
def test_it_equals_eliminating_one_column_after_the_other(width: int, size: int) -> None:
    weights, inputs = matrix(1, 16, width), correlated_rows(2, 200, width)
    codes, scales = compensated(weights, inputs, GRID, size)
    expected_codes, expected_scales = column_by_column(weights, inputs, size, GRID)
    assert np.array_equal(scales, expected_scales)
    assert np.array_equal(codes, expected_codes)


def test_inputs_that_have_nothing_in_common_leave_plain_rounding() -> None:
    weights = matrix(3, 16, 64)
    codes, scales = compensated(weights, np.eye(64, dtype=np.float32), GRID, 32)
    groups = weights.reshape(-1, 32)
    plain = fit_scales(groups, GRID)
    assert np.array_equal(scales.reshape(-1), plain)
    assert np.array_equal(codes.reshape(-1, 32), GRID.codes(groups, plain[:, None]))


@pytest.mark.parametrize("codec", [CODECS["int2"], CODECS["int3"], CODECS["int4"]], ids=lambda codec: codec.name)
def test_outputs_on_rows_not_seen_lose_less_than_half(codec: CodecRecord) -> None:
    rng = np.random.default_rng(4)
    tensors = {name: (0.05 * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16) for name, shape in PLAIN.tensor_shapes().items()}
    seen, unseen = correlated_rows(5, 2000, 96), correlated_rows(6, 500, 96)
    plain = decode(encode(PLAIN, tensors, codec))["up"].astype(np.float64)
    inputs = {"up": seen, "down": np.eye(64, dtype=np.float32)}
    better = decode(encode(PLAIN, tensors, codec, lambda name, _: inputs[name]))["up"].astype(np.float64)
    exact = tensors["up"].astype(np.float64)
    assert np.square(unseen @ (better - exact).T).sum() < 0.5 * np.square(unseen @ (plain - exact).T).sum()


def test_a_matrix_is_calibrated_on_what_the_shadow_itself_puts_out() -> None:
    rng = np.random.default_rng(7)
    tensors = {name: (0.05 * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16) for name, shape in PLAIN.tensor_shapes().items()}
    rows = correlated_rows(8, 300, 96)
    seen: dict[str, dict[str, np.ndarray]] = {}

    def inputs(name: str, before: dict[str, np.ndarray]) -> np.ndarray:
        seen[name] = dict(before)
        return rows if name == "up" else np.maximum(rows @ before["up"].astype(np.float32).T, 0)

    restored = decode(encode(PLAIN, tensors, CODECS["int3"], inputs))
    assert seen["up"] == {}
    assert np.array_equal(seen["down"]["up"], restored["up"])


@pytest.mark.parametrize("kind", ["silent", "few", "none", "large"])
def test_poor_calibration_rows_still_give_a_finite_shadow(kind: str) -> None:
    weights = matrix(9, 8, 48)
    rows = correlated_rows(10, 400, 48)
    match kind:
        case "silent":
            rows[:, 10:20] = 0.0
        case "few":
            rows = rows[:3]
        case "none":
            rows = rows[:0]
        case _:
            rows *= np.float32(1e18)
    codes, scales = compensated(weights, rows, GRID, 16)
    restored = GRID.levels[codes] * np.repeat(scales, 16, axis=1)
    assert np.isfinite(restored).all()
    assert np.square(restored - weights).sum() < np.square(weights).sum()


def test_weights_pushed_beyond_the_range_of_scales_are_cut_not_lost() -> None:
    # The second column has to make up for nearly all of the first one's error, a hundred times over.
    inputs = np.array([[100.0, 1.0], [100.0, 1.01]], np.float32)
    weights = np.array([[2000.0, -4000.0], [700.0, 4000.0]], np.float32)
    _, scales = compensated(weights, inputs, GRID, 1)
    assert np.isfinite(scales).all()
    assert GRID.round_scales(np.array([1e6, 448.0, 0.0], np.float32)).tolist() == [448.0, 448.0, 0.0]


def test_calibration_rows_of_another_width_are_refused() -> None:
    tensors = {name: np.ones(shape, ml_dtypes.bfloat16) for name, shape in PLAIN.tensor_shapes().items()}
    with pytest.raises(CheckpointError, match=r"calibration rows for up must be finite, of shape \[rows, 96\]"):
        encode(PLAIN, tensors, CODECS["int2"], lambda _, __: np.ones((4, 95), np.float32))
