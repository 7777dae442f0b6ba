"""One request's rows on their way to experts: whom to ask, whom to ask instead, whose answer counts. Sans-io: events in, orders out.

Each part (one expert's rows) ends exactly once: answered by the first success, or lost when no copy is left to ask. An error never beats a slow
success: while another try of the same part is under way, a failed one is not replaced. No copy is asked twice, tries are numbered and bounded, and
what a try that was withdrawn still brings is told apart by its number (the attempt) and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.core.routing_table import TableCopy
from router_service.core.dispatch import ExpertRows

MAX_ATTEMPTS = 8
Pick = Callable[[int, Sequence[TableCopy]], TableCopy | None]
Charge = Callable[[int, TableCopy], bool]


class Why(StrEnum):
    """What a try is for. Only hedges are charged to the hedge budget."""

    FIRST = "first"
    FAILOVER = "failover"
    HEDGE = "hedge"


@dataclass(slots=True, eq=False)
class Send:
    """Order: ask this copy for the rows of part `part`."""

    part: int
    copy: TableCopy
    attempt: int
    why: Why


@dataclass(slots=True, eq=False)
class Part:
    """One expert's rows: the copies asked so far, in the order of their attempts, and those that may still answer (by attempt)."""

    rows: ExpertRows
    tried: list[TableCopy] = field(default_factory=list)
    live: dict[int, TableCopy] = field(default_factory=dict)
    is_answered: bool = False
    lost: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether it was answered, or nobody is left to ask."""
        return self.is_answered or bool(self.lost)


class Flight:
    """The parts of one request. `pick(index, tried)` names the next copy of an expert to ask, never one of `tried`; None when there is none."""

    def __init__(self, experts: Sequence[ExpertRows], pick: Pick, *, kind: str = "copies") -> None:
        """`kind` is how messages call what may answer."""
        self.parts = [Part(rows) for rows in experts]
        self._pick = pick
        self._kind = kind
        self._num_open = len(self.parts)

    @property
    def has_ended(self) -> bool:
        """Whether every part has."""
        return self._num_open == 0

    @property
    def lost(self) -> dict[int, str]:
        """Why, by expert index, for each part that nobody answered."""
        return {part.rows.index: part.lost for part in self.parts if part.lost}

    def begin(self) -> list[Send]:
        """The first try of every part that has a copy; the others are lost."""
        orders = [self._next(number, Why.FIRST) for number in range(len(self.parts))]
        return [order for order in orders if order is not None]

    def answered(self, number: int, attempt: int) -> list[int] | None:
        """A success. Gives the attempts that nobody waits for any more, or None when this one is too late: its rows must not be used."""
        part = self.parts[number]
        if part.has_ended or part.live.pop(attempt, None) is None:
            return None
        losers = list(part.live)
        part.live.clear()
        part.is_answered = True
        self._num_open -= 1
        return losers

    def failed(self, number: int, attempt: int, reason: str) -> Send | None:
        """A try brought nothing. Gives the next one, unless another is under way or nobody is left. Late failures mean nothing."""
        part = self.parts[number]
        if part.has_ended or part.live.pop(attempt, None) is None or part.live:
            return None
        order = self._next(number, Why.FAILOVER)
        if order is None:
            part.lost += f"; the last one: {reason}"
        return order

    def can_hedge(self, number: int) -> bool:
        """Whether this part waits for one try alone, and may have another."""
        part = self.parts[number]
        return not part.has_ended and len(part.live) == 1 and len(part.tried) < MAX_ATTEMPTS

    def hedge(self, number: int, charge: Charge = lambda _, __: True) -> Send | None:
        """Ask another copy as well, because the first is late.

        None when no other actor has one, or `charge(number of rows, copy)` refuses; the first is waited for then.
        """
        if not self.can_hedge(number):
            return None
        part = self.parts[number]
        copy = self._pick(part.rows.index, part.tried)
        if copy is None or any(copy.incarnation == other.incarnation for other in part.live.values()) or not charge(part.rows.num_rows, copy):
            return None
        return self._send(number, copy, Why.HEDGE)

    def withdraw_all(self) -> list[tuple[int, int]]:
        """End without answers: (part, attempt) of every try under way."""
        live = [(number, attempt) for number, part in enumerate(self.parts) for attempt in part.live]
        for part in self.parts:
            part.live.clear()
        return live

    def _next(self, number: int, why: Why) -> Send | None:
        part = self.parts[number]
        copy = self._pick(part.rows.index, part.tried) if len(part.tried) < MAX_ATTEMPTS else None
        if copy is None:
            part.lost = f"none of its {len(part.tried)} {self._kind} answered" if part.tried else f"it has no {self._kind}"
            self._num_open -= 1
            return None
        return self._send(number, copy, why)

    def _send(self, number: int, copy: TableCopy, why: Why) -> Send:
        part = self.parts[number]
        attempt = len(part.tried)
        part.tried.append(copy)
        part.live[attempt] = copy
        return Send(number, copy, attempt, why)
