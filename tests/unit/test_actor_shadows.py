"""Shadows in an actor: packed in their slots, expanded when rows come, within a bound, and never at another frame's cost."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from actors import expert_runtime
from actors.core import abft
from actors.expert_layouts import expert_forward, load_weights
from cluster.core.ids import CopyId, Role
from cluster.core.link_frames import SegmentStatus
from cluster.core.status import SlotState
from kit.actor_bench import CPU, A, B, Bench, ask, started
from kit.experts import TIMEOUT_S, Ask, frame_of, rows_of
from kit.shadow_blobs import Expansions, S, ShadowBlobs, T, U

EXPANDED_MAX = 2


@pytest.fixture
def expansions() -> Expansions:
    return Expansions.opened()


@pytest.fixture
def bench(expansions: Expansions) -> Iterator[Bench]:
    for made in started(ShadowBlobs(), expansions, num_slots=6, expanded_max=EXPANDED_MAX):
        yield made
        expansions.gate.set()


def answer(bench: Bench) -> tuple[list[SegmentStatus], list[Any]]:
    result, body = bench.replies.next()
    return [item.status for item in result.segments], rows_of(result, body)


def assert_answered(bench: Bench, *asks: Ask) -> None:
    statuses, rows = answer(bench)
    assert statuses == [SegmentStatus.OK] * len(asks)
    for found, one in zip(rows, asks, strict=True):
        assert torch.equal(torch.from_numpy(found.copy()), expert_forward(torch.from_numpy(one.rows), load_weights(bench.blobs.open(one.copy.version), CPU)))


def test_a_ready_shadow_is_charged_packed_and_nothing_is_expanded(bench: Bench) -> None:
    bench.hold_copies(S, T, U)
    assert bench.runtime.used_bytes == 3 * bench.blobs.packed_bytes < bench.blobs.descriptor.num_bytes
    assert bench.runtime.expanded_bytes == 0
    assert not bench.runtime.progress().is_loading


def test_the_first_rows_for_a_shadow_do_not_wait_for_its_checksums_which_come_after_them(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, summed = threading.Event(), []

    def block_sums(tensor: torch.Tensor) -> Any:
        assert gate.wait(TIMEOUT_S)
        summed.append(threading.current_thread().name)
        return abft.block_sums(tensor)

    bench.hold_copies(S)
    monkeypatch.setattr(expert_runtime, "block_sums", block_sums)
    asked = ask(S, 5)
    bench.submit(asked)
    assert_answered(bench, asked)
    assert summed == []
    gate.set()
    bench.wait_until(lambda: len(summed) == 2)
    assert set(summed) == {"shadow-workspace"}


def test_checksums_that_cannot_be_taken_leave_the_shadow_answering(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_tensor: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError

    bench.hold_copies(S, T)
    monkeypatch.setattr(expert_runtime, "block_sums", broken)
    for copy in (S, T, S):
        asked = ask(copy, 2)
        bench.submit(asked)
        assert_answered(bench, asked)


def test_rows_for_a_shadow_are_computed_with_its_expanded_weights_which_stay(bench: Bench, expansions: Expansions) -> None:
    bench.hold_copies(S)
    for seed in range(3):
        asked = ask(S, 5, seed)
        bench.submit(asked)
        assert_answered(bench, asked)
    assert expansions.done == [S.version]
    assert bench.runtime.expanded_bytes == bench.blobs.descriptor.num_bytes
    assert bench.runtime.used_bytes == bench.blobs.packed_bytes


def test_a_frame_without_shadows_does_not_wait_for_an_expansion(bench: Bench, expansions: Expansions) -> None:
    bench.hold_copies(A, S, T)
    bench.submit(ask(T), frame_id=1)
    assert_answered(bench, ask(T))
    expansions.gate.clear()
    bench.submit(ask(S), frame_id=2)
    assert expansions.entered.acquire(timeout=TIMEOUT_S)
    assert expansions.entered.acquire(timeout=TIMEOUT_S)
    bench.clock.now_s += 2.0
    assert bench.runtime.progress() == (1, 2.0, 3, True)
    for frame_id, copy in enumerate((A, T), start=3):
        bench.submit(ask(copy), frame_id=frame_id)
        assert_answered(bench, ask(copy))
    expansions.gate.set()
    assert_answered(bench, ask(S))


def test_a_shadow_that_cannot_be_expanded_is_not_held_and_its_neighbours_are_answered(bench: Bench, expansions: Expansions) -> None:
    bench.hold_copies(A, S, T)
    expansions.broken.add(S.version)
    bench.submit(ask(A), ask(S), ask(T))
    statuses, rows = answer(bench)
    assert statuses == [SegmentStatus.OK, SegmentStatus.NOT_HELD, SegmentStatus.OK]
    assert rows[0].size == rows[2].size > 0
    expansions.broken.clear()
    bench.submit(ask(S))
    assert_answered(bench, ask(S))


def test_segments_cancelled_during_the_expansion_are_not_computed(bench: Bench, expansions: Expansions) -> None:
    bench.hold_copies(S, T)
    expansions.gate.clear()
    frame, body = frame_of(ask(S), ask(T))
    bench.runtime.submit(frame, body, bench.replies)
    assert expansions.entered.acquire(timeout=TIMEOUT_S)
    bench.runtime.cancel(frame, [0])
    expansions.gate.set()
    result, _ = bench.replies.next()
    assert [item.num_bytes > 0 for item in result.segments] == [False, True]


def test_a_released_shadow_leaves_the_workspace(bench: Bench) -> None:
    bench.hold_copies(S, T)
    bench.submit(ask(S), ask(T))
    assert_answered(bench, ask(S), ask(T))
    bench.runtime.release([S], 2)
    bench.wait_until(lambda: bench.state(S) is None)
    assert bench.runtime.expanded_bytes == bench.blobs.descriptor.num_bytes
    bench.submit(ask(S))
    assert bench.statuses() == [SegmentStatus.NOT_HELD]


def test_a_shadow_released_while_it_is_expanded_answers_first(bench: Bench, expansions: Expansions) -> None:
    bench.hold_copies(S)
    expansions.gate.clear()
    bench.submit(ask(S))
    assert expansions.entered.acquire(timeout=TIMEOUT_S)
    bench.runtime.release([S], 2)
    assert bench.state(S) is SlotState.DRAINING
    expansions.gate.set()
    assert_answered(bench, ask(S))
    bench.wait_until(lambda: bench.state(S) is None)
    assert bench.runtime.expanded_bytes == 0


@pytest.mark.parametrize(
    ("copy", "told"),
    [(CopyId(S.expert, S.version, Role.REPLICA), "a shadow under this digest, not an expert"), (CopyId(B.expert, B.version, Role.SHADOW), "not a shadow")],
)
def test_a_blob_of_another_kind_is_refused(bench: Bench, copy: CopyId, told: str) -> None:
    bench.runtime.assume(bench.blobs.sized(copy), 1)
    bench.wait_until(lambda: bench.state(copy) is SlotState.FAILED)
    assert told in bench.runtime.slots()[0].reason


def test_frames_that_wait_for_an_expansion_are_bounded_and_answered_at_the_end(expansions: Expansions, monkeypatch: pytest.MonkeyPatch) -> None:
    for bench in started(ShadowBlobs(), expansions, num_slots=2):
        monkeypatch.setattr(bench.runtime._workspace, "_max_waiting", 2)
        bench.hold_copies(S)
        expansions.gate.clear()
        bench.submit(ask(S))
        assert expansions.entered.acquire(timeout=TIMEOUT_S)
        for frame_id in range(2, 5):
            bench.submit(ask(S), frame_id=frame_id)
        assert bench.statuses() == [SegmentStatus.OVERLOADED]
        stopping = threading.Thread(target=bench.runtime.stop, args=(TIMEOUT_S,))
        stopping.start()
        expansions.gate.set()
        for _ in range(3):
            assert_answered(bench, ask(S))
        stopping.join(TIMEOUT_S)
        assert bench.replies.is_empty
        bench.submit(ask(S))
        assert bench.statuses() == [SegmentStatus.OVERLOADED]
        assert bench.runtime._workspace._in_use.total() == 0
