"""The account of a request: each choice counts once, none is forgotten, and the numbers are those of the proto."""

import numpy as np
import pytest

from cluster.core.errors import InvariantBroken
from cluster.core.ids import Role
from protos.moelastic.router.v1 import router_pb2
from router_service.core.layer_call import Overflow
from router_service.core.outcomes import Answer, Ledger, Outcome

IDS = np.array([[0, 2], [2, -1], [-1, 0]], np.int32)
DROPPED = np.array([[False, False], [False, True], [False, False]])


def _ledger() -> Ledger:
    return Ledger(IDS, np.ones(IDS.shape, np.float32), DROPPED)


def test_outcome_numbers_are_those_of_the_proto() -> None:
    assert {f"OUTCOME_{outcome.name}": outcome.value for outcome in Outcome} == {
        name: number for name, number in router_pb2.Outcome.items() if number != router_pb2.OUTCOME_UNSPECIFIED
    }
    assert [Overflow.NONE, Overflow.DROP, Overflow.NEXT_BEST] == [
        router_pb2.OVERFLOW_UNSPECIFIED,
        router_pb2.OVERFLOW_DROP,
        router_pb2.OVERFLOW_NEXT_BEST,
    ]


def test_every_choice_has_one_outcome_and_a_token_is_degraded_by_any_but_exact_and_unused() -> None:
    ledger = _ledger()
    ledger.answered(0, Answer("aa" * 32, 3, Role.REPLICA, 0))
    ledger.answered(2, Answer("bb" * 32, 4, Role.SHADOW, 1))
    report = ledger.report(epoch=9, want_plan=True)
    assert report.counts == {"exact": 2, "shadow": 2, "omitted": 0, "generalist": 0, "dense": 0, "dropped": 1, "unused": 1}
    assert (report.num_choices, report.degraded_tokens, report.epoch) == (IDS.size, 2, 9)
    assert report.plan.outcomes.tolist() == [[Outcome.EXACT, Outcome.SHADOW], [Outcome.SHADOW, Outcome.DROPPED], [Outcome.UNUSED, Outcome.EXACT]]
    assert report.plan.version_index.tolist() == [[0, 1], [1, -1], [-1, 0]]
    assert report.plan.generations.tolist() == [[3, 4], [4, -1], [-1, 3]]
    assert report.plan.attempts.tolist() == [[0, 1], [1, 0], [0, 0]]
    assert report.plan.versions == (bytes.fromhex("aa" * 32), bytes.fromhex("bb" * 32))


def test_a_choice_without_an_outcome_is_a_bug_that_is_never_hidden() -> None:
    ledger = _ledger()
    ledger.answered(0, Answer("aa" * 32, 3, Role.REPLICA, 0))
    with pytest.raises(InvariantBroken, match="2 choices"):
        ledger.report(epoch=1, want_plan=False)


def test_an_expert_that_answers_twice_is_not_counted_twice() -> None:
    ledger = _ledger()
    ledger.answered(0, Answer("aa" * 32, 3, Role.REPLICA, 0))
    with pytest.raises(InvariantBroken, match="twice"):
        ledger.answered(0, Answer("aa" * 32, 3, Role.REPLICA, 1))
