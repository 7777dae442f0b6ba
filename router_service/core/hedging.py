"""When rows are late enough to be sent to another copy as well, and how many may be. Sans-io.

`Lateness` learns how long segments take, by their size; rows later than a high quantile of their like are hedged. `HedgeBudget` keeps hedges a small
share of all rows, so that a slow cluster is not made slower. Rows that are sent again because their actor is lost are no hedges: they are counted, not
charged.
"""

from __future__ import annotations

import math

_STEPS_PER_DOUBLING = 4
_SHORTEST_S = 2.0**-14
_NUM_STEPS = 24 * _STEPS_PER_DOUBLING
_NUM_SIZES = 24
_MIN_SAMPLES = 32
# Half of what was seen fades in so long, but never to so few that the quantile is anybody's guess: seconds after a spell of slowness (an overload, a
# fault) rows are late again when they are late for what is usual now.
_HALF_LIFE_S = 2.0
_MIN_FADING = 256.0
_REFRESH = 16
_MOST_LATE = 2.0


class HedgeBudget:
    """A token bucket in rows, filled by a share of the rows asked for; it begins full.

    `amplification` is rows sent over rows asked, hedges and re-sends included.
    """

    def __init__(self, fraction: float, burst_rows: float) -> None:
        self._fraction = fraction
        self._burst_rows = burst_rows
        self._tokens = burst_rows
        self.asked_rows = 0
        self.hedged_rows = 0
        self.resent_rows = 0
        self.refused_rows = 0

    @property
    def amplification(self) -> float:
        """Rows sent for each row asked; 1 before any."""
        return (self.asked_rows + self.hedged_rows + self.resent_rows) / self.asked_rows if self.asked_rows else 1.0

    @property
    def available_rows(self) -> float:
        """Rows that may be hedged now."""
        return self._tokens

    def set_burst(self, burst_rows: float) -> None:
        """The number of actors or their windows changed (two windows of each). What the bucket has gained in size, it has gained in rows."""
        self._tokens = min(burst_rows, self._tokens + max(0.0, burst_rows - self._burst_rows))
        self._burst_rows = burst_rows

    def asked(self, num_rows: int) -> None:
        """Rows were sent for the first time."""
        self.asked_rows += num_rows
        self._tokens = min(self._burst_rows, self._tokens + self._fraction * num_rows)

    def take(self, num_rows: int) -> bool:
        """Whether so many rows may be hedged; if so they are charged."""
        if self._fraction <= 0.0 or num_rows > self._tokens:
            self.refused_rows += num_rows
            return False
        self._tokens -= num_rows
        self.hedged_rows += num_rows
        return True

    def resent(self, num_rows: int) -> None:
        """Rows were sent again: their actor was lost, was ejected or failed, the wave that they were in failed, or their answer is in doubt."""
        self.resent_rows += num_rows


class Lateness:
    """How long segments take, by the power of two above their rows: histograms in quarter doublings, in which old samples fade by half at a time.

    Time arrives with the samples: what is not asked is not forgotten.

    Attempts that were withdrawn because another one won must be observed too, with the time they had been under way: else only the fast are seen and
    ever more is hedged.
    """

    def __init__(self, quantile: float, min_delay_s: float, *, unlearned_s: float = 0.1, unlearned_s_per_row: float = 0.001) -> None:
        self._quantile = quantile
        self.min_delay_s = min_delay_s
        self._unlearned_s = unlearned_s
        self._unlearned_s_per_row = unlearned_s_per_row
        self._counts = [[0.0] * _NUM_STEPS for _ in range(_NUM_SIZES)]
        self._totals = [0.0] * _NUM_SIZES
        self._fading_s = [-math.inf] * _NUM_SIZES
        self._unread = [0] * _NUM_SIZES
        self._quantiles_s = [0.0] * _NUM_SIZES

    def observe(self, num_rows: int, took_s: float, now_s: float) -> None:
        """A segment of so many rows took so long, or was withdrawn after so long.

        It counts for no more than a multiple of what is late: a few rows that a lost actor held do not excuse the next one, many that are slow still do.
        """
        size = _size(num_rows)
        if now_s >= self._fading_s[size]:
            self._fade(size, now_s)
        if (learned_s := self._quantiles_s[size]) > 0.0:
            took_s = min(took_s, _MOST_LATE * max(learned_s, self.min_delay_s))
        self._counts[size][_step(took_s)] += 1.0
        self._totals[size] += 1.0
        self._unread[size] += 1
        if self._unread[size] >= _REFRESH and self._totals[size] >= _MIN_SAMPLES:
            self._refresh(size)

    def delay_s(self, num_rows: int) -> float:
        """After how long so many rows are late."""
        size = _size(num_rows)
        learned_s = self._quantiles_s[size]
        return max(self.min_delay_s, learned_s if learned_s > 0.0 else self._guess_s(size, num_rows))

    def _guess_s(self, size: int, num_rows: int) -> float:
        """From the next larger size that is known, which takes no less; else the next smaller, in proportion to the rows; else cautiously."""
        for larger in range(size + 1, _NUM_SIZES):
            if self._quantiles_s[larger] > 0.0:
                return self._quantiles_s[larger]
        for smaller in range(size - 1, -1, -1):
            if self._quantiles_s[smaller] > 0.0:
                return self._quantiles_s[smaller] * 2.0 ** (size - smaller)
        return self._unlearned_s + self._unlearned_s_per_row * num_rows

    def _fade(self, size: int, now_s: float) -> None:
        self._fading_s[size] = now_s + _HALF_LIFE_S
        if self._totals[size] >= _MIN_FADING:
            self._counts[size] = [count / 2 for count in self._counts[size]]
            self._totals[size] /= 2

    def _refresh(self, size: int) -> None:
        self._unread[size] = 0
        left = self._totals[size] * (1.0 - self._quantile)
        step = _NUM_STEPS - 1
        while step > 0 and (left := left - self._counts[size][step]) >= 0.0:
            step -= 1
        self._quantiles_s[size] = _SHORTEST_S * 2.0 ** ((step + 1) / _STEPS_PER_DOUBLING)


def _size(num_rows: int) -> int:
    return min(_NUM_SIZES - 1, max(0, num_rows - 1).bit_length())


def _step(took_s: float) -> int:
    if took_s <= _SHORTEST_S:
        return 0
    return min(_NUM_STEPS - 1, int(math.log2(took_s / _SHORTEST_S) * _STEPS_PER_DOUBLING))
