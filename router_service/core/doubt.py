"""Whose fault a non-finite answer to finite rows is: the copy's, or the rows' own. Sans-io: answers in, the next question or a verdict out.

Another full-precision copy is the witness: a row that is finite there and not with the accused copy blames the latter; the same rows not finite with
both overflow healthy weights and nobody is to blame. A witness that fails on further rows tells nothing: the next one is asked. Without a witness the
accused copy is asked for a golden row, which healthy weights answer with finite numbers. That clears the copy as it is now, not as it was when it gave
its answer: it may have erred once, or have been loaded anew since. So only rows that it cannot do a second time either overflow. A shadow never testifies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cluster.core.descriptors import DType
from cluster.core.routing_table import TableCopy

MAX_WITNESSES = 4
_NUMPY = {DType.BF16: np.dtype(ml_dtypes.bfloat16), DType.FP16: np.dtype(np.float16), DType.FP32: np.dtype(np.float32)}
NextFull = Callable[[Sequence[TableCopy]], TableCopy | None]


@dataclass(frozen=True, slots=True)
class Question:
    """Ask this copy; for the golden row, or for the rows in doubt."""

    copy: TableCopy
    is_golden: bool


class Verdict(Enum):
    """What came out. `BLAMED`: the accused copy; the witness's answer, where there is one, goes before its. `OVERFLOW`: the rows. `OPEN`: nobody could tell."""

    BLAMED = auto()
    OVERFLOW = auto()
    OPEN = auto()


class Doubt:
    """One part's doubt: rows `bad` of the accused copy's answer are not finite. `next_full(asked)` names another full-precision copy; None: no more."""

    def __init__(self, accused: TableCopy, bad: Iterable[int], next_full: NextFull) -> None:
        self._accused = accused
        self._bad = frozenset(bad)
        self._next_full = next_full
        self._asked = [accused]
        self._is_golden = False
        self._is_second_look = False

    def begin(self) -> Question:
        """The first question."""
        return self._question()

    def answered(self, bad: Iterable[int]) -> Question | Verdict:
        """What the answer to the last question means, whose rows `bad` are not finite."""
        witnessed = frozenset(bad)
        if self._is_second_look:
            return Verdict.OVERFLOW if self._bad <= witnessed else Verdict.OPEN
        if self._is_golden:
            self._is_second_look = True
            return Verdict.BLAMED if witnessed else Question(self._accused, is_golden=False)
        if self._bad - witnessed:
            return Verdict.BLAMED
        return Verdict.OVERFLOW if witnessed == self._bad else self._question()

    def unanswered(self) -> Question | Verdict:
        """The last one asked did not answer: ask another, or give up."""
        return Verdict.OPEN if self._is_golden else self._question()

    def _question(self) -> Question:
        witness = self._next_full(self._asked) if len(self._asked) <= MAX_WITNESSES else None
        if witness is None:
            self._is_golden = True
            return Question(self._accused, is_golden=True)
        self._asked.append(witness)
        return Question(witness, is_golden=False)


def golden_row(width: int, dtype: DType) -> NDArray[np.uint8]:
    """One row of unit scale, always the same, as bytes [1, row_bytes]."""
    return np.random.default_rng(0).standard_normal((1, width)).astype(_NUMPY[dtype]).view(np.uint8)


def bad_rows(rows_NB: NDArray[np.uint8], dtype: DType) -> NDArray[np.intp]:
    """Rows (bytes [N, row_bytes]) that are not finite."""
    values = np.ascontiguousarray(rows_NB).view(_NUMPY[dtype])
    return np.flatnonzero(~np.isfinite(values.astype(np.float32)).all(axis=1))
