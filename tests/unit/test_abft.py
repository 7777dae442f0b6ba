"""Checksums of matrix products: no false alarms, whatever the numbers; flips that matter are caught; outputs keep their bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from actors.core.abft import WRONG_PRODUCT, WRONG_WEIGHTS, block_sums, fault_of
from actors.expert_layouts import ExpertWeights, expert_forward, grouped_forward, load_weights
from actors.frame_audit import Audit, FrameSampler
from actors.frame_forward import FrameRunner
from actors.product_watch import watching
from cluster.core.descriptors import DType, ExpertDescriptor
from cluster.core.link_frames import SegmentStatus
from kit.actor_bench import CPU, A, B, Bench, C, ask, started
from kit.experts import RandomBlobs, rows_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HARMFUL = 1e-2


def expert(seed: int, dtype: DType = DType.BF16, *, dim: int = 64, width: int = 512, bias: bool = False, gated: bool = True) -> ExpertWeights:
    descriptor = ExpertDescriptor(hidden_size=dim, intermediate_size=width, dtype=dtype, bias=bias, gated=gated)
    weights = load_weights(RandomBlobs(descriptor).open(f"{seed:08x}" * 8), CPU)
    weights.checksums.update({name: block_sums(tensor) for name, tensor in weights.tensors.items() if tensor.dim() > 1})
    return weights


def audited(x_TD: torch.Tensor, weights: ExpertWeights) -> tuple[torch.Tensor, dict[ExpertWeights, str]]:
    audit = Audit([weights])
    with watching(audit):
        return expert_forward(x_TD, weights), audit.faults


def flipped(tensor: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A copy with one random bit flipped."""
    copy = tensor.clone()
    octets = copy.view(-1).view(torch.uint8)
    octets[int(rng.integers(len(octets)))] ^= 1 << int(rng.integers(8))
    return copy


def damage(found: torch.Tensor, right: torch.Tensor) -> float:
    """The largest relative error of a row; a row that is not finite is infinitely wrong."""
    error = torch.linalg.vector_norm(found.double() - right.double(), dim=1) / torch.linalg.vector_norm(right.double(), dim=1)
    return float(error.nan_to_num(nan=torch.inf).max())


@pytest.mark.parametrize("dtype", [DType.BF16, DType.FP16, DType.FP32])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_healthy_products_raise_no_alarm(dtype: DType, scale: float) -> None:
    for seed in range(20):
        weights = expert(seed, dtype, bias=seed % 2 == 1, gated=seed % 3 != 0)
        x_TD = (scale * torch.randn(17, 64, generator=torch.Generator().manual_seed(seed))).to(weights.tensors["down"].dtype)
        assert audited(x_TD, weights)[1] == {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(torch.ones(64, 32), id="equal-rows-that-all-round-alike"),
        pytest.param(torch.zeros(64, 32), id="zeros"),
        pytest.param(1e-38 * torch.ones(64, 32), id="below-the-smallest-normal-number"),
        pytest.param(torch.cat([torch.ones(64, 16), -torch.ones(64, 16)], dim=1), id="sums-that-cancel"),
        pytest.param(1e4 * torch.ones(64, 32), id="large"),
        pytest.param(torch.ones(37, 33), id="odd-widths"),
    ],
)
def test_weights_whose_rounding_adds_up_raise_no_alarm(dtype: torch.dtype, weight: torch.Tensor) -> None:
    weight_OI = weight.to(dtype)
    for value in (0.0, 1.003, -7.77, 1e4):
        x_TI = torch.full((3, weight.shape[1]), value).to(dtype)
        x_TI[1] *= torch.linspace(0.5, 1.5, weight.shape[1]).to(dtype)
        assert fault_of(x_TI, weight_OI, torch.nn.functional.linear(x_TI, weight_OI), block_sums(weight_OI)) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_healthy_weights_that_overflow_are_not_blamed(dtype: torch.dtype) -> None:
    weight_OI = torch.randn(64, 32).to(dtype)
    x_TI = torch.full((2, 32), torch.finfo(dtype).max / 4).to(dtype)
    y_TO = torch.nn.functional.linear(x_TI, weight_OI)
    assert not bool(y_TO.isfinite().all())
    assert fault_of(x_TI, weight_OI, y_TO, block_sums(weight_OI)) is None


def test_rows_that_are_not_finite_are_not_judged() -> None:
    weight_OI = torch.randn(64, 32)
    x_TI = torch.randn(3, 32)
    x_TI[1, 5] = torch.nan
    x_TI[2, 5] = torch.inf
    assert fault_of(x_TI, weight_OI, torch.nn.functional.linear(x_TI, weight_OI), block_sums(weight_OI)) is None


def test_weights_that_never_were_finite_are_not_blamed() -> None:
    weight_OI = torch.randn(64, 32)
    weight_OI[3, 3] = torch.inf
    x_TI = torch.randn(3, 32)
    assert fault_of(x_TI, weight_OI, torch.nn.functional.linear(x_TI, weight_OI), block_sums(weight_OI)) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_no_healthy_weights_could_give_is_a_fault(dtype: torch.dtype, value: float) -> None:
    weight_OI = torch.randn(64, 32).to(dtype)
    sums = block_sums(weight_OI)
    x_TI = torch.randn(3, 32).to(dtype)
    y_TO = torch.nn.functional.linear(x_TI, weight_OI)
    y_TO[1, 7] = value
    assert fault_of(x_TI, weight_OI, y_TO, sums) == WRONG_PRODUCT
    weight_OI[7, 1] = value
    assert fault_of(x_TI, weight_OI, torch.nn.functional.linear(x_TI, weight_OI), sums) == WRONG_WEIGHTS


