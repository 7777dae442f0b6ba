"""The multiple-choice knapsack: one option from each group, the most value within a budget.

Greedy steps along each group's convex hull give a first choice and the price of a byte; no choice can beat the Lagrangian bound at that price
(Sinha & Zoltners 1979). Options that could not close the gap between the two are dropped, and dynamic programming over the few that remain is exact
(Pisinger 1995 takes the core first, as here).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MAX_STATES = 20_000
_CORE_GROUPS = 64
# Sums of the same values in another order differ by a few of these.
_TOLERANCE = 1e-12


@dataclass(frozen=True, slots=True)
class Option:
    """One way to serve a group: what it weighs, in whole bytes, and what it is worth."""

    num_bytes: int
    value: float


@dataclass(frozen=True, slots=True)
class Selection:
    """The option picked in each group. No selection within the budget is worth more than `bound`; it is `value` where the pick is proven best."""

    picks: tuple[int, ...]
    num_bytes: int
    value: float
    bound: float


@dataclass(frozen=True, slots=True)
class _Step:
    """From one option on a group's hull to the next: `price` is the value won per byte."""

    price: float
    group: int
    place: int


@dataclass(frozen=True, slots=True)
class _Stage:
    """Selections over the groups so far that nothing dominates: bytes and value, where each came from and what it picked last."""

    num_bytes: NDArray[np.int64]
    value: NDArray[np.float64]
    cost: NDArray[np.float64]
    parent: NDArray[np.int64]
    pick: NDArray[np.int64]


def select(groups: Sequence[Sequence[Option]], budget_bytes: int, *, max_states: int = MAX_STATES) -> Selection:
    """The best option of each group within the budget; where more than `max_states` selections had to be kept, the best found, with its bound.

    Equal inputs give equal selections. Raises ValueError when a group is empty, or even the lightest options exceed the budget.
    """
    least_bytes = sum(min(option.num_bytes for option in group) for group in groups)
    if least_bytes > budget_bytes:
        message = f"the lightest options of {len(groups)} groups need {least_bytes} bytes, the budget is {budget_bytes}"
        raise ValueError(message)
    picks, price = _greedy(groups, budget_bytes)
    costs = [_costs(group, price) for group in groups]
    bound = price * budget_bytes + sum(max(option.value - price * option.num_bytes for option in group) for group in groups)
    # The groups in doubt, by themselves, nearly close the gap; few are then left for the proof.
    picks, _ = _improved(groups, _core(costs), budget_bytes, picks, bound, max_states)
    picks, is_exact = _improved(groups, costs, budget_bytes, picks, bound, max_states)
    value = _value(groups, picks)
    num_bytes = sum(group[pick].num_bytes for group, pick in zip(groups, picks, strict=True))
    return Selection(tuple(picks), num_bytes, value, value if is_exact else max(bound, value))


def _improved(
    groups: Sequence[Sequence[Option]], costs: Sequence[Sequence[float]], budget_bytes: int, picks: list[int], bound: float, max_states: int
) -> tuple[list[int], bool]:
    """A better selection where there is one, and whether every better one was looked for."""
    value = _value(groups, picks)
    better, is_exact = _search(groups, costs, budget_bytes, bound - value + _TOLERANCE * (1.0 + abs(bound)), max_states)
    return (better if better is not None and _value(groups, better) > value else picks), is_exact


def _value(groups: Sequence[Sequence[Option]], picks: Sequence[int]) -> float:
    return math.fsum(group[pick].value for group, pick in zip(groups, picks, strict=True))


def _core(costs: Sequence[Sequence[float]]) -> list[list[float]]:
    """The costs with all but the groups in doubt, those whose second best costs least, tied to their best."""
    doubt = sorted(range(len(costs)), key=lambda number: (min(sorted(costs[number])[1:], default=math.inf), number))
    in_doubt = set(doubt[:_CORE_GROUPS])
    return [list(group) if number in in_doubt else [0.0 if cost == 0.0 else math.inf for cost in group] for number, group in enumerate(costs)]


