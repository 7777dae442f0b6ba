"""`actors.layout: packed`: the same bits as the mapped layout for any number of rows, more bytes, and never a packed matrix whose products differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from actors import packed_matrix as module
from actors.core.faults import NanWeights
from actors.expert_layouts import expert_forward, grouped_forward, with_packed
from actors.packed_matrix import can_pack, multiply_packed, pack
from actors.product_watch import watching
from actors.spoilt_weights import SpoiltWeights
from cluster.core.descriptors import DType, ExpertDescriptor
from kit.actor_bench import Bench, started
from kit.experts import DIM, RandomBlobs, expert_copy
from kit.plain_experts import make_weights

needs_kernels = pytest.mark.skipif(not can_pack(), reason="this build of torch or this processor has no bf16 kernels to pack for; nothing is packed there")
BF16 = ExpertDescriptor(hidden_size=DIM, intermediate_size=48, dtype=DType.BF16, bias=True)
A = expert_copy(0)


def test_where_nothing_can_be_packed_the_expert_stays_the_same_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "can_pack", lambda: False)
    plain = make_weights(BF16, 1)
    assert with_packed(plain) is plain


@needs_kernels
@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 16, 17, 33, 64, 200])
@pytest.mark.parametrize("shape", [(48, 32), (64, 256), (200, 96)])
def test_a_product_has_the_bits_of_the_mapped_one(shape: tuple[int, int], num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    weight_OI = torch.randn(shape, generator=generator).bfloat16()
    x_TI = torch.randn((max(2, num_rows), shape[1]), generator=generator).bfloat16()
    packed = pack(weight_OI)
    assert packed is not None
    assert torch.equal(multiply_packed(x_TI, packed), torch.nn.functional.linear(x_TI, weight_OI))


@needs_kernels
def test_an_expert_gives_the_same_bits_and_counts_twice() -> None:
    plain = make_weights(BF16, 3)
    packed = with_packed(plain)
    assert set(packed.packed) == {"gate_up", "down"}
    matrices = sum(plain.tensors[name].nbytes for name in packed.packed)
    assert packed.num_bytes == plain.num_bytes + matrices
    assert packed.private_bytes == plain.private_bytes + matrices
    for num_rows in (1, 2, 5, 40):
        x_TD = torch.randn((num_rows, DIM), generator=torch.Generator().manual_seed(num_rows)).bfloat16()
        assert torch.equal(expert_forward(x_TD, packed), expert_forward(x_TD, plain))


@needs_kernels
def test_a_matrix_whose_products_would_differ_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "multiply_packed", lambda x_TI, packed: multiply_packed(x_TI, packed) + 1)
    assert pack(torch.ones((8, 8)).bfloat16()) is None


@pytest.mark.parametrize("dtype", [DType.FP32, DType.FP16])
def test_other_types_are_left_mapped(dtype: DType) -> None:
    plain = make_weights(replace_dtype(dtype))
    packed = with_packed(plain)
    assert packed.packed == {}
    assert (packed.num_bytes, packed.private_bytes) == (plain.num_bytes, plain.private_bytes)


def replace_dtype(dtype: DType) -> ExpertDescriptor:
    return BF16.model_copy(update={"dtype": dtype})


@needs_kernels
def test_checks_of_products_see_packed_ones() -> None:
    """Checksums belong to the mapped matrix: what they are compared with is what the packed one gave."""
    expert = with_packed(make_weights(BF16, 1))
    expert = replace(expert, packed={name: pack(torch.zeros_like(expert.tensors[name])) for name in expert.packed})
    seen: list[tuple[bool, bool]] = []
    x_TD = torch.ones((4, DIM)).bfloat16()
    with watching(lambda _, weight, product: seen.append((any(weight is tensor for tensor in expert.tensors.values()), not product.any()))):
        expert_forward(x_TD, expert)
    assert seen == [(True, True), (True, True)]


@pytest.fixture
def bench() -> Iterator[Bench]:
    yield from started(RandomBlobs(BF16), layout="packed", abft_fraction=1.0)


@needs_kernels
def test_a_slot_is_charged_for_both_and_answers_with_the_same_bits(bench: Bench) -> None:
    bench.hold_copies(A)
    matrices = sum(int(np.prod(shape)) * 2 for shape in BF16.tensor_shapes().values() if len(shape) > 1)
    assert bench.runtime.used_bytes == BF16.num_bytes + matrices
    held = bench.runtime._weights[A]
    x_TD = torch.randn((5, DIM), generator=torch.Generator().manual_seed(0)).bfloat16()
    assert held.packed
    assert torch.equal(grouped_forward(x_TD, [held], [5]), expert_forward(x_TD, bench.weights(A)))


@needs_kernels
def test_spoilt_weights_are_spoilt_although_the_right_ones_were_packed(bench: Bench) -> None:
    bench.hold_copies(A)
    faults = SpoiltWeights()
    faults.attach(bench.runtime)
    assert faults.spoil(NanWeights()) == A
    x_TD = torch.ones((3, DIM)).bfloat16()
    assert not torch.isfinite(expert_forward(x_TD, bench.runtime._weights[A])).all()
    faults.restore("nan_weights")
    assert torch.isfinite(expert_forward(x_TD, bench.runtime._weights[A])).all()


@needs_kernels
def test_a_packed_matrix_that_failed_its_checksums_is_not_used_again(bench: Bench) -> None:
    bench.hold_copies(A)
    held = bench.runtime._weights[A]
    bench.runtime._on_wrong(held)
    assert held.packed == {}
