"""Capacity acts inside one request, conserves choices and never serves an expert beyond its share."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from router_service.core.capacity import Kept, apply_overflow, expert_capacity
from router_service.core.layer_call import Overflow

POLICIES = st.sampled_from(list(Overflow))
FACTORS = st.floats(0.01, 4.0)


@st.composite
def scored_choices(draw: st.DrawFn) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    num_tokens, num_experts = draw(st.integers(1, 40)), draw(st.integers(1, 10))
    top_k = draw(st.integers(1, num_experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    skew = draw(st.sampled_from([0.0, 3.0]))
    scores_TE = (rng.standard_normal((num_tokens, num_experts)) + skew * (np.arange(num_experts) == 0)).astype(np.float32)
    if draw(st.booleans()):
        scores_TE = np.round(scores_TE)
    return np.argsort(-scores_TE, axis=1, kind="stable")[:, :top_k].astype(np.int32), scores_TE


def _loads(kept: Kept, num_experts: int) -> NDArray[np.intp]:
    return np.bincount(kept.ids_TK[kept.ids_TK >= 0], minlength=num_experts)


@settings(deadline=None, max_examples=300)
@given(scored_choices(), POLICIES, FACTORS)
def test_every_choice_is_served_or_dropped_and_none_is_made_up(case: tuple[NDArray[np.int32], NDArray[np.float32]], overflow: Overflow, factor: float) -> None:
    ids_TK, scores_TE = case
    kept = apply_overflow(ids_TK, scores_TE, overflow, factor)
    assert ((kept.ids_TK == -1) == kept.dropped_TK).all()
    assert (kept.ids_TK >= 0).sum() + kept.dropped_TK.sum() == ids_TK.size
    for row in kept.ids_TK:
        served = row[row >= 0]
        assert len(set(served.tolist())) == len(served)


@settings(deadline=None, max_examples=300)
@given(scored_choices(), st.sampled_from([Overflow.DROP, Overflow.NEXT_BEST]), FACTORS)
def test_no_expert_serves_more_than_its_capacity(case: tuple[NDArray[np.int32], NDArray[np.float32]], overflow: Overflow, factor: float) -> None:
    ids_TK, scores_TE = case
    capacity = expert_capacity(*ids_TK.shape, scores_TE.shape[1], factor)
    assert _loads(apply_overflow(ids_TK, scores_TE, overflow, factor), scores_TE.shape[1]).max() <= capacity


@settings(deadline=None, max_examples=200)
@given(scored_choices(), FACTORS)
def test_a_choice_is_dropped_for_a_better_one_only(case: tuple[NDArray[np.int32], NDArray[np.float32]], factor: float) -> None:
    ids_TK, scores_TE = case
    kept = apply_overflow(ids_TK, scores_TE, Overflow.DROP, factor)
    capacity = expert_capacity(*ids_TK.shape, scores_TE.shape[1], factor)
    for token, column in np.argwhere(kept.dropped_TK):
        expert = ids_TK[token, column]
        served = scores_TE[(kept.ids_TK == expert).any(axis=1), expert]
        assert len(served) == capacity
        assert (served >= scores_TE[token, expert]).all()


@settings(deadline=None, max_examples=300)
@given(scored_choices(), FACTORS)
def test_next_best_drops_only_where_no_allowed_expert_has_room(case: tuple[NDArray[np.int32], NDArray[np.float32]], factor: float) -> None:
    ids_TK, scores_TE = case
    kept = apply_overflow(ids_TK, scores_TE, Overflow.NEXT_BEST, factor)
    capacity = expert_capacity(*ids_TK.shape, scores_TE.shape[1], factor)
    has_room_E = _loads(kept, scores_TE.shape[1]) < capacity
    for token in np.flatnonzero(kept.dropped_TK.any(axis=1)):
        taken = np.zeros(scores_TE.shape[1], bool)
        taken[kept.ids_TK[token][kept.ids_TK[token] >= 0]] = True
        taken[ids_TK[token]] = True
        assert not (has_room_E & ~taken).any()


def test_a_choice_over_capacity_moves_to_the_best_expert_with_room() -> None:
    ids_TK = np.array([[0], [0], [0], [1]], np.int32)
    scores_TE = np.array([[0.9, 0.05, 0.03, 0.02], [0.8, 0.1, 0.06, 0.04], [0.7, 0.2, 0.06, 0.04], [0.1, 0.8, 0.06, 0.04]], np.float32)
    kept = apply_overflow(ids_TK, scores_TE, Overflow.NEXT_BEST, 1.0)
    # Expert 0 keeps row 0; expert 1 is full with row 3; rows 1 and 2 tie for expert 2, row 1 stands first; row 2 goes on to expert 3.
    assert kept.ids_TK.ravel().tolist() == [0, 2, 3, 1]


def test_an_expert_outside_the_best_groups_takes_nothing_over() -> None:
    ids_TK = np.array([[0], [0]], np.int32)
    scores_TE = np.array([[0.9, -np.inf], [0.8, -np.inf]], np.float32)
    kept = apply_overflow(ids_TK, scores_TE, Overflow.NEXT_BEST, 0.5)
    assert kept.ids_TK.ravel().tolist() == [0, -1]
    assert kept.dropped_TK.ravel().tolist() == [False, True]


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 30), st.integers(0, 2**32 - 1), st.sampled_from([Overflow.DROP, Overflow.NEXT_BEST]), FACTORS)
def test_the_order_of_tokens_does_not_matter_without_ties(num_tokens: int, seed: int, overflow: Overflow, factor: float) -> None:
    rng = np.random.default_rng(seed)
    # A permutation of distinct values: no two scores of one expert are equal.
    scores_TE = rng.permutation(num_tokens * 6).reshape(num_tokens, 6).astype(np.float32)
    ids_TK = np.argsort(-scores_TE, axis=1)[:, :2].astype(np.int32)
    order = rng.permutation(num_tokens)
    straight = apply_overflow(ids_TK, scores_TE, overflow, factor)
    shuffled = apply_overflow(ids_TK[order], scores_TE[order], overflow, factor)
    assert (straight.ids_TK[order] == shuffled.ids_TK).all()


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 4), (1.25, 5), (0.01, 1), (100.0, 16)])
def test_capacity_is_the_share_times_the_factor_rounded_up(factor: float, expected: int) -> None:
    assert expert_capacity(16, 2, 8, factor) == expected == min(16, math.ceil(factor * 16 * 2 / 8))
