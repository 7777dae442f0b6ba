"""Fidelity against numbers worked out by hand, and against the actors' own arithmetic."""

import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest
import torch

from actors.core.codecs import CODECS, decode, encode
from actors.core.fidelity import fidelity, weight_snr_db
from actors.expert_layouts import ExpertWeights, expert_forward
from cluster.core.descriptors import DType, ExpertDescriptor
from cluster.core.errors import ConfigError

Arrays = Mapping[str, np.ndarray]
EXPERT = ExpertDescriptor(hidden_size=64, intermediate_size=96, bias=True)


def linear(rows: np.ndarray, tensors: Arrays) -> np.ndarray:
    return rows @ tensors["w"].T


def forward_fp32(rows: np.ndarray, tensors: Arrays) -> np.ndarray:
    """The one definition of an expert's arithmetic, in fp32."""
    torch.set_num_threads(1)
    descriptor = EXPERT.model_copy(update={"dtype": DType.FP32})
    wide = {name: torch.from_numpy(array.astype(np.float32)) for name, array in tensors.items()}
    output: np.ndarray = expert_forward(torch.from_numpy(rows), ExpertWeights(descriptor, wide, 0, 0)).numpy()
    return output


def test_an_equal_copy_is_perfect() -> None:
    rows = np.random.default_rng(0).standard_normal((5, 3))
    tensors = {"w": np.eye(3)}
    found = fidelity(rows, tensors, tensors, linear)
    assert (found.relative_error, found.cosine, found.weight_snr_db, found.num_rows) == (0.0, pytest.approx(1.0), math.inf, 5)


def test_error_and_cosine_are_those_worked_out_by_hand() -> None:
    rows = np.eye(2)
    primary, shadow = {"w": np.array([[3.0, 0.0], [0.0, 4.0]])}, {"w": np.array([[3.0, 4.0], [0.0, 4.0]])}
    found = fidelity(rows, primary, shadow, linear)
    # Outputs [3, 0] and [0, 4] against [3, 0] and [4, 4].
    assert found.relative_error == pytest.approx(math.sqrt(16 / 25))
    assert found.cosine == pytest.approx((1 + 1 / math.sqrt(2)) / 2)
    assert found.cosine_min == pytest.approx(1 / math.sqrt(2))
    assert found.weight_snr_db == pytest.approx(10 * math.log10(25 / 16))


def test_an_output_of_zeros_has_error_one_and_cosine_zero() -> None:
    found = fidelity(np.eye(2), {"w": np.eye(2)}, {"w": np.zeros((2, 2))}, linear)
    assert (found.relative_error, found.cosine, found.cosine_min) == (1.0, 0.0, 0.0)


def test_rows_that_are_zero_on_both_sides_agree() -> None:
    found = fidelity(np.zeros((2, 2)), {"w": np.eye(2)}, {"w": -np.eye(2)}, linear)
    assert (found.relative_error, found.cosine) == (0.0, 1.0)


@pytest.mark.parametrize("size", [1e-200, 1e30])
def test_very_small_and_very_large_outputs_are_measured_alike(size: float) -> None:
    rows = np.random.default_rng(1).standard_normal((4, 2))
    primary, shadow = {"w": np.eye(2)}, {"w": np.array([[1.0, 0.5], [0.0, 1.0]])}
    assert fidelity(size * rows, primary, shadow, linear).cosine == pytest.approx(fidelity(rows, primary, shadow, linear).cosine)


def test_a_shadow_that_puts_out_infinity_is_as_bad_as_can_be() -> None:
    found = fidelity(np.eye(2), {"w": np.eye(2)}, {"w": np.array([[np.inf, 1.0], [1.0, 1.0]])}, lambda rows, tensors: np.where(rows > 0, tensors["w"], 0.0))
    assert (found.relative_error, found.cosine, found.cosine_min) == (math.inf, -1.0, -1.0)


@pytest.mark.parametrize("rows", [np.zeros((0, 2)), np.full((1, 2), np.nan)])
def test_rows_that_measure_nothing_are_refused(rows: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="calibration rows"):
        fidelity(rows, {"w": np.eye(2)}, {"w": np.eye(2)}, linear)


def test_biases_do_not_count_as_weights() -> None:
    assert weight_snr_db({"w": np.eye(2), "b": np.ones(2)}, {"w": np.eye(2), "b": np.zeros(2)}) == math.inf


def test_more_bits_are_more_faithful_through_the_actors_own_forward() -> None:
    rng = np.random.default_rng(2)
    tensors = {name: (0.1 * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16) for name, shape in EXPERT.tensor_shapes().items()}
    rows = rng.standard_normal((50, 64)).astype(np.float32)
    found = [fidelity(rows, tensors, decode(encode(EXPERT, tensors, codec)), forward_fp32) for codec in CODECS.values()]
    errors = [each.relative_error for each in found]
    assert errors == sorted(errors)
    assert [each.cosine for each in found] == sorted((each.cosine for each in found), reverse=True)
    assert errors[0] < 0.02
    assert 0.2 < errors[-1] < 0.7
