"""Dispatch: which rows go to which expert, in which order, and where each answer will lie. The value joins dispatch and combine.

Shape legend: T tokens, K choices of a token, N choices that somebody computes (N <= T x K).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NOWHERE = -1
_FEW_CHOICES = 64


class ExpertRows(NamedTuple):
    """One expert's rows of one request: `start` to `stop` of the sorted order."""

    index: int  # type: ignore[assignment]  # (in the place of tuple.index)
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """How many."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class DispatchOrder:
    """`rows_N`: the token of each dispatched row, by (expert, token); `place_TK`: where a choice's answer lies among the N, -1 where there is none."""

    experts: tuple[ExpertRows, ...]
    rows_N: NDArray[np.intp]
    place_TK: NDArray[np.intp]


def order_choices(ids_TK: NDArray[np.int32]) -> DispatchOrder:
    """Sort the choices [T, K] by (expert, token); -1 is computed by nobody."""
    if ids_TK.size <= _FEW_CHOICES:
        return _order_few(ids_TK)
    top_k = ids_TK.shape[1]
    flat = ids_TK.ravel()
    order = np.argsort(flat, kind="stable")
    used = order[np.searchsorted(flat[order], 0) :]
    place = np.full(flat.size, NOWHERE, np.intp)
    place[used] = np.arange(used.size)
    sorted_ids = flat[used]
    changes = np.flatnonzero(sorted_ids[1:] != sorted_ids[:-1]) + 1
    starts = [0, *changes.tolist()] if used.size else []
    experts = tuple(map(ExpertRows, sorted_ids[starts].tolist(), starts, [*starts[1:], used.size]))
    return DispatchOrder(experts, used // top_k, place.reshape(ids_TK.shape))


def _order_few(ids_TK: NDArray[np.int32]) -> DispatchOrder:
    """The same for few choices, for which a dozen calls of numpy cost more than the work."""
    top_k = ids_TK.shape[1]
    choices: dict[int, list[int]] = {}
    for choice, index in enumerate(ids_TK.ravel().tolist()):
        choices.setdefault(index, []).append(choice)
    choices.pop(NOWHERE, None)
    rows: list[int] = []
    place = [NOWHERE] * ids_TK.size
    experts = []
    for index in sorted(choices):
        experts.append(ExpertRows(index, len(rows), len(rows) + len(choices[index])))
        for choice in choices[index]:
            place[choice] = len(rows)
            rows.append(choice // top_k)
    return DispatchOrder(tuple(experts), np.array(rows, np.intp), np.array(place, np.intp).reshape(ids_TK.shape))
