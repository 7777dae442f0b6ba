"""Copies that do not answer: others do, the account says who, and what nobody answers fails with the caller's own rows."""

import asyncio
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core.errors import DeadlineExceeded, ExpertUnavailable, ReplicaError, ReplicaFaulted, ReplicaRejected, ReplicaUnavailable
from cluster.core.ids import Role
from cluster.core.routing_table import TableCopy
from kit.lanes import copy_on
from kit.pipelines import NAME, E, K, T, call, expected, setup, table, version_of
from router_service.pipeline import MAX_ATTEMPTS, Outcome, Report

ERRORS = [ReplicaUnavailable("reset"), ReplicaRejected("not held"), ReplicaFaulted("RuntimeError")]


def two_replicas(_: int, index: int) -> list[TableCopy]:
    return [copy_on("a", version_of(index), generation=11), copy_on("b", version_of(index), generation=12)]


def replica_and_shadow(_: int, index: int) -> list[TableCopy]:
    return [copy_on("a", version_of(index)), copy_on("s", version_of(index + 50), generation=5, role=Role.SHADOW)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_a_lost_copy_is_replaced_by_another_and_the_plan_says_attempt_1(error: ReplicaError) -> None:
    made, asked = setup(two_replicas), call(want_plan=True)
    made.lanes.break_actor("a", error)
    reply = await made.pipeline.run(asked)
    plan = reply.report.plan
    assert torch.equal(reply.hidden_states, expected(asked, made.model))
    assert reply.report.exact == T * K
    assert (plan.generations == 12).all()
    first_asked = {request.expert.index: request.copy.incarnation.actor_id for request in reversed(made.lanes.requests)}
    assert all(attempt == (first_asked[index] == "a") for attempt, index in zip(plan.attempts.flat, plan.expert_ids.flat, strict=True))
    assert {0, 1} == set(plan.attempts.flat)


async def test_one_segment_that_raises_fails_alone() -> None:
    made = setup(lambda _, index: [copy_on("a", version_of(index)), copy_on("s", version_of(index), role=Role.SHADOW)])
    made.lanes.fail_next("a", ReplicaFaulted("RuntimeError"))
    reply = await made.pipeline.run(call(want_plan=True))
    retried = [request for request in made.lanes.requests if request.attempt]
    assert len(retried) == 1
    assert reply.report.shadow == len(retried[0].rows)
    assert reply.report.exact == T * K - reply.report.shadow


async def test_a_shadow_is_asked_only_when_no_replica_is_left() -> None:
    made = setup(lambda *place: [*two_replicas(*place), copy_on("s", version_of(place[1]), role=Role.SHADOW)])
    made.lanes.break_actor("a", ERRORS[0])
    await made.pipeline.run(call())
    assert Counter(request.copy.role for request in made.lanes.requests)[Role.SHADOW] == 0
    made.lanes.break_actor("b", ERRORS[0])
    reply = await made.pipeline.run(call())
    assert (reply.report.shadow, reply.report.exact, reply.report.degraded_tokens) == (T * K, 0, T)


async def test_an_exact_call_is_never_served_by_a_shadow() -> None:
    made = setup(replica_and_shadow)
    made.lanes.break_actor("a", ERRORS[0])
    with pytest.raises(ExpertUnavailable, match="full-precision"):
        await made.pipeline.run(call(fidelity_exact=True))
    assert {request.copy.role for request in made.lanes.requests} == {Role.REPLICA}


async def test_an_exact_call_is_refused_before_anything_is_sent_when_only_a_shadow_is_left() -> None:
    made = setup(lambda _, index: [copy_on("s", version_of(index), role=Role.SHADOW if index == 2 else Role.REPLICA)])
    with pytest.raises(ExpertUnavailable) as lost:
        await made.pipeline.run(call(fidelity_exact=True))
    assert not made.lanes.requests
    assert (await made.pipeline.run(call())).report.shadow == len(lost.value.failed_rows)


async def test_an_expert_without_a_copy_fails_its_rows_only_and_no_other_call() -> None:
    made = setup(lambda _, index: [] if index == 4 else [copy_on("a", version_of(index))])
    asked = call(num_tokens=40)
    chosen = made.model.layer(3).gate(asked.hidden_states).ids_TK
    with pytest.raises(ExpertUnavailable) as lost:
        await made.pipeline.run(asked)
    assert lost.value.failed_rows == tuple(torch.nonzero((chosen == 4).any(dim=1)).flatten().tolist())
    assert f"{NAME}:3/4" in str(lost.value)
    fine = torch.nonzero((chosen != 4).all(dim=1)).flatten()
    rest = call(hidden_states=asked.hidden_states[fine])
    assert torch.equal((await made.pipeline.run(rest)).hidden_states, expected(rest, made.model))


async def test_all_rows_of_all_lost_experts_are_named_at_once() -> None:
    made = setup(lambda _, index: [copy_on(f"a{index}", version_of(index))])
    for index in (1, 3):
        made.lanes.break_actor(f"a{index}", ERRORS[0])
    asked = call(num_tokens=40)
    chosen = made.model.layer(3).gate(asked.hidden_states).ids_TK
    with pytest.raises(ExpertUnavailable, match="1 more") as lost:
        await made.pipeline.run(asked)
    assert lost.value.failed_rows == tuple(torch.nonzero(((chosen == 1) | (chosen == 3)).any(dim=1)).flatten().tolist())


async def test_a_copy_published_meanwhile_is_used_for_the_second_try() -> None:
    made = setup(lambda _, index: [copy_on("a", version_of(index), generation=1)])
    made.lanes.hold()
    running = asyncio.ensure_future(made.pipeline.run(call(want_plan=True)))
    await made.lanes.wait_until_submitted(E)
    made.table = table(lambda _, index: [copy_on("a", version_of(index), generation=2)], epoch=8)
    made.lanes.break_actor("a/g1", ReplicaRejected("generation 1 is gone"))
    made.lanes.let_go()
    report = (await running).report
    assert report.epoch == 7
    assert (report.plan.generations == 2).all()
    assert (report.plan.attempts == 1).all()


async def test_the_number_of_tries_is_bounded_however_many_copies_there_are() -> None:
    made = setup(lambda _, index: [copy_on(f"a{place}", version_of(index)) for place in range(30)])
    for place in range(30):
        made.lanes.break_actor(f"a{place}", ERRORS[0])
    with pytest.raises(ExpertUnavailable):
        await made.pipeline.run(call())
    assert max(request.attempt for request in made.lanes.requests) == MAX_ATTEMPTS - 1


async def test_no_copy_is_tried_twice_by_one_call() -> None:
    made = setup(lambda _, index: [copy_on(f"a{place}", version_of(index)) for place in range(4)])
    for place in range(4):
        made.lanes.break_actor(f"a{place}", ERRORS[0])
    with pytest.raises(ExpertUnavailable, match="none of its 4 copies"):
        await made.pipeline.run(call())
    tries = Counter((request.expert, request.copy) for request in made.lanes.requests)
    assert set(tries.values()) == {1}


async def test_a_retry_that_hangs_still_ends_by_the_deadline() -> None:
    made = setup(two_replicas)
    made.lanes.hold()
    running = asyncio.ensure_future(made.pipeline.run(call(timeout_s=0.2)))
    await made.lanes.wait_until_submitted(E)
    made.lanes.fail_next("a", *[ERRORS[0]] * E)
    with pytest.raises(DeadlineExceeded):
        await running


FATES = st.lists(st.sampled_from(["ok", "ok", "ok", "broken", "missing"]), min_size=3 * E, max_size=3 * E)


@settings(deadline=None, max_examples=80)
@given(fates=FATES, exact=st.booleans(), seed=st.integers(0, 1000))
async def test_under_any_mix_of_failures_every_choice_is_accounted_for_or_its_row_is_named(fates: list[str], exact: bool, seed: int) -> None:
    """Three copies of each expert, the third a shadow; each is well, broken or not there."""

    def copies(_: int, index: int) -> list[TableCopy]:
        roles = (Role.REPLICA, Role.REPLICA, Role.SHADOW)
        placed = [copy_on(f"{index}-{place}", version_of(index), generation=place, role=role) for place, role in enumerate(roles)]
        return [copy for place, copy in enumerate(placed) if fates[3 * index + place] != "missing"]

    made = setup(copies)
    for at, fate in enumerate(fates):
        if fate == "broken":
            made.lanes.break_actor(f"{at // 3}-{at % 3}", ERRORS[at % len(ERRORS)])
    asked = call(seed, fidelity_exact=exact, want_plan=True)
    chosen = made.model.layer(3).gate(asked.hidden_states).ids_TK.numpy()
    dead = {index for index in range(E) if "ok" not in fates[3 * index : 3 * index + (2 if exact else 3)]}
    doomed = {row for row in range(T) if dead & set(chosen[row].tolist())}
    if doomed:
        with pytest.raises(ExpertUnavailable) as lost:
            await made.pipeline.run(asked)
        assert set() < set(lost.value.failed_rows) <= doomed
        return
    reply = await made.pipeline.run(asked)
    assert torch.equal(reply.hidden_states, expected(asked, made.model))
    _check_account(reply.report, fates, exact=exact)


def _check_account(report: Report, fates: list[str], *, exact: bool) -> None:
    assert report.num_choices == report.exact + report.shadow == T * K
    assert not (exact and report.shadow)
    plan = report.plan
    assert ((plan.outcomes == Outcome.SHADOW) == (plan.generations == 2)).all()
    for index in set(plan.expert_ids.flat):
        if "ok" in fates[3 * index : 3 * index + 2]:
            assert (plan.outcomes[plan.expert_ids == index] == Outcome.EXACT).all()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ReplicaFaulted("a/g1: the actor ran out of memory in this expert's forward"), r"the last one: REPLICA_FAULTED: .*ran out of memory"),
        (ReplicaUnavailable("connection to 10.1.2.3:4711 was reset"), r"the last one: REPLICA_UNAVAILABLE: its link was lost"),
    ],
)
async def test_the_callers_error_says_why_the_last_copy_did_not_answer_and_tells_no_address(error: ReplicaError, words: str) -> None:
    made = setup(two_replicas)
    made.lanes.break_actor("a", error)
    made.lanes.break_actor("b", error)
    with pytest.raises(ExpertUnavailable, match=words) as lost:
        await made.pipeline.run(call())
    assert "none of its 2 copies answered" in str(lost.value)
    assert "10.1.2.3" not in str(lost.value)
