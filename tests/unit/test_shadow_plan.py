"""The shadow plan: within its budget, the best there is, everyone covered where that is possible."""

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.core.codecs import CODECS, packed_bytes
from cluster.core.descriptors import ExpertDescriptor
from cluster.core.errors import ConfigError
from cluster.core.ids import ExpertId
from cluster.core.shadow_plan import ShadowCandidate, ShadowOption, ShadowPlan, plan_shadows

DESCRIPTOR = ExpertDescriptor(hidden_size=192, intermediate_size=256)
SIZES = {name: packed_bytes(DESCRIPTOR, codec) for name, codec in CODECS.items()}
DAMAGES = {"int8": 0.0, "int4": 0.001, "int3": 0.01, "int2": 0.05}


def candidate(index: int, usage: float = 1.0, damage_without: float = 1.0, damages: dict[str, float] | None = None) -> ShadowCandidate:
    shadows = tuple(ShadowOption(name, SIZES[name], damage) for name, damage in (DAMAGES if damages is None else damages).items())
    return ShadowCandidate(ExpertId("tiny", 0, index), DESCRIPTOR.num_bytes, usage, damage_without, shadows)


def remaining_damage(candidates: Sequence[ShadowCandidate], codecs: Sequence[str | None]) -> float:
    left = 0.0
    for each, codec in zip(candidates, codecs, strict=True):
        damages: dict[str | None, float] = {option.codec: option.damage for option in each.options} | {None: each.damage_without}
        left += each.usage * damages[codec]
    return left


def least_damage(candidates: Sequence[ShadowCandidate], budget_bytes: int, *, cover: bool) -> float:
    """By trying every plan."""
    best = math.inf
    menus = [[*((option.codec, option.num_bytes) for option in each.options), *([] if cover else [(None, 0)])] for each in candidates]
    for plan in itertools.product(*menus):
        if sum(size for _, size in plan) <= budget_bytes:
            best = min(best, remaining_damage(candidates, [codec for codec, _ in plan]))
    return best


shares = st.floats(0, 1, allow_nan=False)
option_sets = st.lists(st.tuples(st.integers(1, 60), shares), min_size=1, max_size=3)
candidate_sets = st.lists(st.tuples(shares, st.floats(0, 5), option_sets), min_size=1, max_size=5).map(
    lambda rows: [
        ShadowCandidate(
            ExpertId("m", 0, index), 100, usage, without, tuple(ShadowOption(f"c{place}", size, damage) for place, (size, damage) in enumerate(shadows))
        )
        for index, (usage, without, shadows) in enumerate(rows)
    ]
)


def assert_consistent(plan: ShadowPlan, candidates: Sequence[ShadowCandidate], memory_fraction: float) -> None:
    sizes = [{option.codec: option.num_bytes for option in each.options} for each in candidates]
    codecs = [plan.codecs[each.expert] for each in candidates]
    assert plan.num_bytes == sum(size[codec] for size, codec in zip(sizes, codecs, strict=True) if codec is not None)
    assert plan.num_bytes <= plan.budget_bytes <= memory_fraction * sum(each.primary_bytes for each in candidates)
    assert plan.damage == pytest.approx(remaining_damage(candidates, codecs), abs=1e-9)
    assert plan.damage_bound == pytest.approx(plan.damage, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(candidates=candidate_sets, memory_fraction=st.floats(0, 0.8))
def test_no_plan_within_the_budget_leaves_less_damage(candidates: list[ShadowCandidate], memory_fraction: float) -> None:
    plan = plan_shadows(candidates, memory_fraction, "useful")
    assert_consistent(plan, candidates, memory_fraction)
    assert plan.damage == pytest.approx(least_damage(candidates, plan.budget_bytes, cover=False), abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(candidates=candidate_sets, memory_fraction=st.floats(0, 0.8))
def test_with_coverage_everyone_gets_a_shadow_when_the_budget_allows_it(candidates: list[ShadowCandidate], memory_fraction: float) -> None:
    plan = plan_shadows(candidates, memory_fraction, "all")
    assert_consistent(plan, candidates, memory_fraction)
    can_cover = sum(min(option.num_bytes for option in each.options) for each in candidates) <= plan.budget_bytes
    assert plan.damage == pytest.approx(least_damage(candidates, plan.budget_bytes, cover=can_cover), abs=1e-9)
    if can_cover:
        assert plan.is_covered
        assert None not in plan.codecs.values()


def test_fifteen_percent_cover_every_expert_and_spend_the_rest_where_usage_is() -> None:
    candidates = [candidate(index, usage=1.0 + index) for index in range(32)]
    plan = plan_shadows(candidates, 0.15)
    assert plan.is_covered
    assert plan.num_bytes <= 0.15 * 32 * DESCRIPTOR.num_bytes
    upgraded = [expert.index for expert, codec in plan.codecs.items() if codec == "int3"]
    assert upgraded == list(range(32 - len(upgraded), 32))
    assert len(upgraded) == 8


def test_too_small_a_budget_serves_the_experts_that_matter() -> None:
    candidates = [candidate(index, usage=float(index)) for index in range(8)]
    plan = plan_shadows(candidates, 0.05)
    assert not plan.is_covered
    assert [expert.index for expert, codec in plan.codecs.items() if codec] == [5, 6, 7]


def test_a_shadow_worse_than_none_is_kept_for_coverage_only() -> None:
    harmful = [candidate(0, damage_without=0.01, damages={"int2": 0.5})]
    assert plan_shadows(harmful, 0.15, "useful").codecs == {harmful[0].expert: None}
    assert plan_shadows(harmful, 0.15, "all").codecs == {harmful[0].expert: "int2"}


def test_no_memory_means_no_shadows() -> None:
    plan = plan_shadows([candidate(0)], 0.0)
    assert (plan.codecs, plan.num_bytes, plan.damage) == ({ExpertId("tiny", 0, 0): None}, 0, plan.damage_without)


def test_experts_without_options_leave_the_others_their_shadows() -> None:
    candidates = [candidate(0, damages={}), candidate(1)]
    plan = plan_shadows(candidates, 0.1)
    assert (list(plan.codecs.values()), plan.is_covered) == ([None, "int3"], False)


def test_no_experts_need_no_plan() -> None:
    plan = plan_shadows([], 0.15)
    assert (plan.codecs, plan.num_bytes, plan.damage, plan.is_covered) == ({}, 0, 0.0, True)


@pytest.mark.parametrize("memory_fraction", [-0.1, math.nan, math.inf])
def test_a_memory_fraction_that_is_none_is_refused(memory_fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"shadow\.memory_fraction"):
        plan_shadows([candidate(0)], memory_fraction)


@pytest.mark.parametrize("broken", [candidate(0, usage=-1.0), candidate(0, damage_without=math.nan), candidate(0, damages={"int2": math.inf})])
def test_numbers_that_cannot_be_planned_with_are_refused(broken: ShadowCandidate) -> None:
    with pytest.raises(ConfigError, match="tiny:0/0 needs finite usage"):
        plan_shadows([broken], 0.15)


def test_an_expert_listed_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="listed twice"):
        plan_shadows([candidate(0), candidate(0)], 0.15)
