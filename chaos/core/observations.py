"""What one repetition observed, as plain values: each request as its sender saw it, what the router said of itself, the moments of faults.

All times are seconds on the machine's monotonic clock, which every process of it shares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.core.ids import ExpertId, Incarnation

OUTCOMES = ("exact", "shadow", "omitted", "generalist", "dense", "dropped", "unused")
OK = "OK"


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `due_s` is when it was to be sent: latency counts from there, so that a stalled sender hides nothing.

    `status` is OK or the error's name. `outcomes` count its choices, in the order of OUTCOMES. `answer` is empty when the reply equals the known
    answer bit for bit, else the name of the kept reply, which is to be replayed. `moved` are the experts that a later attempt, or no replica, answered for;
    `num_extra_rows` counts the attempts before the ones that succeeded.
    """

    number: int
    due_s: float
    sent_s: float
    end_s: float
    status: str
    epoch: int = 0
    outcomes: tuple[int, ...] = ()
    moved: tuple[int, ...] = ()
    num_extra_rows: int = 0
    generations: tuple[int, ...] = ()
    answer: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether it was answered."""
        return self.status == OK

    @property
    def is_exact(self) -> bool:
        """Answered, every choice at full precision."""
        return self.is_ok and self.outcomes[0] + self.outcomes[-1] == sum(self.outcomes)

    @property
    def took_s(self) -> float:
        """From when it was due to its end."""
        return self.end_s - self.due_s

    def is_alive_within(self, begin_s: float, end_s: float) -> bool:
        """Whether any part of its life lies in there."""
        return self.due_s <= end_s and self.end_s >= begin_s

    def as_list(self) -> list[Any]:
        """For a line of JSON."""
        return [getattr(self, name) for name in self.__slots__]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> Request:
        """Read what `as_list` gave."""
        number, due_s, sent_s, end_s, status, epoch, outcomes, moved, num_extra_rows, generations, answer = values
        return cls(number, due_s, sent_s, end_s, status, epoch, tuple(outcomes), tuple(moved), num_extra_rows, tuple(generations), answer)


@dataclass(frozen=True, slots=True)
class RouterSample:
    """What the router said of itself at one moment. `links` is the state of each link; `copies` the table's, where it was asked for."""

    at_s: float
    epoch: int
    links: dict[Incarnation, str]
    replicas: dict[ExpertId, frozenset[Incarnation]]
    shadows: dict[ExpertId, frozenset[Incarnation]]


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault as it happened: whom it struck, when it was there, when it was seen to be gone. `experts`: only these copies; empty: whole actors."""

    fault: str
    target: str
    incarnations: frozenset[Incarnation]
    at_s: float
    gone_s: float | None = None
    is_mended: bool = False
    experts: frozenset[ExpertId] = frozenset()
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Observations:
    """Everything about one repetition. The control window is [control_s, begun_s): the same load before the fault."""

    control_s: float
    begun_s: float
    end_s: float
    requests: tuple[Request, ...]
    samples: tuple[RouterSample, ...]
    strikes: tuple[Strike, ...]
    wanted_replicas: dict[ExpertId, int]
    choices_per_request: int
    timeout_s: float
    affected_s: float
    wrong_answers: frozenset[str] = frozenset()
    unchecked_answers: frozenset[str] = frozenset()
    counts: dict[str, float] = field(default_factory=dict)
    whole_again_s: float | None = None

    @property
    def fault_s(self) -> float:
        """When the first fault was there; in a control run, the middle of it."""
        return min((strike.at_s for strike in self.strikes), default=(self.begun_s + self.end_s) / 2)

    def within(self, begin_s: float, end_s: float) -> list[Request]:
        """Requests that were alive in there."""
        return [request for request in self.requests if request.is_alive_within(begin_s, end_s)]


def quantile(values: Iterable[float], share: float) -> float | None:
    """The smallest value that at least `share` of them do not exceed; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]
