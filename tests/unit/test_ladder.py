"""The ladder: every choice of a lost expert is decided or named, as a plain loop decides it, and no set of lost experts makes a weight wrong."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cluster.core.errors import InvariantBroken
from cluster.core.ids import Role
from router_service.core.ladder import FALLBACK_OUTCOMES, compute_stand_ins, stand_in
from router_service.core.outcomes import Answer, Ledger, Outcome

RUNGS = ("shadow", "fewer_experts", "generalist", "dense")
E, D = 6, 4


@st.composite
def requests(draw: st.DrawFn) -> tuple[NDArray[np.int32], torch.Tensor, list[int], tuple[str, ...]]:
    num_tokens, top_k = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    ids = [draw(st.lists(st.integers(-1, E - 1), min_size=top_k, max_size=top_k)) for _ in range(num_tokens)]
    number = st.one_of(st.floats(0, 4, width=32), st.floats(-4, 4, width=32), st.sampled_from([0.0, 1e-38, 1e-30, 3e38]))
    weights = [draw(st.lists(number, min_size=top_k, max_size=top_k)) for _ in range(num_tokens)]
    lost = draw(st.lists(st.integers(0, E - 1), max_size=E, unique=True))
    rungs = draw(st.permutations(RUNGS))[: draw(st.integers(0, 4))]
    ids_TK = np.array(ids, np.int32)
    weights_TK = torch.tensor(weights, dtype=torch.float32).masked_fill(torch.from_numpy(ids_TK < 0), 0.0)
    return ids_TK, weights_TK, lost, tuple(rungs)


def _plainly(ids: list[int], weights: list[float], lost: list[int], rungs: tuple[str, ...]) -> tuple[list[float], list[int]] | None:
    """One token, in plain words: its weights and outcomes, or None when nothing serves it. In double precision."""
    gone = [index in lost for index in ids]
    if not any(gone):
        return weights, [0] * len(ids)
    for rung in rungs:
        if rung in FALLBACK_OUTCOMES:
            return weights, [FALLBACK_OUTCOMES[rung] if is_gone else 0 for is_gone in gone]
        if rung != "fewer_experts" or not any(index >= 0 and not is_gone for index, is_gone in zip(ids, gone, strict=True)):
            continue
        left = [0.0 if is_gone else weight for weight, is_gone in zip(weights, gone, strict=True)]
        outcomes = [Outcome.OMITTED if is_gone else 0 for is_gone in gone]
        if all(weight == 0.0 for weight, is_gone in zip(weights, gone, strict=True) if is_gone):
            return left, outcomes
        if sum(weights) > 0.0 and sum(left) > 0.0:
            scaled = [weight * (sum(weights) / sum(left)) for weight in left]
            with np.errstate(over="ignore"):
                if np.isfinite(np.array(scaled).astype(np.float32)).all():
                    return scaled, outcomes
    return None


@settings(max_examples=400, deadline=None)
@given(requests())
def test_every_lost_choice_is_decided_as_a_plain_loop_decides_it(request: tuple[NDArray[np.int32], torch.Tensor, list[int], tuple[str, ...]]) -> None:
    ids_TK, weights_TK, lost, rungs = request
    degraded = stand_in(ids_TK, weights_TK, lost, rungs)
    for token in range(len(ids_TK)):
        expected = _plainly(ids_TK[token].tolist(), weights_TK[token].double().tolist(), lost, rungs)
        assert (token in degraded.unserved_tokens) == (expected is None)
        if expected is not None:
            assert degraded.outcomes_TK[token].tolist() == expected[1]
            np.testing.assert_allclose(degraded.weights_TK[token].numpy(), np.array(expected[0], np.float32), rtol=1e-6, atol=1e-44)


@settings(max_examples=300, deadline=None)
@given(requests())
def test_no_weight_becomes_infinite_and_no_unlost_choice_is_touched(request: tuple[NDArray[np.int32], torch.Tensor, list[int], tuple[str, ...]]) -> None:
    ids_TK, weights_TK, lost, rungs = request
    before = weights_TK.clone()
    degraded = stand_in(ids_TK, weights_TK, lost, rungs)
    assert torch.equal(weights_TK, before)
    assert torch.isfinite(degraded.weights_TK).all()
    is_lost_TK = np.isin(ids_TK, lost) & (ids_TK >= 0)
    assert not degraded.outcomes_TK[~is_lost_TK].any()
    undecided_TK = is_lost_TK & (degraded.outcomes_TK == 0)
    assert np.flatnonzero(undecided_TK.any(axis=1)).tolist() == degraded.unserved_tokens.tolist()
    listed = {rung: list(zip(rows.tokens_M, rows.columns_M, strict=True)) for rung, rows in degraded.fallbacks.items()}
    for rung, outcome in FALLBACK_OUTCOMES.items():
        assert listed.get(rung, []) == list(zip(*np.nonzero(degraded.outcomes_TK == outcome), strict=True))


def test_weights_grow_to_the_sum_the_gate_gave_and_not_to_one() -> None:
    ids_TK = np.array([[0, 1, 2]], np.int32)
    degraded = stand_in(ids_TK, torch.tensor([[0.25, 0.125, 0.125]]), [1], ("fewer_experts",))
    assert degraded.weights_TK.sum().item() == pytest.approx(0.5)
    assert degraded.weights_TK[0].tolist() == pytest.approx([1 / 3, 0.0, 1 / 6])


def test_a_token_that_lost_all_its_choices_falls_to_the_next_rung() -> None:
    ids_TK = np.array([[0, 1], [0, 2]], np.int32)
    degraded = stand_in(ids_TK, torch.full((2, 2), 0.5), [0, 1], ("fewer_experts", "dense"))
    assert degraded.outcomes_TK.tolist() == [[Outcome.DENSE, Outcome.DENSE], [Outcome.OMITTED, 0]]
    assert degraded.unserved_tokens.size == 0
    assert stand_in(ids_TK, torch.full((2, 2), 0.5), [0, 1], ("fewer_experts",)).unserved_tokens.tolist() == [0]


@settings(max_examples=100, deadline=None)
@given(requests(), st.integers(0, 9))
def test_the_combine_gets_a_place_for_every_choice_but_those_left_out(
    request: tuple[NDArray[np.int32], torch.Tensor, list[int], tuple[str, ...]], seed: int
) -> None:
    ids_TK, weights_TK, lost, rungs = request
    degraded = stand_in(ids_TK, weights_TK, lost, rungs)
    x_TD = torch.randn((len(ids_TK), D), generator=torch.Generator().manual_seed(seed))
    place_TK = np.where(ids_TK >= 0, np.cumsum(ids_TK >= 0).reshape(ids_TK.shape) - 1, -1)
    y_ND = torch.full((int((ids_TK >= 0).sum()), D), torch.nan)
    factors = {"generalist": 2.0, "dense": 3.0}
    y_MD, places_TK = compute_stand_ins(degraded, place_TK, y_ND, x_TD, lambda rung, rows: rows * factors[rung])
    for (token, column), outcome in np.ndenumerate(degraded.outcomes_TK):
        place = places_TK[token, column]
        if outcome == Outcome.OMITTED:
            assert place == -1
        elif outcome:
            assert torch.equal(y_MD[place], x_TD[token] * factors[Outcome(outcome).name.lower()])
        else:
            assert place == place_TK[token, column]


def test_a_choice_that_was_answered_cannot_be_stood_in_for() -> None:
    ids_TK, weights_TK = np.array([[0, 1]], np.int32), np.array([[0.5, 0.5]], np.float32)
    ledger = Ledger(ids_TK, weights_TK, np.zeros((1, 2), np.bool_))
    ledger.answered(0, Answer("ab" * 32, 1, Role.REPLICA, 0))
    with pytest.raises(InvariantBroken):
        ledger.stood_in(np.array([[Outcome.DENSE, 0]], np.uint8), weights_TK, {Outcome.DENSE: "cd" * 32})
    ledger.stood_in(np.array([[0, Outcome.DENSE]], np.uint8), weights_TK, {Outcome.DENSE: "cd" * 32, Outcome.GENERALIST: "ef" * 32})
    report = ledger.report(epoch=1, want_plan=True)
    assert (report.exact, report.dense, report.degraded_tokens) == (1, 1, 1)
    assert [version.hex() for version in report.plan.versions] == ["ab" * 32, "cd" * 32]
    assert report.plan.version_index.tolist() == [[0, 1]]
    assert report.plan.generations.tolist() == [[1, -1]]
