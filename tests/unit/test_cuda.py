"""The actor's paths on a real GPU: the device, staging, slabs, layouts, expanded shadows, checks and the account of memory. Skipped where torch sees none."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.core.abft import block_sums, fault_of
from actors.core.frames import Group, Piece
from actors.core.magnitude import beyond_reach, reach_of
from actors.core.memory import LIBRARIES_BYTES, PASSING_EXPANSIONS
from actors.core.slots import SizedCopy
from actors.core.weight_digests import have_changed, row_digests
from actors.device import ErrorKind, choose_device, device_label, error_kind, measure_memory, self_test
from actors.expert_layouts import TORCH_DTYPES, ExpertWeights, expert_forward, grouped_forward, load_weights, with_packed
from actors.expert_runtime import ExpertRuntime
from actors.expert_slabs import PLACES_PER_SLAB
from actors.frame_audit import Audit
from actors.product_watch import watching
from actors.staging import CudaStaging, open_staging
from actors.steady_forward import steady_forward
from cluster.core.actor_config import ExpertActorConfig
from cluster.core.descriptors import DType, ExpertDescriptor
from cluster.core.ids import CopyId
from cluster.core.link_frames import SegmentStatus
from cluster.core.status import SlotState
from kit.actor_bench import A, B, ask
from kit.experts import TIMEOUT_S, RandomBlobs, Replies, frame_of, rows_of
from kit.shadow_blobs import S, ShadowBlobs, T, U
from kit.waiting import wait_until

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
DIM, WIDTH = 64, 128
BOUND = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}
"""Relative error of a row between two devices: a few roundings of the element type, in three products."""


def expert(seed: int, device: torch.device = CUDA, dtype: DType = DType.BF16, **shape: Any) -> ExpertWeights:
    descriptor = ExpertDescriptor(hidden_size=DIM, intermediate_size=WIDTH, dtype=dtype, **shape)
    return load_weights(RandomBlobs(descriptor).open(f"{seed:08x}" * 8), device)


def rows(num_rows: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: torch.Tensor, right: torch.Tensor) -> None:
    assert (found.shape, found.dtype) == (right.shape, right.dtype)
    error = torch.linalg.vector_norm(found.cpu().double() - right.cpu().double(), dim=1) / torch.linalg.vector_norm(right.cpu().double(), dim=1)
    assert float(error.max()) < BOUND[right.dtype]


def test_the_device_is_found_tested_named_and_measured() -> None:
    assert choose_device("auto").type == choose_device("cuda").type == "cuda"
    self_test(CUDA)
    assert device_label(CUDA).startswith("cuda")
    memory = measure_memory(CUDA)
    assert memory.is_device
    assert 0 < memory.free_bytes <= memory.total_bytes
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8, device=CUDA)
    assert error_kind(caught.value) is ErrorKind.OUT_OF_MEMORY


@pytest.mark.parametrize("dtype", list(DType))
def test_rows_reach_the_device_and_come_back_bit_for_bit(dtype: DType) -> None:
    staging = open_staging(CUDA)
    assert isinstance(staging, CudaStaging)
    x_ND = rows(6, TORCH_DTYPES[dtype])
    body = memoryview(bytes(x_ND.view(torch.uint8).numpy().tobytes()))
    row_bytes = DIM * dtype.itemsize
    pieces = (Piece(0, ((0, 2 * row_bytes),), 2), Piece(1, ((3 * row_bytes, 6 * row_bytes),), 3))
    with staging.scope(), torch.inference_mode():
        found_ND = staging.load(Group(dtype, DIM, pieces), body)
        assert found_ND.device.type == "cuda"
        assert torch.equal(found_ND.cpu(), torch.cat([x_ND[:2], x_ND[3:]]))
        assert bytes(staging.unload(found_ND * 1)) == bytes(body[: 2 * row_bytes]) + bytes(body[3 * row_bytes :])
        staging.settle()
        staging.free()


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("shape", [{}, {"bias": True}, {"gated": False, "activation": "relu2"}, {"bias": True, "swiglu_limit": 7.0}])
def test_experts_have_the_stored_bits_and_compute_what_they_compute_on_the_cpu(dtype: DType, shape: dict[str, Any]) -> None:
    here, there = expert(1, CPU, dtype, **shape), expert(1, CUDA, dtype, **shape)
    assert all(torch.equal(there.tensors[name].cpu(), tensor) for name, tensor in here.tensors.items())
    for num_rows in (1, 5, 70):
        x_TD = rows(num_rows, TORCH_DTYPES[dtype])
        assert_close(expert_forward(x_TD.to(CUDA), there), expert_forward(x_TD, here))


@pytest.mark.parametrize("bias", [False, True])
def test_experts_of_one_slab_answer_together_as_each_does_alone_and_twice_in_a_frame(bias: bool) -> None:
    experts = [expert(seed, bias=bias) for seed in range(1, 5)]
    for members, counts in (([0, 2, 1], [3, 1, 8]), ([3, 0, 3], [2, 2, 2]), ([1], [4])):
        x_ND = rows(sum(counts)).to(CUDA)
        used = [experts[member] for member in members]
        alone = torch.cat([expert_forward(part, one) for part, one in zip(torch.split_with_sizes(x_ND, counts), used, strict=True)])
        assert_close(grouped_forward(x_ND, used, counts), alone)


def test_steady_rows_have_the_same_bits_whatever_they_share_a_segment_with() -> None:
    weights, x_ND = expert(1), rows(40).to(CUDA)
    together = steady_forward(x_ND, [weights], [40])
    assert torch.equal(torch.cat([steady_forward(x_ND[row : row + 1], [weights], [1]) for row in range(40)]), together)


def test_places_are_given_back_by_who_is_gone_and_by_nobody_else() -> None:
    kept = [with_packed(expert(seed, activation="gelu")) for seed in range(PLACES_PER_SLAB)]  # a shape that no other test holds
    gc.collect()
    later = expert(99, activation="gelu")
    addresses = {weights.tensors["down"].data_ptr() for weights in (*kept, later)}
    assert len(addresses) == PLACES_PER_SLAB + 1
    addresses.remove(kept.pop().tensors["down"].data_ptr())
    gc.collect()
    again = expert(98, activation="gelu")
    assert again.tensors["down"].data_ptr() not in addresses
    for seed, held in [*enumerate(kept), (99, later), (98, again)]:
        right = expert(seed, CPU, activation="gelu")
        assert all(torch.equal(held.tensors[name].cpu(), tensor) for name, tensor in right.tensors.items())


@pytest.mark.parametrize("dtype", list(DType))
def test_healthy_frames_are_acquitted_and_a_flipped_exponent_is_not(dtype: DType) -> None:
    weights = expert(3, CUDA, dtype)
    reach = reach_of(weights.descriptor, weights.tensors)
    weights.checksums.update({name: block_sums(tensor) for name, tensor in weights.tensors.items()})
    digests = row_digests(weights.tensors["down"])
    assert reach is not None
    assert torch.equal(digests.cpu(), row_digests(weights.tensors["down"].cpu()))
    for scale in (1e-3, 1.0, 30.0):
        audit, x_TD = Audit([weights]), (scale * rows(33, TORCH_DTYPES[dtype])).to(CUDA)
        with watching(audit):
            y_TD = expert_forward(x_TD, weights)
        assert audit.faults == {}
        assert beyond_reach(x_TD, y_TD, [reach], [33]) == []
    down = weights.tensors["down"]
    assert not have_changed(down, digests, 0, len(down))
    down[5, 7] = 1e30 if dtype is not DType.FP16 else 6e4
    assert have_changed(down, digests, 0, len(down))
    hidden_TF = torch.ones(2, WIDTH, dtype=down.dtype, device=CUDA)
    assert fault_of(hidden_TF, down, torch.nn.functional.linear(hidden_TF, down), weights.checksums["down"]) is not None
    if dtype is not DType.FP16:  # 65,504 is not enormous
        x_TD = rows(4, TORCH_DTYPES[dtype]).to(CUDA)
        assert beyond_reach(x_TD, expert_forward(x_TD, weights), [reach], [4]) == [0]


class Served:
    """A runtime on the GPU, and what a test asks it."""

    def __init__(self, blobs: ShadowBlobs, **settings: Any) -> None:
        values = {"deployment": "d", "actor_id": "e-0", "generation": 1, "num_slots": 8, "store_dir": Path("unused"), "device": "cuda"}
        config = ExpertActorConfig.model_validate(values | settings)
        self.blobs, self.replies, self.deaths = blobs, Replies(), []
        self.runtime = ExpertRuntime(config, blobs, CUDA, on_sticky=self.deaths.append)
        self.runtime.start(TIMEOUT_S)

    def hold(self, *copies: CopyId) -> None:
        sized: list[SizedCopy] = self.blobs.sized(*copies)
        self.runtime.assume(sized, 1)
        wait_until(lambda: {slot.copy for slot in self.runtime.slots() if slot.state is SlotState.READY} >= set(copies), "the copies are ready")


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served(ShadowBlobs(), expanded_max=1, memory_bytes=64 << 20, abft_fraction=1.0)
    yield made
    assert made.runtime.stop(TIMEOUT_S)
    assert made.deaths == []


def test_replicas_and_shadows_with_and_without_room_answer_within_the_account_of_memory(served: Served) -> None:
    one, before_bytes = served.blobs.descriptor.num_bytes, torch.cuda.memory_allocated(CUDA)
    served.hold(A, B, S, T, U)
    assert served.runtime.capacity_bytes == (64 << 20) - min(3, 1 + PASSING_EXPANSIONS) * one
    asks = [ask(copy, 3 + seed, seed) for seed, copy in enumerate((A, S, T, B, U, S))]
    for frame_id in range(4):
        frame, body = frame_of(*asks, frame_id=frame_id)
        served.runtime.submit(frame, body, served.replies)
        result, answered = served.replies.next()
        assert [item.status for item in result.segments] == [SegmentStatus.OK] * len(asks)
        for found, asked in zip(rows_of(result, answered), asks, strict=True):
            right = expert_forward(torch.from_numpy(asked.rows), load_weights(served.blobs.open(asked.copy.version), CPU))
            assert_close(torch.from_numpy(np.array(found)), right)
        assert served.runtime.expanded_bytes == one
    assert served.runtime.num_unexpanded == 2 * 4
    assert served.runtime.expanded_max_bytes == one
    # torch's allocator counts the workspace of each thread's matrix library, some 32 MiB on Hopper.
    assert torch.cuda.memory_allocated(CUDA) - before_bytes < (64 << 20) + LIBRARIES_BYTES
    shadow = served.blobs.open(S.version)
    here, there = load_weights(shadow, CPU), load_weights(shadow, CUDA)
    assert all(torch.equal(there.tensors[name].cpu(), tensor) for name, tensor in here.tensors.items())
