"""`actors.layout: widened`: many bf16 rows summed in fp32 give the expert's output; few rows, other types and other devices keep the mapped kernel."""

from __future__ import annotations

import pytest
import torch

from actors import widened_forward as module
from actors.expert_layouts import TORCH_DTYPES, expert_forward, grouped_forward
from actors.widened_forward import MIN_ROWS, forward_of, widened_forward, widened_linear
from cluster.core.descriptors import DType, ExpertDescriptor
from kit.plain_experts import ROUNDING, in_fp64, make_weights, row_error

CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_the_expert_at_every_size(bias: bool) -> None:
    descriptor = ExpertDescriptor(hidden_size=64, intermediate_size=96, dtype=DType.BF16, bias=bias)
    experts = [make_weights(descriptor, seed) for seed in range(4)]
    rows = [3, MIN_ROWS, 0, 2 * MIN_ROWS + 1]
    x_ND = torch.randn((sum(rows), 64), generator=torch.Generator().manual_seed(3)).bfloat16()
    found = widened_forward(x_ND, experts, rows)
    assert found.dtype is torch.bfloat16
    assert row_error(found, in_fp64(x_ND, experts, rows)) < ROUNDING[DType.BF16]
    assert torch.equal(found[:3], expert_forward(x_ND[:3], experts[0])), "few rows keep the mapped kernel"


def test_strips_that_do_not_divide_the_matrix_leave_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRIP_ELEMENTS", 7 * 24)
    x_TI, weight_OI = torch.randn(5, 24).bfloat16(), torch.randn(40, 24).bfloat16()
    assert torch.equal(widened_linear(x_TI, weight_OI), (x_TI.float() @ weight_OI.float().T).bfloat16())


def test_sums_are_rounded_once() -> None:
    """Sums of ones: exact in fp32, and not in bf16, where 257 does not exist."""
    x_TI, weight_OI = torch.ones(MIN_ROWS, 257).bfloat16(), torch.ones(8, 257).bfloat16()
    assert torch.equal(widened_linear(x_TI, weight_OI).double(), torch.full((MIN_ROWS, 8), 257.0).bfloat16().double())


@pytest.mark.parametrize("dtype", [DType.FP32, DType.FP16])
def test_other_types_are_left_alone(dtype: DType) -> None:
    expert = make_weights(ExpertDescriptor(hidden_size=32, intermediate_size=16, dtype=dtype))
    x_ND = torch.randn(MIN_ROWS, 32).to(TORCH_DTYPES[dtype])
    assert torch.equal(widened_forward(x_ND, [expert], [MIN_ROWS]), expert_forward(x_ND, expert))


@pytest.mark.parametrize("pays", [True, False])
def test_auto_takes_what_its_trial_finds_faster(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "widening_pays", lambda: pays)
    assert forward_of("auto", CPU) is (widened_forward if pays else grouped_forward)
    assert forward_of("widened", CPU) is widened_forward
    assert forward_of("auto", torch.device("cuda")) is grouped_forward


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_only_a_clear_win_counts(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_fastest_s", lambda compute, *_: share if compute is widened_linear else 1.0)
    assert module.widening_pays() is (share < 0.85)