def _greedy(groups: Sequence[Sequence[Option]], budget_bytes: int) -> tuple[list[int], float]:
    """A good selection, and the price of a byte where the budget ran out (0 where it did not)."""
    hulls = [_hull(group) for group in groups]
    steps = [
        _Step((group[after].value - group[before].value) / (group[after].num_bytes - group[before].num_bytes), number, place)
        for number, (group, hull) in enumerate(zip(groups, hulls, strict=True))
        for place, (before, after) in enumerate(pairwise(hull), start=1)
    ]
    steps.sort(key=lambda step: (-step.price, step.group, step.place))
    places = [0] * len(groups)
    left_bytes = budget_bytes - sum(group[hull[0]].num_bytes for group, hull in zip(groups, hulls, strict=True))
    price = 0.0
    for step in steps:
        group, hull = groups[step.group], hulls[step.group]
        # A step that did not fit may be made up for by a longer one of the same group, bytes counted from where the group stands.
        more_bytes = group[hull[step.place]].num_bytes - group[hull[places[step.group]]].num_bytes
        if more_bytes <= left_bytes:
            places[step.group] = step.place
            left_bytes -= more_bytes
        elif price == 0.0:
            price = step.price
    return [hull[place] for hull, place in zip(hulls, places, strict=True)], price


def _hull(group: Sequence[Option]) -> list[int]:
    """Options from the lightest to the most valuable, each step winning less per byte than the one before."""
    hull: list[int] = []
    for index in sorted(range(len(group)), key=lambda index: (group[index].num_bytes, -group[index].value, index)):
        if hull and group[index].value <= group[hull[-1]].value:
            continue
        while len(hull) > 1 and _turns_up(group[hull[-2]], group[hull[-1]], group[index]):
            hull.pop()
        hull.append(index)
    return hull


def _turns_up(first: Option, middle: Option, last: Option) -> bool:
    """Whether the middle one lies on or below the line between its neighbours."""
    return (middle.value - first.value) * (last.num_bytes - middle.num_bytes) <= (last.value - middle.value) * (middle.num_bytes - first.num_bytes)


def _costs(group: Sequence[Option], price: float) -> list[float]:
    """How much each option falls short of the group's best at this price of a byte."""
    worth = [option.value - price * option.num_bytes for option in group]
    return [max(worth) - each for each in worth]


def _search(
    groups: Sequence[Sequence[Option]], costs: Sequence[Sequence[float]], budget_bytes: int, gap: float, max_states: int
) -> tuple[list[int] | None, bool]:
    """The best selection among those whose costs stay within the gap (None: there is none), and whether all of them were looked at."""
    open_picks = [[pick for pick, cost in enumerate(group) if cost <= gap] for group in costs]
    least_bytes = [min(group[pick].num_bytes for pick in kept) for group, kept in zip(groups, open_picks, strict=True)]
    picks = [kept[0] for kept in open_picks]
    undecided = [number for number, kept in enumerate(open_picks) if len(kept) > 1]
    decided_bytes = sum(least_bytes) - sum(least_bytes[number] for number in undecided)
    room_bytes, zero = budget_bytes - sum(least_bytes), np.zeros(1, np.int64)
    stage, stages, is_exact = _Stage(zero + decided_bytes, np.zeros(1), np.zeros(1), zero, zero), list[_Stage](), True
    for number in undecided:
        # What a state may weigh: those already in it, this group's lightest, and the bytes that nobody's lightest needs.
        decided_bytes += least_bytes[number]
        stage = _extended(stage, [(pick, groups[number][pick], costs[number][pick]) for pick in open_picks[number]], decided_bytes + room_bytes, gap)
        if not len(stage.value):
            return None, is_exact
        if len(stage.value) > max_states:
            is_exact = False
            stage = _taken(stage, np.sort(np.argsort(stage.cost, kind="stable")[:max_states]))
        stages.append(stage)
    index = int(np.argmax(stage.value))
    for number, stage in zip(reversed(undecided), reversed(stages), strict=True):
        picks[number] = int(stage.pick[index])
        index = int(stage.parent[index])
    return picks, is_exact


def _extended(stage: _Stage, options: Sequence[tuple[int, Option, float]], room_bytes: int, gap: float) -> _Stage:
    """Every state with every option that still can win, less those that another state dominates."""
    size = len(stage.value)
    every = _Stage(
        np.concatenate([stage.num_bytes + option.num_bytes for _, option, _ in options]),
        np.concatenate([stage.value + option.value for _, option, _ in options]),
        np.concatenate([stage.cost + cost for _, _, cost in options]),
        np.tile(np.arange(size), len(options)),
        np.repeat(np.array([pick for pick, _, _ in options], np.int64), size),
    )
    order = np.lexsort((-every.value, every.num_bytes))
    order = order[(every.num_bytes[order] <= room_bytes) & (every.cost[order] <= gap)]
    best_before = np.concatenate([[-np.inf], np.maximum.accumulate(every.value[order])])[:-1]
    return _taken(every, order[every.value[order] > best_before])


def _taken(stage: _Stage, index: NDArray[np.intp]) -> _Stage:
    return _Stage(stage.num_bytes[index], stage.value[index], stage.cost[index], stage.parent[index], stage.pick[index])