@pytest.mark.parametrize("dtype", [DType.BF16, DType.FP16, DType.FP32])
@pytest.mark.parametrize("num_rows", [1, 12])
def test_flipped_weights_that_move_an_output_by_a_hundredth_are_caught(dtype: DType, num_rows: int) -> None:
    rng = np.random.default_rng(7)
    weights = expert(1, dtype)
    num_harmful = 0
    for _ in range(400):
        x_TD = torch.from_numpy(rng.standard_normal((num_rows, 64))).to(weights.tensors["down"].dtype)
        right = expert_forward(x_TD, weights)
        name = str(rng.choice(sorted(weights.tensors)))
        broken = replace(weights, tensors=weights.tensors | {name: flipped(weights.tensors[name], rng)})
        found, faults = audited(x_TD, broken)
        if damage(found, right) > HARMFUL:
            num_harmful += 1
            assert faults == {broken: WRONG_WEIGHTS}
    assert num_harmful > 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_flipped_outputs_of_a_product_that_move_it_by_a_hundredth_are_caught(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(8)
    weight_OI = torch.from_numpy(rng.standard_normal((192, 64))).to(dtype)
    sums = block_sums(weight_OI)
    num_harmful = 0
    for _ in range(300):
        x_TI = torch.from_numpy(rng.standard_normal((5, 64))).to(dtype)
        right = torch.nn.functional.linear(x_TI, weight_OI)
        found = flipped(right, rng)
        if damage(found, right) > HARMFUL:
            num_harmful += 1
            assert fault_of(x_TI, weight_OI, found, sums) == WRONG_PRODUCT
    assert num_harmful > 20


def test_a_fault_beyond_the_first_tile_of_rows_is_caught() -> None:
    weight_OI = torch.randn(64, 32)
    x_TI = torch.randn(1200, 32)
    y_TO = torch.nn.functional.linear(x_TI, weight_OI)
    y_TO[1199, 63] += 1.0
    assert fault_of(x_TI, weight_OI, y_TO, block_sums(weight_OI)) == WRONG_PRODUCT


def test_checks_leave_every_output_bit_as_it_is() -> None:
    experts = [expert(seed, bias=True) for seed in range(3)]
    x_ND = torch.randn(40, 64).bfloat16()
    plain = grouped_forward(x_ND, experts, [1, 33, 6])
    audit = Audit(experts)
    with watching(audit):
        checked = grouped_forward(x_ND, experts, [1, 33, 6])
    assert torch.equal(plain.view(torch.int16), checked.view(torch.int16))
    assert audit.faults == {}


def test_every_matrix_of_every_expert_of_a_frame_is_seen() -> None:
    experts = [expert(seed) for seed in range(3)]
    seen: list[int] = []
    with watching(lambda _x, weight_OI, _y: seen.append(weight_OI.data_ptr())):
        grouped_forward(torch.randn(6, 64).bfloat16(), experts, [1, 2, 3])
    grouped_forward(torch.randn(6, 64).bfloat16(), experts, [1, 2, 3])
    assert seen == [item.tensors[name].data_ptr() for item in experts for name in ("gate_up", "down")]


@pytest.mark.parametrize(("fraction", "least", "most"), [(0.0, 0, 0), (1 / 16, 40, 90), (1.0, 1000, 1000)])
def test_the_sampled_share_is_the_one_asked_for_and_the_same_every_time(fraction: float, least: int, most: int) -> None:
    sampler, again = FrameSampler(fraction, seed=3), FrameSampler(fraction, seed=3)
    picked = [sampler.audit([]) is not None for _ in range(1000)]
    assert picked == [again.audit([]) is not None for _ in range(1000)]
    assert least <= sum(picked) <= most


@pytest.fixture
def bench() -> Iterator[Bench]:
    yield from started(abft_fraction=1.0)


def test_a_frame_is_answered_but_for_the_segment_whose_product_came_out_wrong(bench: Bench) -> None:
    bench.hold_copies(A, B, C)
    wrong = bench.runtime._weights[B].tensors["down"].data_ptr()

    def spoil(_x_TI: torch.Tensor, weight_OI: torch.Tensor, y_TO: torch.Tensor) -> None:
        if weight_OI.data_ptr() == wrong:
            y_TO[0, 0] += 1.0

    def hinder(runner: FrameRunner) -> FrameRunner:
        class Hindered:
            def run(self, *args: Any) -> Any:
                with watching(spoil):
                    return runner.run(*args)

        return Hindered()

    bench.runtime._compute._forward = hinder(bench.runtime._compute._forward)
    asks = [ask(A), ask(B), ask(C)]
    bench.submit(*asks)
    result, body = bench.replies.next()
    assert [item.status for item in result.segments] == [SegmentStatus.OK, SegmentStatus.WRONG_NUMBERS, SegmentStatus.OK]
    assert result.segments[1].message == WRONG_PRODUCT
    rows = rows_of(result, body)
    assert [len(part) for part in rows] == [3, 0, 3]
    assert np.array_equal(rows[2], bench.expected(asks[2]).numpy())


def test_frames_are_not_watched_when_no_share_is_asked_for() -> None:
    for bench in started(abft_fraction=0.0):
        bench.hold_copies(A)
        assert bench.runtime._weights[A].checksums == {}
        bench.submit(ask(A))
        assert bench.statuses() == [SegmentStatus.OK]
