"""The runtime of an expert actor: slots that load, drain and let go, frames that wait, expire and are answered."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from actors.core.slots import SizedCopy
from actors.expert_layouts import ExpertWeights, expert_forward
from cluster.core.descriptors import DType, ExpertDescriptor
from cluster.core.errors import SlotsExhausted, StaleTable
from cluster.core.ids import CopyId
from cluster.core.link_frames import FrameStatus, SegmentStatus
from cluster.core.status import SlotState
from kit.actor_bench import A, B, Bench, C, ask, started
from kit.experts import TIMEOUT_S, Ask, frame_of, random_rows, rows_of

OK = SegmentStatus.OK


@pytest.fixture
def bench() -> Iterator[Bench]:
    yield from started()


@pytest.fixture
def one_slot_bench() -> Iterator[Bench]:
    yield from started(num_slots=1)


def test_answers_equal_a_plain_forward_in_higher_precision_and_expert_forward_exactly(bench: Bench) -> None:
    bench.hold_copies(A, B)
    asks = [ask(A, 5), ask(B, 2), ask(A, 1, seed=9)]
    bench.submit(*asks)
    result, body = bench.replies.next()
    assert (result.status, result.generation, result.frame_id) == (FrameStatus.OK, 1, 1)
    for got, asked in zip(rows_of(result, body), asks, strict=True):
        assert np.array_equal(got, bench.expected(asked).numpy())
        weights = {name: tensor.double().numpy() for name, tensor in bench.weights(asked.copy).tensors.items()}
        x = asked.rows.astype(np.float64)
        gate, up = np.split(x @ weights["gate_up"].T, 2, axis=1)
        exact = (gate / (1 + np.exp(-gate)) * up) @ weights["down"].T
        np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-5)


def test_one_frame_is_one_grouped_forward_over_all_its_segments(bench: Bench) -> None:
    bench.hold_copies(A, B, C)
    bench.submit(ask(A, 2), ask(B, 3), ask(C, 4))
    bench.replies.next()
    assert bench.forward.calls == [[2, 3, 4]]


def test_frames_are_computed_in_inference_mode_whichever_comes_first_or_later(bench: Bench) -> None:
    bench.hold_copies(A)
    modes: list[bool] = []
    bench.forward.trap = lambda _weights, _rows: modes.append(torch.is_inference_mode_enabled())
    for number in (1, 2, 3):
        bench.submit(ask(A), frame_id=number)
        bench.replies.next()
    assert modes == [True] * 3


def test_a_copy_answers_only_once_it_is_ready_and_another_version_never(bench: Bench) -> None:
    bench.blobs.gate.clear()
    bench.runtime.assume(bench.blobs.sized(A), 1)
    assert bench.runtime.progress().is_loading
    assert bench.state(A) is SlotState.LOADING
    bench.submit(ask(A))
    assert bench.statuses() == [SegmentStatus.NOT_HELD]
    bench.blobs.gate.set()
    bench.wait_until(lambda: bench.state(A) is SlotState.READY)
    bench.wait_until(lambda: not bench.runtime.progress().is_loading)
    other_version = CopyId(A.expert, "ff" * 32)
    bench.submit(ask(A), Ask(other_version, random_rows(1, 2)))
    assert bench.statuses() == [OK, SegmentStatus.NOT_HELD]


def test_a_frame_for_another_generation_is_refused_as_a_whole(bench: Bench) -> None:
    bench.hold_copies(A)
    bench.submit(ask(A), generation=2)
    result, body = bench.replies.next()
    assert (result.status, result.generation, result.segments, body) == (FrameStatus.WRONG_GENERATION, 1, (), b"")


def test_assuming_what_is_held_already_loads_nothing(bench: Bench) -> None:
    bench.hold_copies(A)
    bench.runtime.assume(bench.blobs.sized(A, A), 1)
    bench.hold_copies(B)
    assert bench.blobs.opened == [A.version, B.version]


def test_one_slot_serves_one_copy_after_another(one_slot_bench: Bench) -> None:
    bench = one_slot_bench
    bench.hold_copies(A)
    with pytest.raises(SlotsExhausted, match="needs 1 slots and 0 of 1 are free"):
        bench.runtime.assume(bench.blobs.sized(B), 1)
    bench.submit(ask(A))
    assert bench.statuses() == [OK]
    bench.runtime.drain([A], 2)
    bench.runtime.release([A], 2)
    bench.hold_copies(B, epoch=2)
    bench.submit(ask(B), ask(A))
    assert bench.statuses() == [OK, SegmentStatus.NOT_HELD]


def test_bytes_are_accounted_and_refused_with_both_numbers(bench: Bench) -> None:
    bench.hold_copies(A)
    num_bytes = bench.blobs.descriptor.num_bytes
    assert bench.runtime.used_bytes == num_bytes
    left = bench.runtime.capacity_bytes - num_bytes
    with pytest.raises(SlotsExhausted, match=f"needs {left + 1} bytes and {left} of {1 << 20} are free"):
        bench.runtime.assume([SizedCopy(B, left + 1)], 1)
    bench.runtime.release([A], 1)
    assert bench.runtime.used_bytes == 0


def test_commands_of_an_older_epoch_are_refused_and_frames_of_an_older_epoch_are_not(bench: Bench) -> None:
    bench.hold_copies(A, epoch=9)
    for command in (bench.runtime.drain, bench.runtime.release):
        with pytest.raises(StaleTable, match="epoch 8 is older than epoch 9"):
            command([A], 8)
    with pytest.raises(StaleTable):
        bench.runtime.assume(bench.blobs.sized(B), 8)
    assert bench.runtime.max_epoch == 9
    bench.submit(ask(A))  # its runs carry epoch 1
    assert bench.statuses() == [OK]


def test_draining_finishes_what_is_under_way_and_takes_nothing_new(bench: Bench) -> None:
    bench.hold_copies(A, B)
    bench.forward.hold()
    bench.submit(ask(A))
    bench.submit(ask(A), frame_id=2)
    bench.forward.wait_until_entered()
    bench.runtime.drain([A], 2)
    bench.runtime.release([A], 2)
    assert bench.state(A) is SlotState.DRAINING
    bench.submit(ask(A), ask(B), frame_id=3)
    bench.forward.gate.set()
    assert [bench.statuses(), bench.statuses(), bench.statuses()] == [[OK], [OK], [SegmentStatus.NOT_HELD, OK]]
    bench.wait_until(lambda: bench.state(A) is None)
    assert bench.runtime.used_bytes == bench.blobs.descriptor.num_bytes


def test_a_draining_copy_answers_draining_to_new_segments(bench: Bench) -> None:
    bench.hold_copies(A, B)
    bench.runtime.drain([A], 2)
    bench.submit(ask(A), ask(B))
    assert bench.statuses() == [SegmentStatus.DRAINING, OK]


def test_runs_whose_time_is_up_are_dropped_before_they_are_computed(bench: Bench) -> None:
    bench.hold_copies(A)
    bench.forward.hold()
    bench.submit(ask(A, 1))
    bench.forward.wait_until_entered()
    late = ask(A, 6, runs=[(1, 60_000), (2, 50), (3, 60_000)])
    bench.submit(late, frame_id=2)
    bench.clock.now_s += 0.0625
    bench.forward.gate.set()
    bench.replies.next()
    result, body = bench.replies.next()
    assert result.segments[0].expired_runs == (1,)
    assert result.queue_s == pytest.approx(0.0625)
    kept = np.concatenate([late.rows[:1], late.rows[3:]])
    assert np.array_equal(rows_of(result, body)[0], bench.expected(Ask(A, kept)).numpy())
    assert bench.forward.calls[1] == [4]


def test_cancelled_segments_are_skipped_while_they_wait_and_the_frame_is_answered(bench: Bench) -> None:
    bench.hold_copies(A, B)
    bench.forward.hold()
    bench.submit(ask(A))
    bench.forward.wait_until_entered()
    frame, body = frame_of(ask(A), ask(B), frame_id=2)
    bench.runtime.submit(frame, body, bench.replies)
    bench.runtime.cancel(frame, [0])
    bench.forward.gate.set()
    bench.replies.next()
    result, _ = bench.replies.next()
    assert [(item.status, item.num_rows, item.expired_runs) for item in result.segments] == [(OK, 0, (0,)), (OK, 3, ())]


def test_the_queue_is_bounded_and_what_is_over_it_is_answered_at_once() -> None:
    for bench in started(frames_in_flight=1):
        bench.hold_copies(A)
        bench.forward.hold()
        bench.submit(ask(A))
        bench.forward.wait_until_entered()
        for number in range(64):
            bench.submit(ask(A), frame_id=2 + number)
        assert bench.replies.is_empty
        bench.submit(ask(A), frame_id=99)
        result, _ = bench.replies.next()
        assert (result.frame_id, result.segments[0].status) == (99, SegmentStatus.OVERLOADED)
        bench.forward.gate.set()
        assert {bench.replies.next()[0].frame_id for _ in range(65)} == set(range(1, 66))
        bench.runtime.release([A], 1)
        bench.wait_until(lambda: bench.state(A) is None)  # noqa: B023  (one bench)


def test_a_frame_over_the_row_limit_is_refused_with_both_numbers() -> None:
    for bench in started(max_tokens_per_frame=8):
        bench.hold_copies(A)
        bench.submit(ask(A, 9))
        result, _ = bench.replies.next()
        assert result.segments[0].status is SegmentStatus.OVERLOADED
        assert "9 rows is over the limit of 8" in result.segments[0].message


def test_progress_counts_frames_and_rows_and_ages_with_the_oldest_frame(bench: Bench) -> None:
    bench.hold_copies(A)
    assert bench.runtime.progress() == (0, 0.0, 0, False)
    bench.forward.hold()
    bench.submit(ask(A, 3))
    bench.forward.wait_until_entered()
    bench.clock.now_s += 2.0
    bench.submit(ask(A, 5), frame_id=2)
    bench.clock.now_s += 1.0
    progress = bench.runtime.progress()
    assert progress.queued_tokens == 8
    assert progress.oldest_age_s == pytest.approx(3.0)
    bench.forward.gate.set()
    bench.replies.next()
    bench.replies.next()
    bench.wait_until(lambda: bench.runtime.progress() == (2, 0.0, 0, False))


def test_a_load_that_fails_says_why_and_can_be_tried_again(bench: Bench) -> None:
    bench.blobs.missing.add(A.version)
    bench.runtime.assume(bench.blobs.sized(A, B), 1)
    bench.wait_until(lambda: bench.state(B) is SlotState.READY)
    (failed, _) = bench.runtime.slots()
    assert (failed.state, failed.num_bytes, failed.reason) == (SlotState.FAILED, 0, f"NOT_FOUND: blob {A.version[:12]} is not in the store")
    bench.blobs.missing.clear()
    bench.hold_copies(A)


def test_a_gate_under_an_experts_digest_is_refused(bench: Bench) -> None:
    bench.blobs.kind = "gate"
    bench.runtime.assume(bench.blobs.sized(A), 1)
    bench.wait_until(lambda: bench.state(A) is SlotState.FAILED)
    assert bench.runtime.slots()[0].reason.startswith("CHECKPOINT_ERROR: ")


def test_releasing_a_copy_that_loads_cancels_the_load(bench: Bench) -> None:
    bench.blobs.gate.clear()
    bench.runtime.assume(bench.blobs.sized(A, B), 1)
    bench.wait_until(lambda: bench.blobs.opened == [A.version])
    bench.runtime.release([A, B], 1)
    assert bench.runtime.slots() == ()
    bench.blobs.gate.set()
    bench.wait_until(lambda: not bench.runtime.progress().is_loading)
    bench.hold_copies(C)
    assert bench.blobs.opened == [A.version, C.version]
    bench.submit(ask(A), ask(C))
    assert bench.statuses() == [SegmentStatus.NOT_HELD, OK]


def test_loading_does_not_hold_up_frames_and_a_new_copy_is_warm(bench: Bench) -> None:
    bench.hold_copies(A)
    bench.blobs.gate.clear()
    bench.runtime.assume(bench.blobs.sized(B), 1)
    bench.submit(ask(A))
    assert bench.statuses() == [OK]
    assert bench.runtime.progress().is_loading


def test_segments_of_two_dtypes_in_one_frame_are_both_computed(bench: Bench) -> None:
    bench.hold_copies(A)
    asked = ask(A, 3)
    expected = bench.expected(asked).numpy()
    bench.blobs.descriptor = ExpertDescriptor(hidden_size=33, intermediate_size=16, dtype=DType.BF16)
    bench.hold_copies(B)
    # An odd number of bf16 numbers before it moves the fp32 segment off its alignment.
    half = Ask(B, random_rows(5, 1, dim=33, dtype=DType.BF16), dtype=DType.BF16)
    bench.submit(half, asked)
    result, body = bench.replies.next()
    assert [item.status for item in result.segments] == [OK, OK]
    assert np.array_equal(rows_of(result, body)[1], expected)
    x_TD = torch.from_numpy(half.rows.view(np.uint16)).view(torch.bfloat16)
    y_TD = expert_forward(x_TD, bench.weights(B)).view(torch.uint16).numpy()
    assert np.array_equal(rows_of(result, body)[0].view(np.uint16), y_TD)


def test_stopping_answers_the_frames_that_wait_and_takes_no_more() -> None:
    bench = Bench()
    bench.hold_copies(A)
    bench.forward.hold()
    bench.submit(ask(A))
    bench.forward.wait_until_entered()
    bench.submit(ask(A), frame_id=2)
    assert not bench.runtime.stop(0.0)
    bench.submit(ask(A), frame_id=3)
    assert bench.statuses() == [SegmentStatus.OVERLOADED]
    bench.forward.gate.set()
    assert bench.runtime.stop(TIMEOUT_S)
    assert [bench.statuses(), bench.statuses()] == [[OK], [OK]]


def test_a_load_that_does_not_fit_the_device_says_so_and_holds_nothing(bench: Bench) -> None:
    def no_room(_weights: Sequence[ExpertWeights], _rows: Sequence[int]) -> None:
        raise torch.OutOfMemoryError

    bench.forward.warm_trap = no_room
    bench.runtime.assume(bench.blobs.sized(A), 1)
    bench.wait_until(lambda: bench.state(A) is SlotState.FAILED)
    assert bench.runtime.slots()[0].reason.startswith("OUT_OF_MEMORY: ")
    assert bench.runtime.used_bytes == 0


def test_released_weights_and_answered_bodies_are_kept_by_nobody(bench: Bench) -> None:
    bench.hold_copies(A)
    weights = weakref.ref(bench.runtime._weights[A])
    frame, body = frame_of(ask(A))
    received = np.frombuffer(body, np.uint8).copy()
    bench.runtime.submit(frame, received.data, bench.replies)
    bench.replies.next()
    kept = weakref.ref(received)
    del received
    bench.wait_until(lambda: kept() is None)
    bench.runtime.release([A], 1)
    bench.wait_until(lambda: weights() is None)


def test_frames_from_many_threads_are_each_answered_once_and_rightly_while_copies_come_and_go(bench: Bench) -> None:
    copies = [A, B, C]
    asks = {copy: ask(copy, 2) for copy in copies}
    expected = {copy: bench.expected(asked).numpy() for copy, asked in asks.items()}
    bench.hold_copies(*copies)
    num_threads, num_frames = 3, 60

    def submit_frames(number: int) -> None:
        for count in range(num_frames):
            bench.submit(*(asks[copy] for copy in copies), frame_id=1 + number * num_frames + count)

    threads = [threading.Thread(target=submit_frames, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    for epoch in range(2, 40):
        copy = copies[epoch % 3]
        bench.runtime.drain([copy], epoch)
        bench.runtime.release([copy], epoch)
        bench.runtime.assume(bench.blobs.sized(copy), epoch)
    for thread in threads:
        thread.join(TIMEOUT_S)
    seen, statuses = set(), set()
    for _ in range(num_threads * num_frames):
        result, body = bench.replies.next()
        seen.add(result.frame_id)
        for copy, item, rows in zip(copies, result.segments, rows_of(result, body), strict=True):
            statuses.add(item.status)
            assert item.status is not OK or np.array_equal(rows, expected[copy])
    assert len(seen) == num_threads * num_frames
    assert statuses <= {OK, SegmentStatus.NOT_HELD, SegmentStatus.DRAINING, SegmentStatus.OVERLOADED}
    bench.wait_until(lambda: all(bench.state(copy) is SlotState.READY for copy in copies))
    bench.submit(*asks.values(), frame_id=999)
    assert bench.statuses() == [OK, OK, OK]
    bench.runtime._table.validate()
