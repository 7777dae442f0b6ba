"""`actors.deterministic`: a row's bits do not depend on what shares its segment, where plain kernels' do; and what it computes is still the expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from actors.expert_layouts import TORCH_DTYPES, ExpertWeights, grouped_forward
from actors.steady_forward import TILE_ROWS, steady_forward
from actors.widened_forward import forward_of
from cluster.core.descriptors import DType, ExpertDescriptor
from kit.plain_experts import ROUNDING, in_fp64, make_weights, row_error

MERGED_SIZES = (1, 2, 3, 7, 16, 33, 100)
WIDE = ExpertDescriptor(hidden_size=512, intermediate_size=1024, dtype=DType.FP32)
GroupedForward = Callable[[torch.Tensor, Sequence[ExpertWeights], Sequence[int]], torch.Tensor]


def sizes_that_change_a_row(forward: GroupedForward) -> set[tuple[int, int]]:
    """Merged sizes, and places in them, at which a row's output has other bits than alone."""
    weights = make_weights(WIDE)
    generator = torch.Generator().manual_seed(1)
    row = torch.randn((1, WIDE.hidden_size), generator=generator)
    alone = forward(row, [weights], [1])
    changed = set()
    for size in MERGED_SIZES:
        for place in {0, size // 2, size - 1}:
            merged = torch.randn((size, WIDE.hidden_size), generator=generator)
            merged[place] = row
            if not torch.equal(forward(merged, [weights], [size])[place], alone[0]):
                changed.add((size, place))
    return changed


def test_a_row_has_the_same_bits_whatever_shares_its_segment() -> None:
    assert sizes_that_change_a_row(forward_of("mapped", torch.device("cpu"), deterministic=True)) == set()


def test_with_the_switch_off_a_row_has_other_bits_in_some_segment() -> None:
    """Otherwise the test above would prove nothing here."""
    if not sizes_that_change_a_row(forward_of("mapped", torch.device("cpu"))):
        pytest.xfail("this machine's fp32 kernels sum in one order for all of these sizes: nothing to make deterministic")


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_the_expert(dtype: DType, bias: bool) -> None:
    descriptor = ExpertDescriptor(hidden_size=48, intermediate_size=40, dtype=dtype, bias=bias)
    experts = [make_weights(descriptor, seed) for seed in range(4)]
    rows = [1, 0, TILE_ROWS, 2 * TILE_ROWS + 3]
    x_ND = torch.randn((sum(rows), 48), generator=torch.Generator().manual_seed(2)).to(TORCH_DTYPES[dtype])
    found = steady_forward(x_ND, experts, rows)
    assert found.dtype == x_ND.dtype
    assert row_error(found, in_fp64(x_ND, experts, rows)) < ROUNDING[dtype]


def test_segments_that_are_not_the_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="do not make up"):
        steady_forward(torch.zeros(3, 512), [make_weights(WIDE)], [2])


def test_the_switch_goes_before_the_layout() -> None:
    cpu = torch.device("cpu")
    assert forward_of("widened", cpu, deterministic=True) is steady_forward
    assert forward_of("mapped", cpu) is grouped_forward
