"""Resident weights are read again in the background: what has changed is noticed, answers nothing more, and can be loaded again."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from actors.blob_files import StoredBlob
from actors.core.codecs import CODECS, encode
from actors.core.slots import AssumeReceived, CopyCorrupted, CopyLoaded, DropWeights, Holding, LoadCopy, ReleaseReceived, SegmentsEnded, SizedCopy, SlotTable
from actors.core.weight_digests import have_changed, row_digests, row_spans
from actors.expert_layouts import load_weights
from actors.redigest import PIECE_BYTES, Redigester, resident_of
from actors.staging import CpuStaging
from cluster.core.ids import CopyId, Role
from cluster.core.link_frames import SegmentStatus
from cluster.core.status import SlotState
from kit.actor_bench import CPU, A, B, Bench, ask, started
from kit.experts import TIMEOUT_S, RandomBlobs, expert_copy

OK = SegmentStatus.OK


@pytest.fixture
def bench() -> Iterator[Bench]:
    yield from started(redigest_s=0.005, abft_fraction=0.0)


@pytest.fixture
def slow_bench() -> Iterator[Bench]:
    yield from started(redigest_s=3600.0, abft_fraction=1.0)


def flip_one_bit(bench: Bench, copy: CopyId, name: str = "down") -> None:
    bench.runtime._weights[copy].tensors[name].view(-1).view(torch.uint8)[5] ^= 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 32), (5, 33), (7,), (1, 1)])
def test_every_flipped_bit_changes_the_digest_of_its_row_alone(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    tensor = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
    digests = row_digests(tensor)
    octets = tensor.view(-1).view(torch.uint8)
    for _ in range(50):
        place, bit = int(rng.integers(len(octets))), 1 << int(rng.integers(8))
        octets[place] ^= bit
        assert int((row_digests(tensor) != digests).sum()) == 1
        octets[place] ^= bit
    assert torch.equal(row_digests(tensor), digests)


def test_pieces_cover_every_row_once_and_find_a_change_in_theirs() -> None:
    tensor = torch.randn(1000, 16)
    digests = row_digests(tensor)
    spans = row_spans(tensor, 4096)
    assert [row for first, stop in spans for row in range(first, stop)] == list(range(1000))
    assert len(spans) == -(-1000 // 64)
    tensor[700, 3] += 1.0
    assert [span for span in spans if have_changed(tensor, digests, *span)] == [(640, 704)]


def test_a_copy_whose_bits_changed_fails_with_a_reason_answers_no_more_and_loads_again(bench: Bench) -> None:
    bench.hold_copies(A, B)
    flip_one_bit(bench, A)
    bench.wait_until(lambda: bench.state(A) is SlotState.FAILED)
    (failed, healthy) = bench.runtime.slots()
    assert failed.reason == "REPLICA_CORRUPT: resident weights are not those that were loaded; load the copy again"
    assert (failed.num_bytes, healthy.state) == (0, SlotState.READY)
    bench.submit(ask(A), ask(B))
    assert bench.statuses() == [SegmentStatus.NOT_HELD, OK]
    bench.hold_copies(A, epoch=2)
    bench.submit(ask(A), ask(B))
    assert bench.statuses() == [OK, OK]
    bench.runtime._table.validate()


def test_healthy_copies_are_read_again_and_again_and_stay(bench: Bench) -> None:
    bench.hold_copies(A, B)
    before = bench.runtime._redigester.passes_done
    bench.wait_until(lambda: bench.runtime._redigester.passes_done > before + 3)
    assert [slot.state for slot in bench.runtime.slots()] == [SlotState.READY, SlotState.READY]


def test_frames_that_wait_for_a_copy_that_turns_out_corrupt_send_nothing_of_it(bench: Bench) -> None:
    bench.hold_copies(A, B)
    bench.forward.hold()
    bench.submit(ask(A), ask(B), frame_id=1)
    bench.forward.wait_until_entered()
    bench.submit(ask(B), ask(A), frame_id=2)
    flip_one_bit(bench, A)
    bench.wait_until(lambda: bench.state(A) is SlotState.FAILED)
    bench.submit(ask(A), frame_id=3)
    bench.forward.gate.set()
    assert bench.statuses() == [SegmentStatus.WRONG_NUMBERS, OK]
    assert bench.statuses() == [OK, SegmentStatus.WRONG_NUMBERS]
    assert bench.statuses() == [SegmentStatus.NOT_HELD]
    bench.wait_until(lambda: A not in bench.runtime._weights)
    bench.runtime._table.validate()


def test_a_failed_checksum_has_the_weights_read_at_once(slow_bench: Bench) -> None:
    bench = slow_bench
    bench.hold_copies(A, B)
    bench.runtime._weights[A].tensors["down"].view(-1).view(torch.uint8)[3] ^= 0x40
    bench.submit(ask(A), ask(B))
    assert bench.statuses() == [SegmentStatus.WRONG_NUMBERS, OK]
    bench.wait_until(lambda: bench.state(A) is SlotState.FAILED)
    assert bench.state(B) is SlotState.READY


def test_packed_shadows_are_read_again_too() -> None:
    blobs = RandomBlobs()
    found = blobs.open(A.version)
    packed = {name: array.copy() for name, array in encode(found.descriptor, found.tensors, CODECS["int4"]).tensors.items()}
    copy = CopyId(A.expert, A.version, Role.SHADOW)
    resident = resident_of(copy, StoredBlob(A.version, "shadow", found.descriptor, packed, 0, CODECS["int4"], "ab" * 32))
    assert not any(resident.has_changed(piece) for piece in resident.pieces)
    next(iter(packed.values())).reshape(-1)[3] ^= 1
    assert [resident.has_changed(piece) for piece in resident.pieces].count(True) == 1


def test_a_pass_pauses_between_pieces_and_keeps_nothing_alive_meanwhile() -> None:
    weights = load_weights(RandomBlobs().open(A.version), CPU)
    weights.tensors["down"] = torch.zeros(8, PIECE_BYTES // 4)
    weights.digests.update({"down": row_digests(weights.tensors["down"])})
    resident = resident_of(A, weights)
    assert len(resident.pieces) == 8
    changed: list[object] = []
    redigester = Redigester(3600.0, staging=CpuStaging, on_changed=changed.append, on_sticky=changed.append)
    redigester.keep(resident)
    redigester.start()
    pause = threading.Event()
    kept = weakref.ref(weights)
    redigester.drop(A)
    del resident, weights
    for _ in range(int(TIMEOUT_S / 0.002)):
        if kept() is None:
            break
        pause.wait(0.002)
    assert kept() is None
    assert redigester.passes_done == 0
    assert redigester.stop(TIMEOUT_S)
    assert changed == []


def held(table: SlotTable, copy: CopyId) -> None:
    (load,) = table.handle(AssumeReceived(1, (SizedCopy(copy, 10),)))
    assert isinstance(load, LoadCopy)
    table.handle(CopyLoaded(load.ticket, copy, 10))


def test_a_corrupt_copy_is_let_go_when_its_last_lease_ends_and_no_sooner() -> None:
    table, copy = SlotTable(num_slots=2, capacity_bytes=100), expert_copy(0)
    held(table, copy)
    assert table.lease([copy]) == (Holding.HELD,)
    assert table.handle(CopyCorrupted(copy, "why")) == ()
    table.validate()
    assert table.lease([copy]) == (Holding.NOT_HELD,)
    assert table.handle(AssumeReceived(2, (SizedCopy(copy, 10),))) == ()
    assert table.handle(SegmentsEnded((copy,))) == (DropWeights(copy),)
    table.validate()
    assert table.used_bytes == 0
    assert isinstance(table.handle(AssumeReceived(2, (SizedCopy(copy, 10),)))[0], LoadCopy)


def test_a_corrupt_copy_that_is_released_frees_its_slot_once() -> None:
    table, copy = SlotTable(num_slots=2, capacity_bytes=100), expert_copy(0)
    held(table, copy)
    table.lease([copy])
    table.handle(CopyCorrupted(copy, "why"))
    assert table.handle(ReleaseReceived(2, (copy,))) == ()
    assert table.handle(SegmentsEnded((copy,))) == (DropWeights(copy),)
    table.validate()
    assert table.reports() == ()


def test_what_is_not_loaded_cannot_turn_corrupt() -> None:
    table, copy = SlotTable(num_slots=2, capacity_bytes=100), expert_copy(0)
    table.handle(AssumeReceived(1, (SizedCopy(copy, 10),)))
    assert table.handle(CopyCorrupted(copy, "why")) == ()
    assert table.handle(CopyCorrupted(expert_copy(1), "why")) == ()
    assert table.reports()[0].state is SlotState.LOADING
