"""Combine: fp32, fixed order, checked in fp64 and against plain scalar steps."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core.errors import DataLoss
from router_service.core.combine import combine, finish, is_finite
from router_service.core.dispatch import order_choices
from router_service.core.reference import experts_output

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def _case(seed: int, dtype: torch.dtype, *, num_tokens: int, num_experts: int = 7, top_k: int = 3) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
    """Outputs in dispatch order, ids with some unused, weights."""
    rng = np.random.default_rng(seed)
    ids_TK = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)]).astype(np.int32)
    ids_TK[rng.random(ids_TK.shape) < 0.2] = -1
    y_ND = torch.from_numpy(rng.standard_normal((int((ids_TK >= 0).sum()), 17))).to(dtype)
    return y_ND, ids_TK, torch.from_numpy(rng.standard_normal(ids_TK.shape).astype(np.float32))


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), DTYPES, st.integers(1, 30))
def test_the_sum_agrees_with_fp64(seed: int, dtype: torch.dtype, num_tokens: int) -> None:
    y_ND, ids_TK, weights_TK = _case(seed, dtype, num_tokens=num_tokens)
    place_TK = order_choices(ids_TK).place_TK
    wide = np.zeros((num_tokens, 17))
    for token, column in np.argwhere(place_TK >= 0):
        wide[token] += float(weights_TK[token, column]) * y_ND[place_TK[token, column]].double().numpy()
    torch.testing.assert_close(combine(y_ND, place_TK, weights_TK).double(), torch.from_numpy(wide), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), DTYPES)
def test_the_bits_are_those_of_one_rounded_product_and_sum_per_column(seed: int, dtype: torch.dtype) -> None:
    y_ND, ids_TK, weights_TK = _case(seed, dtype, num_tokens=12)
    place_TK = order_choices(ids_TK).place_TK
    expected = np.zeros((12, 17), np.float32)
    for column in range(place_TK.shape[1]):
        for token in np.flatnonzero(place_TK[:, column] >= 0):
            product = weights_TK[token, column].numpy() * y_ND[place_TK[token, column]].float().numpy()
            expected[token] = expected[token] + product
    assert combine(y_ND, place_TK, weights_TK).numpy().tobytes() == expected.tobytes()


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), DTYPES, st.integers(1, 9), st.integers(1, 7))
def test_few_rows_and_many_have_the_same_bits(seed: int, dtype: torch.dtype, num_tokens: int, top_k: int) -> None:
    rng = np.random.default_rng(seed)
    y_ND = torch.from_numpy(rng.standard_normal((num_tokens * top_k, 17)) * 10.0 ** rng.integers(-44, 38, (num_tokens * top_k, 17))).to(dtype)
    y_ND[torch.from_numpy(rng.random(y_ND.shape) < 0.2)] = -0.0
    weights_TK = torch.from_numpy(rng.standard_normal((num_tokens, top_k)).astype(np.float32))
    place_TK = rng.permutation(num_tokens * top_k).reshape(num_tokens, top_k)
    expected = np.zeros((num_tokens, 17), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for column in range(top_k):
            expected += weights_TK[:, column, None].numpy() * y_ND[torch.from_numpy(place_TK[:, column])].float().numpy()
    for limits in ({"_FEW_ELEMENTS": 1 << 14}, {"_FEW_ELEMENTS": 0}, {"_FEW_ELEMENTS": 0, "_TOGETHER_ELEMENTS": 0}):
        with mock.patch.multiple("router_service.core.combine", **limits):
            assert combine(y_ND, place_TK, weights_TK).numpy().tobytes() == expected.tobytes(), limits


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_identity_experts_return_the_input_when_weights_sum_to_one(seed: int, num_tokens: int) -> None:
    rng = np.random.default_rng(seed)
    ids_TK = np.stack([rng.permutation(6)[:2] for _ in range(num_tokens)]).astype(np.int32)
    # Halves and quarters: their products and sums with bf16 rows are exact in fp32.
    first = rng.choice([0.25, 0.5, 0.75], num_tokens).astype(np.float32)
    weights_TK = torch.from_numpy(np.stack([first, 1 - first], axis=1))
    x_TD = torch.from_numpy(rng.standard_normal((num_tokens, 9))).bfloat16()
    total = experts_output(x_TD, ids_TK, weights_TK, lambda _, rows: rows)
    assert torch.equal(finish(total, torch.bfloat16), x_TD)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_permuting_tokens_permutes_the_output(seed: int, num_tokens: int) -> None:
    rng = np.random.default_rng(seed)
    _, ids_TK, weights_TK = _case(seed, torch.float32, num_tokens=num_tokens)
    x_TD = torch.from_numpy(rng.standard_normal((num_tokens, 9)).astype(np.float32))
    order = rng.permutation(num_tokens)

    def forward(index: int, rows: torch.Tensor) -> torch.Tensor:
        return torch.tanh(rows * (index + 1))

    straight = experts_output(x_TD, ids_TK, weights_TK, forward)
    shuffled = experts_output(x_TD[order], ids_TK[order], weights_TK[order], forward)
    assert torch.equal(straight[order], shuffled)


def test_the_answer_does_not_depend_on_how_experts_are_numbered() -> None:
    y_ND, ids_TK, weights_TK = _case(5, torch.bfloat16, num_tokens=20)
    renamed = np.where(ids_TK >= 0, (ids_TK * 3 + 1) % 7, -1).astype(np.int32)
    straight, other = order_choices(ids_TK), order_choices(renamed)
    moved_ND = torch.empty_like(y_ND)
    used = ids_TK >= 0
    moved_ND[other.place_TK[used]] = y_ND[straight.place_TK[used]]
    assert torch.equal(combine(y_ND, straight.place_TK, weights_TK), combine(moved_ND, other.place_TK, weights_TK))


def test_a_token_without_a_used_choice_gets_zeros() -> None:
    total = combine(torch.ones(0, 4), np.full((3, 2), -1), torch.ones(3, 2))
    assert torch.equal(total, torch.zeros(3, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_output_that_is_not_finite_is_named_by_row_and_never_returned(bad: float) -> None:
    total = torch.zeros(5, 3)
    total[3, 1] = bad
    assert not is_finite(total)
    with pytest.raises(DataLoss) as lost:
        finish(total, torch.float32)
    assert lost.value.failed_rows == (3,)


def test_a_sum_beyond_the_range_of_the_reply_is_data_loss() -> None:
    with pytest.raises(DataLoss) as lost:
        finish(torch.tensor([[1.0], [1e6]]), torch.float16)
    assert lost.value.failed_rows == (1,)
    assert "fp32" in str(lost.value)
