"""The bound on an expert's outputs: no healthy weights break it, and a flipped exponent does, on every frame and without a sampled check."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import pytest
import torch

from actors.core.magnitude import ENORMOUS, Reach, beyond_reach, reach_of
from actors.expert_layouts import TORCH_DTYPES, ExpertWeights, expert_forward, load_weights
from cluster.core.descriptors import DType, ExpertDescriptor
from cluster.core.link_frames import SegmentStatus
from cluster.core.status import SlotState
from kit.actor_bench import CPU, A, B, Bench, ask, started
from kit.experts import RandomBlobs
from kit.shadow_blobs import Expansions, S, ShadowBlobs

DIM, WIDTH = 64, 96
HIGHEST_EXPONENT_BIT = 14
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
SHAPES = [
    ExpertDescriptor(hidden_size=DIM, intermediate_size=WIDTH, activation=activation, gated=gated, bias=bias)
    for activation in ("silu", "gelu", "gelu_tanh", "relu", "relu2")
    for gated in (True, False)
    for bias in (True, False)
    if (activation, gated) != ("relu2", True)
]
SHAPES += [ExpertDescriptor(hidden_size=DIM, intermediate_size=WIDTH, bias=True, swiglu_limit=7.0)]


def expert(descriptor: ExpertDescriptor, seed: int = 1) -> ExpertWeights:
    return load_weights(RandomBlobs(descriptor).open(f"{seed:08x}" * 8), CPU)


def reach(weights: ExpertWeights) -> Reach:
    found = reach_of(weights.descriptor, weights.tensors)
    assert found is not None
    return found


def flipped(values: torch.Tensor, place: int, bit: int = HIGHEST_EXPONENT_BIT) -> torch.Tensor:
    """A copy of a bf16 tensor with one bit flipped."""
    copy = values.clone()
    copy.view(-1).view(torch.int16)[place].bitwise_xor_(torch.tensor(1 << bit, dtype=torch.int16))
    return copy


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.activation}-{shape.gated=}-{shape.bias=}")
def test_no_healthy_output_is_beyond_reach(dtype: DType, shape: ExpertDescriptor) -> None:
    for seed in range(6):
        weights = expert(shape.model_copy(update={"dtype": dtype}), seed)
        for scale in (1e-20, 1e-3, 1.0, 1e3, 1e20):
            x_TD = (scale * torch.randn(7, DIM, generator=torch.Generator().manual_seed(seed))).to(TORCH_DTYPES[dtype])
            assert beyond_reach(x_TD, expert_forward(x_TD, weights), [reach(weights)], [7]) == []


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=lambda shape: f"{shape.activation}-{shape.gated=}-{shape.bias=}")  # the last one's clamps keep it below
def test_weights_that_all_pull_together_reach_the_bound_and_do_not_pass_it(shape: ExpertDescriptor) -> None:
    weights = expert(shape)
    weights = replace(weights, tensors={name: torch.full_like(tensor, 0.5) for name, tensor in weights.tensors.items()})
    x_TD = torch.full((3, DIM), 2.0, dtype=torch.bfloat16)
    y_TD = expert_forward(x_TD, weights)
    limit = reach(weights).limit(2.0)
    assert beyond_reach(x_TD, y_TD, [reach(weights)], [3]) == []
    assert limit / 9 < float(y_TD.max()) < limit / 7


def test_an_activation_without_such_a_bound_has_none() -> None:
    weights = expert(ExpertDescriptor(hidden_size=DIM, intermediate_size=WIDTH, activation="relu2"))
    assert reach_of(weights.descriptor, weights.tensors) is None
    x_TD = torch.ones(2, DIM)
    assert beyond_reach(x_TD, x_TD * 1e30, [None], [2]) == []


@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_a_weight_whose_highest_exponent_bit_flips_gives_numbers_beyond_reach_or_not_finite(name: str) -> None:
    weights = expert(SHAPES[0])
    bound = reach(weights)
    rng = torch.Generator().manual_seed(3)
    num_harmful = num_beyond = 0
    for place in torch.randint(weights.tensors[name].numel(), (200,), generator=rng).tolist():
        x_TD = torch.randn(4, DIM, generator=rng).bfloat16()
        right_TD = expert_forward(x_TD, weights)
        wrong_TD = expert_forward(x_TD, replace(weights, tensors=weights.tensors | {name: flipped(weights.tensors[name], place)}))
        is_finite = bool(wrong_TD.isfinite().all())
        if is_finite and float((wrong_TD - right_TD).float().norm()) > 1e-2 * float(right_TD.float().norm()):
            num_harmful += 1
            num_beyond += beyond_reach(x_TD, wrong_TD, [bound], [4]) == [0]
    assert num_harmful > 20
    assert num_beyond > 0.95 * num_harmful


def test_only_the_segment_with_the_fault_is_named_whatever_its_neighbours_are_like() -> None:
    weights = expert(SHAPES[0])
    bound = reach(weights)
    x_ND = torch.randn(8, DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    x_ND[6:] *= 1e20
    y_ND = expert_forward(x_ND, weights)
    rows, reaches = [2, 2, 2, 2], [bound, bound, None, bound]
    assert beyond_reach(x_ND, y_ND, reaches, rows) == []
    y_ND[2, 5] = 1e30
    y_ND[4, 5] = 1e30
    y_ND[0, 3] = math.nan
    assert beyond_reach(x_ND, y_ND, reaches, rows) == [1]
    y_ND[0, 4] = -1e30
    assert beyond_reach(x_ND, y_ND, reaches, rows) == [0, 1]


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e6])
def test_a_frame_of_one_segment_is_accused_exactly_above_its_limit(scale: float) -> None:
    bound = reach(expert(SHAPES[1]))  # without bias: what it can give vanishes with its rows, and only the floor is left
    x_TD = torch.full((3, DIM), scale)
    limit = bound.limit(scale)
    assert (limit == 1.0) == (scale < 0.1)
    for y, accused in ((0.5, []), (1.0, []), (0.99 * limit, []), (limit, []), (1.01 * limit, [0]), (1e3 * limit, [0])):
        y_TD = torch.zeros(3, DIM, dtype=torch.float64)
        y_TD[1, 5] = -y
        assert beyond_reach(x_TD.double(), y_TD, [bound], [3]) == accused


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_or_weights_that_are_not_finite_prove_nothing(value: float) -> None:
    weights = expert(SHAPES[0])
    bound = reach(weights)
    x_TD = torch.ones(2, DIM, dtype=torch.bfloat16)
    x_TD[1, 1] = value
    y_TD = torch.full_like(x_TD, 1e30)
    assert beyond_reach(x_TD, y_TD, [bound], [2]) == []
    assert beyond_reach(torch.ones_like(x_TD), torch.full_like(x_TD, value), [bound], [2]) == []
    spoilt = replace(weights, tensors=weights.tensors | {"down": torch.full_like(weights.tensors["down"], value)})
    assert beyond_reach(torch.ones_like(x_TD), y_TD, [reach(spoilt)], [2]) == []


@pytest.fixture
def bench() -> Iterator[Bench]:
    expansions = Expansions()
    expansions.gate.set()
    yield from started(ShadowBlobs(), expansions, num_slots=6, abft_fraction=1e-12)


def test_rows_beyond_reach_are_not_sent_though_no_frame_was_checked_and_a_shadow_is_expanded_again(bench: Bench) -> None:
    bench.hold_copies(A, B, S)
    bench.submit(ask(A), ask(B), ask(S))
    assert bench.statuses() == [SegmentStatus.OK] * 3
    bench.wait_until(lambda: not bench.runtime._workspace.is_busy)

    def spoil(weights: ExpertWeights) -> ExpertWeights:
        down = weights.tensors["down"].clone()
        down[0] = 1e30
        return replace(weights, tensors=weights.tensors | {"down": down})

    bench.runtime.exchange(A, spoil)
    workspace = bench.runtime._workspace
    bench.wait_until(lambda: bool(workspace._expanded[S].reach))
    workspace._expanded[S] = spoil(workspace._expanded[S])
    bench.submit(ask(A), ask(B), ask(S))
    result, _ = bench.replies.next()
    assert [item.status for item in result.segments] == [SegmentStatus.WRONG_NUMBERS, SegmentStatus.OK, SegmentStatus.WRONG_NUMBERS]
    assert result.segments[2].message == ENORMOUS
    bench.wait_until(lambda: bench.state(A) is SlotState.FAILED)  # its weights were read again
    bench.submit(ask(S), ask(B))
    assert bench.statuses() == [SegmentStatus.OK] * 2


def test_without_checksums_there_is_no_bound() -> None:
    for made in started(abft_fraction=0.0):
        made.hold_copies(A)
        made.runtime.exchange(A, lambda weights: replace(weights, tensors=weights.tensors | {"down": torch.full_like(weights.tensors["down"], 1e30)}))
        made.submit(ask(A))
        assert made.statuses() == [SegmentStatus.OK]
