"""How long the actors of one node were silent of late, and alive after all: on a machine that is short of cores silence says less. Sans-io.

After accrual failure detectors (Hayashibara et al. 2004), which judge a silence by those that were seen before, without their distribution: what is kept
is the longest, and it fades.
"""

from __future__ import annotations

import math
from typing import Final

HALF_LIFE_S: Final = 10.0
# A silence is unusual when it lasts for so many times as long as the longest of late.
FACTOR: Final = 2.0


class Hush:
    """The silences of one node that ended with a sign of life. Times are of the observer's own clock."""

    __slots__ = ("__weakref__", "_at_s", "_longest_s")

    def __init__(self) -> None:
        self._longest_s = 0.0
        self._at_s = 0.0

    def learn(self, lasted_s: float, clock_s: float) -> None:
        """One that owed an answer was heard again after so long."""
        if lasted_s > self._faded_s(clock_s):
            self._longest_s, self._at_s = lasted_s, clock_s

    def patience_s(self, least_s: float, most_s: float, clock_s: float) -> float:
        """How long a silence may last before it is unusual here: at least so long, and beyond that at most so long."""
        return max(least_s, min(FACTOR * self._faded_s(clock_s), most_s))

    def _faded_s(self, clock_s: float) -> float:
        return self._longest_s * math.exp2(-max(0.0, clock_s - self._at_s) / HALF_LIFE_S)
