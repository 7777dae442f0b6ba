"""What becomes of a frame: refusals, expired runs, groups, halves, and the Result; checked against a plain re-reading of the bytes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.core.frames import Group, Outcome, Piece, answer, copy_of, merge_outcomes, plan_frame, refuse_frame, refuse_segments
from actors.core.memory import IDLE_PLACES_BYTES, LIBRARIES_BYTES, MeasuredMemory, capacity_bytes
from actors.core.slots import Holding
from cluster.core.descriptors import DType, ExpertDescriptor
from cluster.core.ids import CopyId, ExpertId, Incarnation, Role
from cluster.core.link_codec import decode, decode_prefix, encode
from cluster.core.link_frames import Forward, FrameStatus, Run, Segment, SegmentStatus

ME = Incarnation("expert-3", 5)
VERSION = bytes(range(32))


def descriptor(dtype: DType = DType.BF16, dim: int = 4) -> ExpertDescriptor:
    return ExpertDescriptor(hidden_size=dim, intermediate_size=8, dtype=dtype)


def segment(number: int, rows: tuple[int, ...], *, timeouts_ms: tuple[int, ...] | None = None, dtype: DType = DType.BF16, dim: int = 4) -> Segment:
    timeouts_ms = timeouts_ms or (1000,) * len(rows)
    runs = tuple(Run(count, timeout_ms, exact=False, epoch=1) for count, timeout_ms in zip(rows, timeouts_ms, strict=True))
    return Segment(number, 1, "m", 0, number, VERSION, Role.REPLICA, dtype, dim, runs)


def frame(*segments: Segment) -> Forward:
    return Forward(7, ME.generation, (), segments)


def body_of(a_frame: Forward) -> memoryview:
    return memoryview(bytearray(random.Random(0).randbytes(a_frame.body_bytes)))


def held(a_frame: Forward) -> tuple[list[Holding], list[ExpertDescriptor | None]]:
    return [Holding.HELD] * len(a_frame.segments), [descriptor(item.dtype, item.dim) for item in a_frame.segments]


def echo(group: Group, body: memoryview) -> dict[int, Outcome]:
    """What a forward that changes nothing would answer."""
    return {
        piece.position: Outcome(SegmentStatus.OK, (memoryview(b"".join(bytes(body[start:stop]) for start, stop in piece.ranges)),)) for piece in group.pieces
    }


def test_a_segment_names_its_copy_by_model_layer_index_version_and_role() -> None:
    assert copy_of(segment(3, (1,))) == CopyId(ExpertId("m", 0, 3), VERSION.hex(), Role.REPLICA)


def test_segments_alike_form_one_group_and_rows_that_lie_together_one_range() -> None:
    a_frame = frame(segment(0, (2, 3)), segment(1, (1,)))
    plan = plan_frame(a_frame, *held(a_frame), waited_s=0.0)
    (group,) = plan.groups
    assert group.ranges == ((0, a_frame.body_bytes),)
    assert [piece.num_rows for piece in group.pieces] == [5, 1]


def test_segments_of_another_dtype_or_width_form_another_group() -> None:
    a_frame = frame(segment(0, (2,)), segment(1, (2,), dtype=DType.FP32), segment(2, (1,)), segment(3, (1,), dim=8))
    plan = plan_frame(a_frame, *held(a_frame), waited_s=0.0)
    assert [(group.dtype, group.dim, [piece.position for piece in group.pieces]) for group in plan.groups] == [
        (DType.BF16, 4, [0, 2]),
        (DType.FP32, 4, [1]),
        (DType.BF16, 8, [3]),
    ]
    assert plan.groups[0].ranges == ((0, 16), (48, 56))


def test_expired_runs_are_dropped_and_named_and_the_others_are_computed() -> None:
    a_frame = frame(segment(0, (2, 3, 1), timeouts_ms=(500, 20, 500)))
    plan = plan_frame(a_frame, *held(a_frame), waited_s=0.020)
    (group,) = plan.groups
    assert group.ranges == ((0, 16), (40, 48))
    result, buffers = answer(plan, echo(group, body_of(a_frame)), ME, queue_s=0.02, compute_s=0.0)
    assert result.segments[0].expired_runs == (1,)
    assert result.segments[0].num_rows == 3
    assert sum(map(len, buffers)) == 3 * 8


def test_a_segment_whose_runs_all_expired_costs_no_forward_and_ends_ok_without_rows() -> None:
    a_frame = frame(segment(0, (2,), timeouts_ms=(0,)))
    plan = plan_frame(a_frame, *held(a_frame), waited_s=0.0)
    assert plan.groups == ()
    result, buffers = answer(plan, {}, ME, queue_s=0.0, compute_s=0.0)
    assert (result.segments[0].status, result.segments[0].num_rows, result.segments[0].expired_runs) == (SegmentStatus.OK, 0, (0,))
    assert buffers == ()


def test_cancelled_segments_are_skipped_like_expired_ones() -> None:
    a_frame = frame(segment(0, (2,)), segment(1, (1,)))
    plan = plan_frame(a_frame, *held(a_frame), waited_s=0.0, cancelled={0})
    assert [piece.position for piece in plan.groups[0].pieces] == [1]
    assert plan.expired_runs[0] == (0,)


@pytest.mark.parametrize(("holding", "status"), [(Holding.NOT_HELD, SegmentStatus.NOT_HELD), (Holding.DRAINING, SegmentStatus.DRAINING)])
def test_a_copy_that_cannot_be_used_refuses_its_segment_alone(holding: Holding, status: SegmentStatus) -> None:
    a_frame = frame(segment(0, (2,)), segment(1, (2,)))
    plan = plan_frame(a_frame, [holding, Holding.HELD], [None, descriptor()], waited_s=0.0)
    result, _ = answer(plan, echo(plan.groups[0], body_of(a_frame)), ME, queue_s=0.0, compute_s=0.0)
    assert [item.status for item in result.segments] == [status, SegmentStatus.OK]
    assert result.segments[0].num_rows == 0
    assert "table" in result.segments[0].message or "another" in result.segments[0].message


@pytest.mark.parametrize("wrong", [descriptor(DType.FP32), descriptor(dim=5)])
def test_rows_of_another_dtype_or_width_than_the_expert_takes_are_a_fault_that_names_both(wrong: ExpertDescriptor) -> None:
    a_frame = frame(segment(0, (2,)))
    plan = plan_frame(a_frame, [Holding.HELD], [wrong], waited_s=0.0)
    assert plan.groups == ()
    assert plan.answered[0].status is SegmentStatus.FAULTED
    assert f"takes {wrong.dtype} of width {wrong.hidden_size}" in plan.answered[0].message


def test_another_generation_refuses_the_whole_frame_and_says_which_one_lives_here() -> None:
    result = refuse_frame(frame(segment(0, (1,))), ME)
    assert (result.status, result.generation, result.segments) == (FrameStatus.WRONG_GENERATION, 5, ())


def test_a_frame_that_is_not_taken_answers_every_segment() -> None:
    result = refuse_segments(frame(segment(0, (1,)), segment(1, (2,))), ME, SegmentStatus.OVERLOADED, "full")
    assert [(item.status, item.num_rows) for item in result.segments] == [(SegmentStatus.OVERLOADED, 0)] * 2


def test_halves_cut_between_pieces_near_the_middle_and_keep_every_row() -> None:
    pieces = tuple(Piece(number, ((number * 80, number * 80 + 8 * rows),), rows) for number, rows in enumerate([1, 2, 3, 4]))
    left, right = Group(DType.BF16, 4, pieces).halves()
    assert [piece.position for piece in left.pieces] == [0, 1, 2]
    assert [piece.position for piece in right.pieces] == [3]


def test_a_single_row_cannot_be_cut() -> None:
    assert Group(DType.BF16, 4, (Piece(0, ((0, 8),), 1),)).halves() == ()


def test_a_cut_segment_is_whole_again_only_when_both_parts_are_ok() -> None:
    ok = Outcome(SegmentStatus.OK, (memoryview(b"ab"),))
    more = Outcome(SegmentStatus.OK, (memoryview(b"cd"),))
    bad = Outcome(SegmentStatus.OUT_OF_MEMORY, message="no room")
    assert b"".join(merge_outcomes([{0: ok}, {0: more}])[0].buffers) == b"abcd"
    assert merge_outcomes([{0: ok}, {0: bad}])[0] == bad
    assert merge_outcomes([{0: bad}, {0: ok}])[0] == bad


runs_strategy = st.lists(st.tuples(st.integers(1, 4), st.sampled_from([5, 50])), min_size=1, max_size=4)
segments_strategy = st.lists(st.tuples(runs_strategy, st.sampled_from(list(DType)), st.sampled_from([3, 4])), min_size=1, max_size=6)


@given(shapes=segments_strategy, waited_s=st.sampled_from([0.0, 0.01]), cut=st.booleans())
def test_every_live_row_comes_back_once_and_in_order_however_the_frame_is_cut(
    *, shapes: list[tuple[list[tuple[int, int]], DType, int]], waited_s: float, cut: bool
) -> None:
    a_frame = frame(
        *(
            segment(number, tuple(rows for rows, _ in runs), timeouts_ms=tuple(left for _, left in runs), dtype=dtype, dim=dim)
            for number, (runs, dtype, dim) in enumerate(shapes)
        )
    )
    body = body_of(a_frame)
    plan = plan_frame(a_frame, *held(a_frame), waited_s=waited_s)
    groups = [part for group in plan.groups for part in (cut and group.halves()) or (group,)]
    result, buffers = answer(plan, merge_outcomes(echo(group, body) for group in groups), ME, queue_s=0.0, compute_s=0.0)
    expected, offset = b"", 0
    for item in a_frame.segments:
        for run in item.runs:
            num_bytes = run.num_rows * item.dim * item.dtype.itemsize
            expected += bytes(body[offset : offset + num_bytes]) if run.timeout_ms > waited_s * 1000 else b""
            offset += num_bytes
    assert b"".join(buffers) == expected
    assert result.body_bytes == len(expected)
    header = encode(result)
    assert decode(decode_prefix(header[:20], max_body_bytes=1 << 20), header[20:]) == result


def test_capacity_of_a_gpu_is_its_share_less_what_is_kept_back_and_never_more_than_is_free() -> None:
    gib = 1 << 30
    gpu = MeasuredMemory(free_bytes=70 * gib, total_bytes=80 * gib, is_device=True)
    workspace = 4096 * (128 << 10) + LIBRARIES_BYTES + IDLE_PLACES_BYTES
    assert capacity_bytes(gpu, limit_bytes=None, num_gpus=0.5, max_tokens_per_frame=4096) == 40 * gib - workspace
    assert capacity_bytes(gpu, limit_bytes=None, num_gpus=1.0, max_tokens_per_frame=4096) == 70 * gib - workspace
    assert capacity_bytes(gpu, limit_bytes=100 * gib, num_gpus=0.0, max_tokens_per_frame=4096) == 70 * gib - workspace
    checked = capacity_bytes(gpu, limit_bytes=None, num_gpus=1.0, max_tokens_per_frame=4096, has_checksums=True)
    assert checked * (1 + 1 / 32) <= 70 * gib - workspace
    assert capacity_bytes(gpu, limit_bytes=gib, num_gpus=1.0, max_tokens_per_frame=4096, has_checksums=True) == gib
    assert capacity_bytes(gpu, limit_bytes=gib, num_gpus=0.5, max_tokens_per_frame=4096) == gib
    assert capacity_bytes(gpu, limit_bytes=None, num_gpus=0.5, max_tokens_per_frame=1 << 30) == 0


def test_host_memory_holds_mapped_files_so_a_configured_limit_stands() -> None:
    host = MeasuredMemory(free_bytes=1000, total_bytes=2000, is_device=False)
    assert capacity_bytes(host, limit_bytes=None, num_gpus=0.0, max_tokens_per_frame=4096) == 800
    assert capacity_bytes(host, limit_bytes=5000, num_gpus=0.0, max_tokens_per_frame=4096) == 5000
