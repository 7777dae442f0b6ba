"""A frame while it is being filled: rows by segment, within the actor's limits of rows and bytes and the header's limit of runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from router_service.core.fair_queue import SegmentKey, Span

MAX_PIECES = 2048


class Piece(NamedTuple):
    """Rows [start, stop) of a run, in a frame."""

    run_id: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Rows of the run that this frame holds."""
        return self.stop - self.start


class FrameDraft:
    """Collects rows, `num_bytes` of them so far. What a run adds to a segment in several turns stays one piece."""

    def __init__(self, *, max_tokens: int, max_bytes: int) -> None:
        self.num_bytes = 0
        self._tokens_left = max_tokens
        self._bytes_left = max_bytes
        self._groups: dict[SegmentKey, dict[Span, Piece]] = {}
        self._num_pieces = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in it yet."""
        return not self._num_pieces

    def room(self, span: Span) -> int:
        """How many rows of this span still fit."""
        group = self._groups.get(span.key)
        if self._num_pieces >= MAX_PIECES and (group is None or span not in group):
            return 0
        return min(self._tokens_left, self._bytes_left // span.row_bytes)

    def add(self, span: Span, num_rows: int) -> None:
        """Take the first rows of a span; they must fit."""
        group = self._groups.setdefault(span.key, {})
        piece = group.get(span)
        if piece is None:
            self._num_pieces += 1
        start = span.start if piece is None else piece.start
        group[span] = Piece(span.run_id, start, span.start + num_rows)
        self._tokens_left -= num_rows
        self._bytes_left -= num_rows * span.row_bytes
        self.num_bytes += num_rows * span.row_bytes

    def segments(self) -> Sequence[tuple[SegmentKey, tuple[Piece, ...]]]:
        """What was collected, copy by copy in the order of their first rows."""
        return [(key, tuple(group.values())) for key, group in self._groups.items()]
