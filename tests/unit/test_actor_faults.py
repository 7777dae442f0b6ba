"""What the compute thread makes of a forward that raises, of too little memory, of a broken device and of a link that is gone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from actors.expert_layouts import ExpertWeights
from cluster.core.link_frames import SegmentStatus
from kit.actor_bench import A, B, Bench, C, ask, started
from kit.experts import Ask, frame_of, rows_of

OK = SegmentStatus.OK


@pytest.fixture
def bench() -> Iterator[Bench]:
    yield from started()


def test_a_segment_that_raises_fails_alone_and_names_the_type_only(bench: Bench) -> None:
    bench.hold_copies(A, B, C)
    poison = bench.weights(B).tensors["down"]

    def trap(weights: Sequence[ExpertWeights], _rows: Sequence[int]) -> None:
        if any(torch.equal(item.tensors["down"], poison) for item in weights):
            message = "secret numbers 1.25"
            raise ValueError(message)

    bench.forward.trap = trap
    asks = [ask(A), ask(B), ask(C)]
    bench.submit(*asks)
    result, body = bench.replies.next()
    assert [item.status for item in result.segments] == [OK, SegmentStatus.FAULTED, OK]
    assert result.segments[1].message == "ValueError"
    got = rows_of(result, body)
    assert np.array_equal(got[0], bench.expected(asks[0]).numpy())
    assert np.array_equal(got[2], bench.expected(asks[2]).numpy())
    assert len(got[1]) == 0


def test_running_out_of_memory_halves_the_frame_once_and_fails_only_the_half_that_still_does_not_fit(bench: Bench) -> None:
    bench.hold_copies(A, B, C)

    def trap(_weights: Sequence[ExpertWeights], rows: Sequence[int]) -> None:
        if sum(rows) > 6:
            raise torch.OutOfMemoryError

    bench.forward.trap = trap
    asks = [ask(A, 2), ask(B, 4), ask(C, 8)]
    bench.submit(*asks)
    result, body = bench.replies.next()
    assert [item.status for item in result.segments] == [OK, OK, SegmentStatus.OUT_OF_MEMORY]
    assert bench.forward.calls == [[2, 4, 8], [2, 4], [8]]
    assert np.array_equal(rows_of(result, body)[1], bench.expected(asks[1]).numpy())
    bench.submit(ask(C, 6), frame_id=2)
    assert bench.statuses() == [OK]


def test_a_single_segment_that_does_not_fit_is_computed_in_two_halves(bench: Bench) -> None:
    bench.hold_copies(A)

    def trap(_weights: Sequence[ExpertWeights], rows: Sequence[int]) -> None:
        if sum(rows) > 40:
            raise MemoryError

    bench.forward.trap = trap
    asked = ask(A, 64, runs=[(20, 60_000), (10, 0), (34, 60_000)])
    bench.submit(asked)
    result, body = bench.replies.next()
    assert bench.forward.calls == [[54], [27], [27]]
    kept = np.concatenate([asked.rows[:20], asked.rows[30:]])
    halves = [bench.expected(Ask(A, part)).numpy() for part in (kept[:27], kept[27:])]
    assert np.array_equal(rows_of(result, body)[0], np.concatenate(halves))


def test_a_broken_device_is_reported_before_anything_is_answered(bench: Bench) -> None:
    bench.hold_copies(A)
    seen: list[bool] = []

    def trap(_weights: Sequence[ExpertWeights], _rows: Sequence[int]) -> None:
        seen.append(bench.replies.is_empty)
        raise torch.AcceleratorError

    bench.forward.trap = trap
    bench.submit(ask(A))
    bench.replies.next()
    assert seen == [True]
    assert bench.deaths == ["AcceleratorError"]


def test_a_reply_that_raises_does_not_stop_the_compute_thread(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.hold_copies(A)

    def broken(*_: object) -> None:
        raise ConnectionResetError

    frame, body = frame_of(ask(A))
    bench.runtime.submit(frame, body, broken)
    bench.submit(ask(A), frame_id=2)
    assert bench.statuses() == [OK]
    assert "could not be handed to its link" in caplog.text
