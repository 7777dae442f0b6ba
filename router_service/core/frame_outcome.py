"""What an actor's Result says about a Forward: whether it fits at all, and which error each status stands for."""

from __future__ import annotations

from cluster.core.errors import InvalidRequest, MoeError, ReplicaCorrupt, ReplicaFaulted, ReplicaRejected
from cluster.core.link_frames import Forward, FrameStatus, Result, Segment, SegmentResult, SegmentStatus
from cluster.core.link_values import printable

_REJECTED = {
    SegmentStatus.NOT_HELD: "does not hold this copy",
    SegmentStatus.OVERLOADED: "is overloaded",
    SegmentStatus.DRAINING: "is draining",
}
_FAULTED = {
    SegmentStatus.FAULTED: "failed in this expert's forward",
    SegmentStatus.OUT_OF_MEMORY: "ran out of memory in this expert's forward",
}


def check_result(forward: Forward, result: Result) -> None:
    """Raise InvalidRequest for a Result that cannot be the answer to this Forward: its body could not be told apart."""
    if result.status is not FrameStatus.OK or result.generation != forward.generation:
        return
    if len(result.segments) != len(forward.segments):
        message = f"a result has {len(result.segments)} segments where its frame had {len(forward.segments)}"
        raise InvalidRequest(message, field="result.segments")
    for asked, got in zip(forward.segments, result.segments, strict=True):
        if not _fits(asked, got):
            message = f"segment {asked.segment_id} of a result does not have the shape, dtype or attempt of what was asked"
            raise InvalidRequest(message, field="result.segments")


def _fits(asked: Segment, got: SegmentResult) -> bool:
    if (asked.segment_id, asked.attempt) != (got.segment_id, got.attempt):
        return False
    if not got.expired_runs:
        return got.status is not SegmentStatus.OK or (asked.dtype, asked.dim, asked.num_rows) == (got.dtype, got.dim, got.num_rows)
    expired = set(got.expired_runs)
    if max(expired) >= len(asked.runs):
        return False
    if got.status is not SegmentStatus.OK:
        return True
    num_rows = sum(run.num_rows for index, run in enumerate(asked.runs) if index not in expired)
    return (asked.dtype, asked.dim, num_rows) == (got.dtype, got.dim, got.num_rows)


def error_of_frame(forward: Forward, result: Result) -> MoeError | None:
    """Why nothing of this result may be used, or None."""
    if result.status is FrameStatus.OK and result.generation == forward.generation:
        return None
    return ReplicaRejected(f"generation {result.generation} answered where {forward.generation} was asked; the routing table is out of date")


def error_of_segment(segment: SegmentResult) -> MoeError | None:
    """Why a segment has no rows, or None when it has."""
    if segment.status is SegmentStatus.OK:
        return None
    detail = f" ({printable(segment.message)})" if segment.message else ""
    if segment.status in _REJECTED:
        return ReplicaRejected(f"the actor {_REJECTED[segment.status]}{detail}")
    if segment.status is SegmentStatus.WRONG_NUMBERS:
        return ReplicaCorrupt(f"the actor found its own numbers wrong{detail}")
    return ReplicaFaulted(f"the actor {_FAULTED[segment.status]}{detail}")
