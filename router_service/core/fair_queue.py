"""Rows that wait for a frame, taken fairly: deficit round robin over flows (Shreedhar and Varghese 1996), by rows, in order inside a flow.

A short span goes into one frame whole; only a span longer than a turn's quantum is cut. So small requests come back in one piece, and a large
one cannot keep them waiting for longer than one turn of each flow before them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from cluster.core.descriptors import DType
from cluster.core.ids import ExpertId, Role


class SegmentKey(NamedTuple):
    """What rows must have in common to share a segment. `version` is the raw digest; `alone` the run's own number when it may share with nobody."""

    expert: ExpertId
    version: bytes
    role: Role
    dtype: DType
    dim: int
    attempt: int
    alone: int = 0


@dataclass(slots=True, eq=False)
class Span:
    """Rows [start, stop) of a run that no frame holds yet."""

    run_id: int
    flow: Hashable
    key: SegmentKey
    start: int
    stop: int
    row_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.row_bytes = self.key.dim * self.key.dtype.itemsize

    @property
    def num_rows(self) -> int:
        """Rows that wait."""
        return self.stop - self.start


class Frame(Protocol):
    """What is being filled."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in it yet."""
        ...

    def room(self, span: Span) -> int:
        """How many rows of this span still fit."""
        ...

    def add(self, span: Span, num_rows: int) -> None:
        """Take the first rows of a span."""
        ...


@dataclass(slots=True)
class _Flow:
    deficit: int
    spans: OrderedDict[Span, None] = field(default_factory=OrderedDict)


class FairQueue:
    """Spans by flow. `quantum` rows are a flow's turn."""

    def __init__(self, quantum: int) -> None:
        self.quantum = quantum
        self._flows: OrderedDict[Hashable, _Flow] = OrderedDict()
        self.num_rows = 0

    def push(self, span: Span) -> None:
        """Add a span behind the others of its flow."""
        flow = self._flows.get(span.flow)
        if flow is None:
            flow = self._flows[span.flow] = _Flow(self.quantum)
        flow.spans[span] = None
        self.num_rows += span.num_rows

    def rows_before(self, num_rows: int) -> int:
        """At most how many rows leave before the last of so many new ones of a flow that has none here: every other flow has as many turns."""
        turns = -(-num_rows // self.quantum)
        return min(self.num_rows, turns * self.quantum * len(self._flows))

    def remove(self, span: Span) -> None:
        """Take a span out that is still here; what frames already hold of it stays there."""
        entry = self._flows[span.flow]
        del entry.spans[span]
        self.num_rows -= span.num_rows
        if not entry.spans:
            del self._flows[span.flow]

    def fill(self, frame: Frame) -> list[Span]:
        """Move rows into a frame until it is full or nothing waits. Gives the spans that were taken whole and are gone from here."""
        ended: list[Span] = []
        while self._flows:
            flow = next(iter(self._flows))
            is_full = self._serve(self._flows[flow], frame, ended)
            if not self._flows[flow].spans:
                del self._flows[flow]
            elif is_full:
                break
            else:
                self._flows[flow].deficit += self.quantum
                self._flows.move_to_end(flow)
        return ended

    def _serve(self, flow: _Flow, frame: Frame, ended: list[Span]) -> bool:
        """Give a flow its turn. True when the frame is full; the flow then stays first."""
        spans = flow.spans
        while spans:
            span = next(iter(spans))
            num_rows, room = span.stop - span.start, frame.room(span)
            is_short = num_rows <= self.quantum
            if room == 0 or (is_short and room < num_rows and not frame.is_empty):
                return True
            if flow.deficit < (num_rows if is_short else 1):
                return False
            count = min(num_rows, room, flow.deficit)
            frame.add(span, count)
            span.start += count
            flow.deficit -= count
            self.num_rows -= count
            if count == num_rows:
                del spans[span]
                ended.append(span)
        return False
