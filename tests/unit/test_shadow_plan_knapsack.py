"""The knapsack against trying everything."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core.knapsack import Option, select

Groups = Sequence[Sequence[Option]]

options = st.builds(Option, st.integers(0, 30), st.floats(-5, 50, allow_nan=False, width=32) | st.integers(-3, 12).map(float))
small_groups = st.lists(st.lists(options, min_size=1, max_size=4), max_size=6)


def best_value(groups: Groups, budget_bytes: int) -> float:
    every = itertools.product(*groups)
    return max(math.fsum(option.value for option in picked) for picked in every if sum(option.num_bytes for option in picked) <= budget_bytes)


def least_bytes(groups: Groups) -> int:
    return sum(min(option.num_bytes for option in group) for group in groups)


def random_groups(seed: int, num_groups: int) -> list[list[Option]]:
    """Options as codecs are: four sizes, damage that falls with size, usage that differs a lot."""
    rng = np.random.default_rng(seed)
    groups = []
    for usage in rng.lognormal(sigma=1.5, size=num_groups):
        damages = np.array([0.0001, 0.005, 0.02, 0.1]) * rng.lognormal(sigma=0.4, size=4)
        groups.append([Option(size, usage * (1 - damage)) for size, damage in zip((502, 266, 195, 133), damages, strict=True)] + [Option(0, 0.0)])
    return groups


@settings(max_examples=400, deadline=None)
@given(groups=small_groups, spare_bytes=st.integers(0, 80))
def test_no_selection_is_worth_more(groups: Groups, spare_bytes: int) -> None:
    budget_bytes = least_bytes(groups) + spare_bytes
    found = select(groups, budget_bytes)
    picked = [group[pick] for group, pick in zip(groups, found.picks, strict=True)]
    assert found.num_bytes == sum(option.num_bytes for option in picked) <= budget_bytes
    assert found.value == math.fsum(option.value for option in picked)
    assert found.value == pytest.approx(best_value(groups, budget_bytes), abs=1e-9)
    assert found.bound == found.value


@settings(max_examples=100, deadline=None)
@given(groups=small_groups, spare_bytes=st.integers(0, 80))
def test_a_selection_cut_short_keeps_to_the_budget_and_says_what_it_may_have_missed(groups: Groups, spare_bytes: int) -> None:
    budget_bytes = least_bytes(groups) + spare_bytes
    found = select(groups, budget_bytes, max_states=1)
    assert found.num_bytes <= budget_bytes
    assert found.value <= best_value(groups, budget_bytes) + 1e-9 <= found.bound + 2e-9


def test_a_thousand_experts_are_planned_to_the_proven_best() -> None:
    groups = random_groups(1, 1000)
    budget_bytes = 150 * len(groups)
    found = select(groups, budget_bytes)
    assert found.bound == found.value
    assert budget_bytes - found.num_bytes < 133
    assert select(groups, budget_bytes) == found


def test_the_bound_of_a_selection_cut_short_is_close() -> None:
    groups = random_groups(1, 1000)
    found = select(groups, 150 * len(groups), max_states=1)
    assert found.value <= found.bound <= found.value * 1.0001


def test_more_budget_is_never_worth_less() -> None:
    groups = random_groups(2, 40)
    values = [select(groups, budget_bytes).value for budget_bytes in range(0, 21_000, 500)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(sum(max(option.value for option in group) for group in groups))


def test_a_budget_below_the_lightest_options_is_refused() -> None:
    with pytest.raises(ValueError, match="need 7 bytes, the budget is 6"):
        select([[Option(3, 1.0)], [Option(4, 1.0), Option(9, 2.0)]], 6)


def test_nothing_to_choose_from_is_an_empty_selection() -> None:
    assert select([], 10).picks == ()
