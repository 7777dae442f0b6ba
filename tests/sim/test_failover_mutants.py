"""Bugs planted in the router's own code: the failover simulation finds each within the number of seeds that is stated, by the rule that it breaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from cluster.core.routing_table import TableCopy
from kit.failover_rules import RuleBroken
from kit.failover_world import Plan, simulate
from router_service import actor_lane, dispatcher, recheck
from router_service.actor_health import ActorHealth
from router_service.core import batching
from router_service.core.balance import pick_copy
from router_service.core.casualties import Casualties
from router_service.core.doubt import Doubt
from router_service.core.doubt import Verdict as DoubtVerdict
from router_service.core.flight import Flight, Send
from router_service.core.hedging import HedgeBudget
from router_service.core.liveness import Liveness
from router_service.core.trust import Accusation, Trust
from router_service.core.verdicts import Verdict

Mutant = Callable[[], Any]


def assert_caught(mutant: Mutant, rule: str, *, within: int, kinds: Sequence[str], **settings: Any) -> None:
    """Some seed breaks the rule with the bug, and breaks none without it."""
    plans = [Plan(seed, kinds=tuple(kinds), **settings) for seed in range(within)]
    found = next(((plan, story) for plan in plans if (story := story_of(plan, mutant))), None)
    assert found is not None, f"not caught within {within} seeds"
    plan, story = found
    assert rule in story
    simulate(plan)


def story_of(plan: Plan, mutant: Mutant) -> str:
    """Which rule a run with the bug breaks; empty: none."""
    with mutant():
        try:
            simulate(plan)
        except RuleBroken as broken:
            return str(broken)
    return ""


def test_dropped_fencing_is_caught() -> None:
    def mutant() -> Any:
        return mock.patch.object(batching, "error_of_frame", return_value=None)

    assert_caught(mutant, "an answer is of the rows that were sent", within=5, kinds=["answer_for_another_life"])


def test_a_hedge_to_the_same_actor_is_caught() -> None:
    def mutant() -> Any:
        def pick(copies: Sequence[TableCopy], *, tried: Sequence[TableCopy] = (), **rest: Any) -> TableCopy | None:
            return tried[0] if tried else pick_copy(copies, **rest)

        return both(mock.patch.object(dispatcher, "pick_copy", pick), mock.patch.object(Flight, "hedge", unguarded_hedge))

    assert_caught(mutant, "no copy is asked twice for the same rows", within=5, kinds=["slow_down", "stop_actor"])


def unguarded_hedge(flight: Flight, number: int, charge: Callable[[int], bool] = lambda _: True) -> Send | None:
    part = flight.parts[number]
    if not flight.can_hedge(number) or not charge(part.rows.num_rows):
        return None
    return flight._send(number, flight._pick(part.rows.index, part.tried), dispatcher.Why.HEDGE)


def test_an_unbudgeted_hedge_is_caught() -> None:
    def mutant() -> Any:
        return mock.patch.object(HedgeBudget, "take", return_value=True)

    assert_caught(mutant, "hedges stay within their budget", within=10, kinds=["slow_down", "delay_replies"], faults=6, replicas=1, calls_per_s=100.0)


def test_a_second_answer_of_a_loser_is_caught() -> None:
    def mutant() -> Any:
        def answered(flight: Flight, number: int, attempt: int) -> list[int] | None:  # noqa: ARG001
            part = flight.parts[number]
            if not part.is_answered:
                part.is_answered = True
                flight._num_open -= 1
            return []

        return both(
            mock.patch.object(actor_lane.ActorLane, "_withdraw", return_value=None),
            mock.patch.object(Flight, "answered", answered),
            mock.patch.object(Flight, "can_hedge", lambda flight, number: len(flight.parts[number].tried) == 1),
        )

    assert_caught(mutant, "a choice is answered once", within=10, kinds=["slow_down", "delay_replies"], faults=3)


def test_blame_without_a_second_copy_is_caught() -> None:
    def mutant() -> Any:
        return mock.patch.object(Doubt, "answered", return_value=DoubtVerdict.BLAMED)

    assert_caught(mutant, "healthy weights are never blamed", within=3, kinds=["hold_table_back"], faults=0, overflow_share=0.2)


def test_an_exact_request_served_by_a_shadow_is_caught() -> None:
    def mutant() -> Any:
        def pick(copies: Sequence[TableCopy], *, exact: bool = False, **rest: Any) -> TableCopy | None:  # noqa: ARG001
            return pick_copy(copies, exact=False, **rest)

        return both(mock.patch.object(dispatcher, "pick_copy", pick), mock.patch.object(recheck, "pick_copy", pick))

    assert_caught(mutant, "EXACT is never asked of a shadow", within=5, kinds=["kill_actor", "stop_actor"], replicas=1)


def test_an_observer_that_forgets_its_own_lateness_is_caught() -> None:
    def mutant() -> Any:
        tick = Liveness.tick

        def late(liveness: Liveness, now_s: float, *, late_s: float) -> list[Verdict]:  # noqa: ARG001
            return tick(liveness, now_s, late_s=0.0)

        return mock.patch.object(Liveness, "tick", late)

    assert_caught(mutant, "nobody is ejected without a fault", within=10, kinds=["pause_router"], faults=3, calls_per_s=100.0)


def test_a_missing_node_rule_is_caught() -> None:
    def mutant() -> Any:
        return mock.patch.object(Casualties, "struck_group", return_value=None)

    assert_caught(mutant, "a lost node is ejected whole", within=20, kinds=["freeze_node", "lose_node"], calls_per_s=60.0)


def test_a_first_error_that_beats_a_slow_success_is_caught() -> None:
    def mutant() -> Any:
        def failed(flight: Flight, number: int, attempt: int, reason: str) -> Send | None:
            part = flight.parts[number]
            if part.has_ended or part.live.pop(attempt, None) is None:
                return None
            part.lost = reason
            flight._num_open -= 1
            return None

        return mock.patch.object(Flight, "failed", failed)

    assert_caught(mutant, "what a healthy copy could answer does not fail", within=10, kinds=["fail_forwards", "kill_actor"], faults=3)


def test_rows_lost_on_ejection_are_caught() -> None:
    def mutant() -> Any:
        return both(
            mock.patch.object(actor_lane.ActorLane, "eject", return_value=None),
            mock.patch.object(HedgeBudget, "take", return_value=False),
        )

    assert_caught(mutant, "what a healthy copy could answer does not fail", within=10, kinds=["stick_compute", "stop_actor"], faults=3, timeout_s=0.8)


def test_a_window_that_lost_answers_fill_for_ever_is_caught() -> None:
    def mutant() -> Any:
        return mock.patch.object(actor_lane.ActorLane, "try_again", return_value=True)

    assert_caught(mutant, "nothing is left under way", within=10, kinds=["drop_replies", "lose_one_way"], faults=3)


def test_a_pong_that_readmits_is_caught() -> None:
    def mutant() -> Any:
        heard = Liveness.heard

        def forgiving(liveness: Liveness, actor: str, now_s: float, **progress: Any) -> None:
            heard(liveness, actor, now_s, **progress)
            watch = liveness._ejected.get(actor)
            if watch is not None:
                liveness._pending.append(liveness._readmit(watch, "it answered a ping", now_s))
                liveness._clear(watch, "it answered a ping", now_s)

        return mock.patch.object(Liveness, "heard", forgiving)

    assert_caught(mutant, "a Pong re-admits nobody", within=10, kinds=["stick_compute"], faults=3)


def test_a_trial_of_many_frames_is_caught() -> None:
    def mutant() -> Any:
        return mock.patch.object(ActorHealth, "may_send", return_value=True)

    assert_caught(mutant, "one frame at a time is on trial", within=10, kinds=["stick_compute"], faults=8, calls_per_s=200.0)


def test_an_accusation_that_is_told_only_once_is_caught() -> None:
    def mutant() -> Any:
        def take_accusations(trust: Trust) -> Counter[Accusation]:
            counts, trust._counts = trust._counts, Counter()
            return counts

        return mock.patch.object(Trust, "take_accusations", take_accusations)

    assert_caught(mutant, "exact again", within=4, kinds=["corrupt_weights", "pause_controller"], faults=4, replicas=1, calls_per_s=60.0)


@contextmanager
def both(*patches: Any) -> Iterator[None]:
    with patches[0]:
        if len(patches) == 1:
            yield
        else:
            with both(*patches[1:]):
                yield
