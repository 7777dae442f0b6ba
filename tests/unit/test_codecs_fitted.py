"""Codecs of thin factors and of narrow experts: exact sums, the promised sizes, the least error, and outputs that padding does not change."""

import numpy as np
import pytest

from actors.core.codecs import FITTED_CODECS, decode, encode, packed_bytes, packed_layout, stored_descriptor
from actors.core.low_rank import MAX_RANK, fit_factors, product, rank_of
from actors.core.plain_forward import plain_forward
from actors.expert_blob import decode as decode_header
from actors.expert_blob import encode_shadow
from cluster.core.descriptors import CodecRecord, DType, ExpertDescriptor
from cluster.core.errors import CheckpointError

EXPERTS = [
    ExpertDescriptor(hidden_size=48, intermediate_size=40, dtype=DType.FP32),
    ExpertDescriptor(hidden_size=48, intermediate_size=40, bias=True, swiglu_limit=7.0, dtype=DType.FP32),
    ExpertDescriptor(hidden_size=40, intermediate_size=56, gated=False, activation="relu", dtype=DType.FP16),
]


def tensors_of(descriptor: ExpertDescriptor, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    dtype = np.float16 if descriptor.dtype is DType.FP16 else np.float32
    return {name: (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(dtype) for name, shape in descriptor.tensor_shapes().items()}


@pytest.mark.parametrize("expert", EXPERTS, ids=["gated", "clamped", "plain"])
@pytest.mark.parametrize("codec", FITTED_CODECS)
def test_a_fitted_shadow_comes_back_in_its_primarys_shape_with_the_bytes_that_were_promised(codec: str, expert: ExpertDescriptor) -> None:
    record = FITTED_CODECS[codec]
    packed = encode(expert, tensors_of(stored_descriptor(expert, record)), record)
    assert packed.num_bytes == packed_bytes(expert, record)
    assert {name: (array.dtype, array.shape) for name, array in packed.tensors.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in packed_layout(expert, record).items()
    }
    restored = decode(packed)
    assert {name: array.shape for name, array in restored.items()} == expert.tensor_shapes()
    assert all(np.isfinite(array).all() for array in restored.values())
    header = decode_header(memoryview(b"".join(encode_shadow(packed, "ab" * 32))), "b")
    assert header.codec == record


@pytest.mark.parametrize("expert", EXPERTS, ids=["gated", "clamped", "plain"])
def test_a_narrow_expert_in_its_primarys_shape_computes_what_it_computes_alone(expert: ExpertDescriptor) -> None:
    record = FITTED_CODECS["narrow4"]
    narrow = stored_descriptor(expert, record)
    packed = encode(expert, tensors_of(narrow, seed=3), record)
    alone = decode(type(packed)(narrow, record.model_copy(update={"inner_percent": 0}), packed.tensors))
    rows = np.random.default_rng(4).standard_normal((20, expert.hidden_size)).astype(np.float32)
    np.testing.assert_allclose(plain_forward(expert, rows, decode(packed)), plain_forward(narrow, rows, alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_factors_come_back_to_the_same_bits_in_any_order_of_summation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    packed = fit_factors("m", rng.standard_normal((50, 70)), 24, None)
    left, right = (packed[f"m.{side}"].view(np.int8).astype(np.int64) for side in ("left", "right"))
    scales = packed["m.left_scales"].astype(np.float32)[:, None], packed["m.right_scales"].astype(np.float32)
    assert np.array_equal(product("m", packed), (left @ right).astype(np.float32) * scales[0] * scales[1])
    assert MAX_RANK * 127 * 127 < 2**24


@pytest.mark.parametrize("with_rows", [False, True])
def test_factors_lose_hardly_more_than_the_best_of_their_rank(with_rows: bool) -> None:
    rng = np.random.default_rng(7)
    weights = rng.standard_normal((60, 40)) * np.geomspace(1.0, 0.1, 40)
    inputs = rng.standard_normal((500, 40)) @ (rng.standard_normal((40, 40)) * np.geomspace(1.0, 0.03, 40)[:, None])
    rows = inputs if with_rows else np.eye(40) * 500**0.5
    spectrum = np.linalg.svd(weights @ np.linalg.cholesky(rows.T @ rows / len(rows)), compute_uv=False)
    best = float((spectrum[12:] ** 2).sum())
    lost = (weights - product("m", fit_factors("m", weights, 12, inputs if with_rows else None))) @ rows.T
    assert best * len(rows) * 0.999 <= float((lost**2).sum()) <= best * len(rows) * 1.1


def test_factors_after_low_bits_lose_less_than_the_low_bits_alone() -> None:
    expert = EXPERTS[0]
    tensors = tensors_of(expert)
    both = FITTED_CODECS["int2-lowrank"]
    alone = both.model_copy(update={"rank_percent": 0, "name": "int2"})
    errors = [sum(float(((decode(encode(expert, tensors, codec))[name] - tensors[name]) ** 2).sum()) for name in tensors) for codec in (alone, both)]
    assert errors[1] < errors[0]


def test_the_rank_keeps_to_its_share_of_the_matrix_and_to_exact_sums() -> None:
    for shape in [(512, 192), (192, 256), (4096, 14336), (3, 2), (20000, 20000)]:
        rank = rank_of(shape, 26)
        assert 1 <= rank <= min(*shape, MAX_RANK)
        assert rank == 1 or rank * sum(shape) <= 0.26 * shape[0] * shape[1]


def test_a_record_without_codes_needs_factors() -> None:
    with pytest.raises(ValueError, match="rank_percent"):
        CodecRecord(name="nothing", bits=0)


def test_tensors_of_another_width_than_the_narrow_expert_are_refused() -> None:
    with pytest.raises(CheckpointError, match="gate_up"):
        encode(EXPERTS[0], tensors_of(EXPERTS[0]), FITTED_CODECS["narrow4"])
