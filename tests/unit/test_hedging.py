"""When rows count as late, and how many may be sent twice for it."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_service.core.hedging import HedgeBudget, Lateness


def test_a_budget_begins_full_and_refills_with_the_rows_asked_for() -> None:
    budget = HedgeBudget(0.05, 100)
    assert budget.take(60)
    assert budget.take(40)
    assert not budget.take(1)
    budget.asked(400)
    assert not budget.take(21)
    assert budget.take(20)
    assert (budget.hedged_rows, budget.refused_rows) == (120, 22)


def test_a_budget_holds_no_more_than_its_burst() -> None:
    budget = HedgeBudget(0.05, 100)
    budget.asked(1_000_000)
    assert budget.available_rows == 100
    assert not budget.take(101)


def test_rows_of_lost_actors_are_counted_and_not_charged() -> None:
    budget = HedgeBudget(0.05, 100)
    budget.asked(1000)
    budget.resent(500)
    assert budget.available_rows == 100
    assert budget.amplification == pytest.approx(1.5)


def test_without_a_share_nothing_is_hedged() -> None:
    budget = HedgeBudget(0.0, 100)
    assert not budget.take(1)


def test_before_any_rows_nothing_is_amplified() -> None:
    assert HedgeBudget(0.05, 100).amplification == 1.0


def test_a_burst_that_grows_brings_its_rows_and_one_that_shrinks_takes_them() -> None:
    budget = HedgeBudget(0.05, 100)
    budget.take(100)
    budget.set_burst(150)
    assert budget.available_rows == 50
    budget.set_burst(20)
    assert budget.available_rows == 20


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 500)), max_size=200))
def test_hedged_rows_never_exceed_burst_and_share(steps: list[tuple[bool, int]]) -> None:
    budget, asked, hedged = HedgeBudget(0.05, 64), 0, 0
    for is_ask, num_rows in steps:
        if is_ask:
            budget.asked(num_rows)
            asked += num_rows
        elif budget.take(num_rows):
            hedged += num_rows
        assert hedged <= 64 + 0.05 * asked + 1e-6
        assert budget.amplification == pytest.approx((asked + hedged) / asked if asked else 1.0)


def observed(took_s: list[float], num_rows: int = 8, quantile: float = 0.99) -> Lateness:
    lateness = Lateness(quantile, 0.001)
    for one_s in took_s:
        lateness.observe(num_rows, one_s, 0.0)
    return lateness


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("quantile", [0.9, 0.99])
def test_the_quantile_is_learned_within_a_fifth_above(seed: int, quantile: float) -> None:
    rng = Random(seed)
    samples = [rng.lognormvariate(-4.5, 0.5) for _ in range(992)]
    exact_s = sorted(samples)[int(quantile * len(samples))]
    assert exact_s / 1.2 <= observed(samples, quantile=quantile).delay_s(8) <= exact_s * 1.2


def test_rows_are_compared_with_their_like() -> None:
    lateness = Lateness(0.99, 0.001)
    for _ in range(64):
        lateness.observe(4, 0.004, 0.0)
        lateness.observe(1024, 0.3, 0.0)
    assert 0.004 <= lateness.delay_s(3) < 0.006
    assert 0.3 <= lateness.delay_s(1000) < 0.4


def test_sizes_not_seen_yet_borrow_from_larger_ones_then_from_smaller_ones_in_proportion() -> None:
    lateness = observed([0.02] * 64, num_rows=64)
    assert lateness.delay_s(8) == lateness.delay_s(64)
    assert lateness.delay_s(256) == pytest.approx(4 * lateness.delay_s(64))


def test_a_few_samples_decide_nothing() -> None:
    assert Lateness(0.99, 0.01).delay_s(100) == pytest.approx(0.2)
    assert observed([0.001] * 31).delay_s(100) == pytest.approx(0.2)


def test_nothing_is_late_before_the_least_delay() -> None:
    lateness = Lateness(0.99, 0.05)
    for _ in range(100):
        lateness.observe(8, 0.0001, 0.0)
    assert lateness.delay_s(8) == 0.05


@pytest.mark.parametrize(("rate", "within_s"), [(20, 60), (100, 20), (5000, 20)])
def test_a_spell_of_slowness_is_forgotten_within_seconds_under_load_and_a_minute_at_a_trickle(rate: int, within_s: int) -> None:
    lateness, spell_s = Lateness(0.99, 0.001), 5
    for number in range(spell_s * rate):
        lateness.observe(8, 0.2, number / rate)
    assert lateness.delay_s(8) >= 0.2
    for number in range(spell_s * rate, (spell_s + within_s) * rate):
        lateness.observe(8, 0.01, number / rate)
    assert lateness.delay_s(8) < 0.02


def test_a_few_rows_that_a_lost_actor_held_do_not_excuse_the_next_ones_and_many_slow_ones_do() -> None:
    lateness = observed([0.01] * 400)
    for _ in range(16):
        lateness.observe(8, 5.0, 0.0)
    assert lateness.delay_s(8) < 0.03
    for _ in range(400):
        lateness.observe(8, 0.2, 0.0)
    assert lateness.delay_s(8) >= 0.2


def test_what_is_hardly_asked_is_not_forgotten() -> None:
    lateness = observed([0.2] * 255)
    for number in range(2):
        lateness.observe(8, 0.2, 3600.0 * number)
    assert 0.2 <= lateness.delay_s(8) < 0.25


@given(st.integers(1, 1 << 30), st.floats(0.0, 1e9))
def test_any_size_and_time_is_taken(num_rows: int, took_s: float) -> None:
    lateness = observed([took_s] * 64, num_rows=num_rows)
    assert 0.001 <= lateness.delay_s(num_rows) <= 2048.0
