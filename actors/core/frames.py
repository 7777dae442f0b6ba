"""What becomes of a frame: which segments are refused, which runs expired, what is computed together, and the Result that says so.

Pure data about bytes: the tensors themselves are handled by `actors.frame_forward`. The values are named tuples: every frame makes some, and a frozen
dataclass takes twice as long to make.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from typing import NamedTuple

from actors.core.slots import Holding
from cluster.core.descriptors import DType, ExpertDescriptor
from cluster.core.ids import CopyId, ExpertId, Incarnation
from cluster.core.link_frames import Forward, FrameStatus, Result, Segment, SegmentResult, SegmentStatus

ByteRange = tuple[int, int]
Buffers = tuple[memoryview, ...]


class Piece(NamedTuple):
    """Rows of one segment that are computed together: byte ranges [start, stop) of the frame's body, each a whole number of rows."""

    position: int
    ranges: tuple[ByteRange, ...]
    num_rows: int


class Group(NamedTuple):
    """Pieces alike in dtype and width: one grouped forward."""

    dtype: DType
    dim: int
    pieces: tuple[Piece, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dim * self.dtype.itemsize

    @property
    def num_rows(self) -> int:
        """Rows over all pieces."""
        return sum([piece.num_rows for piece in self.pieces])

    @property
    def ranges(self) -> tuple[ByteRange, ...]:
        """The group's rows in the body; neighbours are joined, so that rows which lie together are taken without a copy."""
        return tuple(_join([byte_range for piece in self.pieces for byte_range in piece.ranges]))

    def singles(self) -> tuple[Group, ...]:
        """Each piece as a group of its own."""
        return tuple(Group(self.dtype, self.dim, (piece,)) for piece in self.pieces)

    def halves(self) -> tuple[Group, ...]:
        """Two groups of about half the rows, cut between pieces, or through the only one; nothing when a single row is left."""
        if len(self.pieces) == 1:
            parts: list[tuple[Piece, ...]] = [(piece,) for piece in _cut(self.pieces[0], self.row_bytes)]
        else:
            middle = _middle([piece.num_rows for piece in self.pieces])
            parts = [self.pieces[:middle], self.pieces[middle:]]
        return tuple(Group(self.dtype, self.dim, part) for part in parts) if len(parts) > 1 else ()


class Outcome(NamedTuple):
    """How one segment ended: with OK, `buffers` hold its rows in order."""

    status: SegmentStatus
    buffers: Buffers = ()
    message: str = ""


class FramePlan(NamedTuple):
    """What to compute of a frame; the other segments are answered already. Positions count the frame's segments."""

    frame: Forward
    groups: tuple[Group, ...]
    answered: Mapping[int, Outcome]
    expired_runs: Mapping[int, tuple[int, ...]]


def copy_of(segment: Segment) -> CopyId:
    """The copy that a segment asks for."""
    return CopyId(ExpertId(segment.model, segment.layer, segment.index), segment.version.hex(), segment.role)


def plan_frame(
    frame: Forward,
    holdings: Sequence[Holding],
    descriptors: Sequence[ExpertDescriptor | None],
    *,
    waited_s: float,
    cancelled: Container[int] = (),
) -> FramePlan:
    """Decide about every segment of a frame that waited `waited_s` since it arrived; `cancelled` holds segment ids nobody waits for.

    `holdings` and `descriptors` follow the frame's segments; a descriptor is None for a copy that is not held.
    """
    answered: dict[int, Outcome] = {}
    expired: dict[int, tuple[int, ...]] = {}
    pieces: dict[tuple[DType, int], list[Piece]] = {}
    offset = 0
    for position, (segment, holding, descriptor) in enumerate(zip(frame.segments, holdings, descriptors, strict=True)):
        expired[position] = dropped = _dropped(segment, waited_s, is_cancelled=segment.segment_id in cancelled)
        refusal = _refusal(segment, holding, descriptor)
        num_rows = segment.num_rows
        stop = offset + num_rows * segment.dim * segment.dtype.itemsize
        piece = _piece(segment, position, offset, dropped) if dropped else Piece(position, ((offset, stop),), num_rows)
        offset = stop
        if refusal is not None:
            answered[position] = refusal
        elif piece.num_rows == 0:
            answered[position] = Outcome(SegmentStatus.OK)
        else:
            pieces.setdefault((segment.dtype, segment.dim), []).append(piece)
    groups = tuple(Group(dtype, dim, tuple(found)) for (dtype, dim), found in pieces.items())
    return FramePlan(frame, groups, answered, expired)


def apart(plan: FramePlan, positions: Collection[int]) -> tuple[FramePlan, dict[int, FramePlan]]:
    """A plan without the segments of these positions, and a plan for each of those that has something to compute."""
    others: list[Group] = []
    alone: dict[int, FramePlan] = {}
    for group in plan.groups:
        rest = tuple(piece for piece in group.pieces if piece.position not in positions)
        others += [group._replace(pieces=rest)] if rest else []
        alone.update({piece.position: plan._replace(groups=(group._replace(pieces=(piece,)),)) for piece in group.pieces if piece.position in positions})
    return plan._replace(groups=tuple(others)), alone


def answer(plan: FramePlan, outcomes: Mapping[int, Outcome], incarnation: Incarnation, *, queue_s: float, compute_s: float) -> tuple[Result, Buffers]:
    """The Result of a planned frame and its body: the buffers of every OK segment in the frame's order."""
    ended = {**plan.answered, **outcomes}
    results: list[SegmentResult] = []
    body: list[memoryview] = []
    for position, segment in enumerate(plan.frame.segments):
        outcome = ended[position]
        results.append(_result(segment, outcome, plan.expired_runs.get(position, ())))
        if outcome.status is SegmentStatus.OK:
            body.extend(outcome.buffers)
    result = Result(plan.frame.frame_id, incarnation.generation, FrameStatus.OK, queue_s, compute_s, tuple(results))
    return result, tuple(body)


def refuse_frame(frame: Forward, incarnation: Incarnation) -> Result:
    """The answer to a frame that was meant for another life of this actor."""
    return Result(frame.frame_id, incarnation.generation, FrameStatus.WRONG_GENERATION, 0.0, 0.0, ())


def refuse_segments(frame: Forward, incarnation: Incarnation, status: SegmentStatus, message: str) -> Result:
    """The answer to a frame of which nothing is computed."""
    results = tuple(_result(segment, Outcome(status, message=message), ()) for segment in frame.segments)
    return Result(frame.frame_id, incarnation.generation, FrameStatus.OK, 0.0, 0.0, results)


def merge_outcomes(parts: Iterable[Mapping[int, Outcome]]) -> dict[int, Outcome]:
    """Outcomes of parts that were computed apart. A segment that was cut is OK only when each of its parts is; its rows follow one another."""
    merged: dict[int, Outcome] = {}
    for part in parts:
        for position, outcome in part.items():
            before = merged.get(position)
            if before is None or (before.status is SegmentStatus.OK and outcome.status is not SegmentStatus.OK):
                merged[position] = outcome
            elif before.status is SegmentStatus.OK:
                merged[position] = Outcome(SegmentStatus.OK, before.buffers + outcome.buffers)
    return merged


def _dropped(segment: Segment, waited_s: float, *, is_cancelled: bool) -> tuple[int, ...]:
    """The runs that nobody waits for any more."""
    if is_cancelled:
        return tuple(range(len(segment.runs)))
    waited_ms = waited_s * 1000.0
    return tuple([number for number, run in enumerate(segment.runs) if waited_ms >= run.timeout_ms])


def _refusal(segment: Segment, holding: Holding, descriptor: ExpertDescriptor | None) -> Outcome | None:
    if holding is Holding.DRAINING:
        return Outcome(SegmentStatus.DRAINING, message="the copy is being drained; use another one")
    if holding is Holding.NOT_HELD or descriptor is None:
        return Outcome(SegmentStatus.NOT_HELD, message="this actor does not hold that version of the expert; re-read the routing table")
    if segment.dtype is not descriptor.dtype or segment.dim != descriptor.hidden_size:
        message = f"segment rows are {segment.dtype} of width {segment.dim}; the expert takes {descriptor.dtype} of width {descriptor.hidden_size}"
        return Outcome(SegmentStatus.FAULTED, message=message)
    return None


def _piece(segment: Segment, position: int, offset: int, dropped: Container[int]) -> Piece:
    row_bytes = segment.dim * segment.dtype.itemsize
    ranges: list[ByteRange] = []
    num_rows = 0
    for number, run in enumerate(segment.runs):
        stop = offset + run.num_rows * row_bytes
        if number not in dropped and run.num_rows > 0:
            ranges.append((offset, stop))
            num_rows += run.num_rows
        offset = stop
    return Piece(position, tuple(_join(ranges)), num_rows)


def _join(ranges: Sequence[ByteRange]) -> list[ByteRange]:
    joined: list[ByteRange] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _middle(rows: Sequence[int]) -> int:
    """Where to cut a list of at least two row counts, so that both sides hold about half and neither is empty."""
    total, before = sum(rows), 0
    for index, count in enumerate(rows[:-1], start=1):
        before += count
        if 2 * before >= total:
            return index
    return len(rows) - 1


def _cut(piece: Piece, row_bytes: int) -> list[Piece]:
    wanted = piece.num_rows // 2
    if wanted == 0:
        return [piece]
    head: list[ByteRange] = []
    tail: list[ByteRange] = []
    left_bytes = wanted * row_bytes
    for start, stop in piece.ranges:
        middle = min(start + left_bytes, stop)
        left_bytes -= middle - start
        head.extend([(start, middle)] if middle > start else [])
        tail.extend([(middle, stop)] if stop > middle else [])
    return [Piece(piece.position, tuple(head), wanted), Piece(piece.position, tuple(tail), piece.num_rows - wanted)]


def _result(segment: Segment, outcome: Outcome, expired_runs: tuple[int, ...]) -> SegmentResult:
    num_rows = 0
    if outcome.status is SegmentStatus.OK:
        num_rows = segment.num_rows - sum([segment.runs[number].num_rows for number in expired_runs])
    return SegmentResult(segment.segment_id, segment.attempt, outcome.status, segment.dtype, segment.dim, num_rows, expired_runs, outcome.message)
