"""Calls that share a dispatch: the same bits as alone, an account each, and nobody's fate depends on who else came."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core.errors import DataLoss, DeadlineExceeded, ExpertUnavailable, InvalidRequest, InvariantBroken, MoeError, Overloaded, ReplicaFaulted
from cluster.core.ids import ExpertId, Role
from cluster.core.routing_table import RoutingTable, TableCopy
from cluster.telemetry.metrics import RouterMetrics
from cluster.telemetry.tracing import Tracing
from kit.lanes import copy_on
from kit.pipelines import NAME, E, K, Setup, call, expected, one_copy_each, setup, version_of
from kit.virtual_time import VirtualLoop, run_in_virtual_time
from router_service.caller import tenant_of_call
from router_service.core.hedging import HedgeBudget, Lateness
from router_service.core.wave import DEADLINE_SLACK, Patience, Share, WaveDraft, WaveLimits
from router_service.counted_lanes import CountedLanes
from router_service.dispatcher import Hedging
from router_service.pipeline import GateChoice, LayerCall, LayerReply, Overflow, TopK

LIMITS = WaveLimits(max_overlapping_calls=1, max_hold_s=10.0)
TRACEPARENT = f"00-{7:032x}-{7:016x}-01"


async def together(made: Setup, first: LayerCall, others: Sequence[LayerCall]) -> list[LayerReply | BaseException]:
    """The outcomes of calls of which all but the first come while that one is under way."""
    made.lanes.hold()
    tasks = [asyncio.ensure_future(made.pipeline.run(first))]
    await settled()
    tasks += [asyncio.ensure_future(made.pipeline.run(other)) for other in others]
    await settled()
    made.lanes.let_go()
    return await asyncio.gather(*tasks, return_exceptions=True)


async def settled() -> None:
    """Until everything that can go on has."""
    for _ in range(20):
        await asyncio.sleep(0)


def choices(*rows: Sequence[int]) -> TopK:
    """The caller's own choices, of equal weight."""
    ids_TK = torch.tensor(rows, dtype=torch.int32)
    return TopK(ids_TK, torch.full(ids_TK.shape, 0.5))


async def test_calls_that_come_while_one_is_under_way_share_a_dispatch_and_get_the_same_bits() -> None:
    made, calls = setup(waves=LIMITS), [call(seed, num_tokens=1 + seed) for seed in range(6)]
    replies = await together(made, calls[0], calls[1:])
    for asked, reply in zip(calls, replies, strict=True):
        assert torch.equal(reply.hidden_states, expected(asked, made.model))
        assert reply.report.exact == reply.report.num_choices == asked.hidden_states.shape[0] * K
    rows = sum(len(request.rows) for request in made.lanes.requests)
    assert rows == K * sum(asked.hidden_states.shape[0] for asked in calls)
    assert len(made.lanes.requests) <= 2 * E, "six calls, two dispatches"


async def test_without_waves_every_call_is_dispatched_by_itself() -> None:
    made, calls = setup(waves=replace(LIMITS, max_calls=1)), [call(seed) for seed in range(4)]
    await together(made, calls[0], calls[1:])
    assert len(made.lanes.requests) == 4 * E


async def test_few_calls_wait_for_nobody() -> None:
    made = setup(waves=replace(LIMITS, max_overlapping_calls=3))
    made.lanes.hold()
    tasks = [asyncio.ensure_future(made.pipeline.run(call(seed))) for seed in range(4)]
    await made.lanes.wait_until_submitted(3 * E)
    await settled()
    assert len(made.lanes.requests) == 3 * E, "the fourth waits"
    made.lanes.let_go()
    await asyncio.gather(*tasks)
    assert len(made.lanes.requests) == 4 * E


async def test_a_wave_departs_when_it_is_full_and_when_its_patience_ends() -> None:
    for limits, num_calls in ((replace(LIMITS, max_calls=2), 4), (replace(LIMITS, max_hold_s=0.0), 2)):
        made = setup(waves=limits)
        made.lanes.hold()
        tasks = [asyncio.ensure_future(made.pipeline.run(call(seed))) for seed in range(num_calls)]
        await made.lanes.wait_until_submitted(2 * E)
        made.lanes.let_go()
        await asyncio.gather(*tasks)


@pytest.mark.parametrize(
    "change",
    [
        {"fidelity_exact": True},
        {"layer": 0},
        {"hidden_states": torch.ones(3, 16, dtype=torch.float32)},
        {"routing": choices([0, 1, 2], [0, 1, 2], [0, 1, 2])},
        {"traceparent": TRACEPARENT},
        {"hidden_states": torch.ones(3000, 16, dtype=torch.bfloat16)},
    ],
    ids=["fidelity", "layer", "dtype", "choices per token", "recorded", "large"],
)
async def test_calls_of_another_kind_do_not_share(change: dict[str, object]) -> None:
    tracing = Tracing.disabled()
    made = setup(waves=LIMITS, tracing=tracing)
    first, other = call(0, num_tokens=3), replace(call(1, num_tokens=3), **change)
    made.lanes.hold()
    tasks = [asyncio.ensure_future(made.pipeline.run(asked)) for asked in (first, other)]
    await settled()
    assert len({request.flow for request in made.lanes.requests}) == 2, "neither waits for the other"
    made.lanes.let_go()
    replies = await asyncio.gather(*tasks)
    assert torch.equal(replies[1].hidden_states, expected(other, made.model))


def counted(metrics: RouterMetrics) -> list[float]:
    """Dispatches, calls, how long all of these waited, and calls that did not wait at all."""
    names = ("moe_wave_calls_count", "moe_wave_calls_sum", "moe_wave_wait_seconds_sum")
    return [*(metrics.registry.get_sample_value(name) for name in names), metrics.registry.get_sample_value("moe_wave_wait_seconds_bucket", {"le": "0.0"})]


def test_waves_are_counted_by_their_calls_and_by_how_long_these_waited() -> None:
    async def waits(made: Setup, held_s: float, gone_s: float, **fields: object) -> None:
        made.lanes.hold()
        tasks = [asyncio.ensure_future(made.pipeline.run(call(seed, **fields))) for seed in range(4)]
        await asyncio.sleep(gone_s)
        tasks[3].cancel()
        await asyncio.sleep(held_s - gone_s)
        made.lanes.let_go()
        await asyncio.gather(*tasks[:3])

    metrics = RouterMetrics()
    run_in_virtual_time(waits(setup(waves=LIMITS, metrics=metrics), 0.25, 0.125), VirtualLoop())
    assert counted(metrics) == [2, 3, 0.5, 1], "one at once, two together, and one who left"
    metrics = RouterMetrics()
    run_in_virtual_time(waits(setup(waves=LIMITS, metrics=metrics), 0.25, 0.125, traceparent=TRACEPARENT), VirtualLoop())
    assert counted(metrics) == [4, 4, 0.0, 4], "recorded: each by itself"


async def test_tenants_do_not_share() -> None:
    made = setup(waves=LIMITS)
    made.lanes.hold()
    tasks = []
    for tenant in ("a", "b"):
        tenant_of_call.set(tenant)
        tasks.append(asyncio.ensure_future(made.pipeline.run(call())))
    await settled()
    assert len({request.flow for request in made.lanes.requests}) == 2
    made.lanes.let_go()
    await asyncio.gather(*tasks)


async def test_an_overflow_policy_acts_inside_one_call_only() -> None:
    made = setup(waves=LIMITS)
    routing = GateChoice(overflow=Overflow.DROP, capacity_factor=0.5)
    calls = [call(seed, num_tokens=9, routing=routing) for seed in range(4)]
    alone = [(await setup().pipeline.run(asked)).report.dropped for asked in calls]
    replies = await together(made, calls[0], calls[1:])
    assert [reply.report.dropped for reply in replies] == alone
    assert sum(alone) > 0


async def test_a_call_that_is_wrong_ends_alone() -> None:
    made = setup(waves=LIMITS)
    bad = call(1, num_tokens=2)
    bad.hidden_states[1, 3] = float("nan")
    good = call(2)
    replies = await together(made, call(0), [bad, good])
    assert isinstance(replies[1], InvalidRequest)
    assert torch.equal(replies[2].hidden_states, expected(good, made.model))


async def test_only_those_who_need_a_lost_expert_fail_for_it() -> None:
    made = setup(lambda layer, index: [] if index == 4 else one_copy_each(layer, index), waves=LIMITS)
    needs, does_not = choices([0, 4], [1, 2]), choices([0, 1], [3, 5])
    calls = [call(seed, num_tokens=2, routing=routing, fidelity_exact=True) for seed, routing in enumerate((does_not, needs, does_not, needs))]
    replies = await together(made, calls[0], calls[1:])
    for index in (0, 2):
        assert torch.equal(replies[index].hidden_states, expected(calls[index], made.model))
    for index in (1, 3):
        assert isinstance(replies[index], ExpertUnavailable)
        assert replies[index].failed_rows == (0,)
    assert replies[1] is not replies[3], "an exception belongs to one caller"


async def test_rows_that_overflow_the_experts_fail_their_own_call_alone() -> None:
    def overflowing(expert: ExpertId, _: str, rows_ND: torch.Tensor) -> torch.Tensor:
        return torch.where(rows_ND.abs() > 1e30, float("inf"), torch.tanh(rows_ND * (expert.index + 1)) + expert.layer)

    budget = HedgeBudget(0.0, 0.0)
    hedging = Hedging(Lateness(0.99, 1000.0), budget)
    made = setup(lambda _, index: [copy_on(f"a{place}", version_of(index)) for place in range(2)], waves=LIMITS, hedging=hedging)
    made.lanes._forward = overflowing
    lanes = made.pipeline.dispatcher.lanes = CountedLanes(made.lanes, RouterMetrics())
    huge = call(1, num_tokens=3)
    huge.hidden_states[2] = 2e30
    good = call(2)
    replies = await together(made, call(0), [huge, good])
    assert isinstance(replies[1], DataLoss)
    assert replies[1].failed_rows == (2,)
    assert torch.equal(replies[2].hidden_states, expected(good, made.model))
    assert made.pipeline.dispatcher.trust.is_calm, "nobody is blamed"
    rows = sum(len(request.rows) for request in made.lanes.requests)
    asked = K * sum(each.hidden_states.shape[0] for each in (call(0), huge, good))
    assert (budget.asked_rows, budget.asked_rows + budget.resent_rows) == (asked, rows), "asked once, sent as often as they were sent"
    assert lanes.take_loads().total() == asked, "what was dispatched again is no new load"


async def test_a_call_that_a_bug_ends_when_it_is_tried_by_itself_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = setup(waves=LIMITS), [call(seed, num_tokens=1 + seed) for seed in range(3)]
    plan = made.pipeline._plan

    def failing(shares: Sequence[Share], *rest: object) -> object:
        if len(shares) > 1:
            message = "of the wave"
            raise InvariantBroken(message)
        if shares[0].call is calls[1]:
            message = "of this call"
            raise RuntimeError(message)
        return plan(shares, *rest)

    monkeypatch.setattr(made.pipeline, "_plan", failing)
    async with asyncio.timeout(10):
        outcomes = await together(made, calls[0], calls[1:])
    assert isinstance(outcomes[1], RuntimeError)
    assert torch.equal(outcomes[2].hidden_states, expected(calls[2], made.model))


async def test_what_ends_a_dispatch_ends_its_calls_each_with_an_error_of_its_own() -> None:
    made, calls = setup(waves=LIMITS), [call(seed) for seed in range(3)]
    made.lanes.hold()
    tasks = [asyncio.ensure_future(made.pipeline.run(calls[0]))]
    await settled()
    tasks += [asyncio.ensure_future(made.pipeline.run(other)) for other in calls[1:]]
    await settled()
    made.lanes.let_go()
    await tasks[0]
    made.lanes.fail_next("a0", Overloaded("full", retry_after_s=0.25))
    outcomes = await asyncio.gather(*tasks[1:], return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Overloaded, Overloaded]
    assert [outcome.retry_after_s for outcome in outcomes] == [0.25, 0.25]
    assert outcomes[0] is not outcomes[1]


async def test_a_caller_who_leaves_takes_nobody_along_and_the_last_one_withdraws_the_rows() -> None:
    made = setup(waves=LIMITS)
    made.lanes.hold()
    first = asyncio.ensure_future(made.pipeline.run(call(0)))
    await settled()
    others = [asyncio.ensure_future(made.pipeline.run(call(seed))) for seed in (1, 2)]
    await settled()
    first.cancel()
    await made.lanes.wait_until_submitted(2 * E)
    assert len(made.lanes.withdrawn) == E
    others[0].cancel()
    await settled()
    assert len(made.lanes.withdrawn) == E, "another still waits for these rows"
    others[1].cancel()
    await settled()
    assert len(made.lanes.withdrawn) == 2 * E
    made.lanes.let_go()
    late = call(3)
    assert torch.equal((await made.pipeline.run(late)).hidden_states, expected(late, made.model)), "nothing is left that a call would wait for"


async def test_callers_who_leave_before_their_wave_departs_are_not_sent() -> None:
    made = setup(waves=LIMITS)
    made.lanes.hold()
    first = asyncio.ensure_future(made.pipeline.run(call(0)))
    await settled()
    other = asyncio.ensure_future(made.pipeline.run(call(1)))
    await settled()
    other.cancel()
    made.lanes.let_go()
    await first
    await settled()
    assert len(made.lanes.requests) == E


async def test_each_call_keeps_its_own_deadline() -> None:
    made = setup(waves=LIMITS)
    made.lanes.hold()
    tasks = [asyncio.ensure_future(made.pipeline.run(call(seed, timeout_s=timeout_s))) for seed, timeout_s in enumerate((9.0, 0.3, 0.301, 9.0))]
    outcomes = await asyncio.gather(*tasks[1:3], return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [DeadlineExceeded, DeadlineExceeded]
    made.lanes.let_go()
    assert isinstance(await tasks[0], LayerReply)
    assert isinstance(await tasks[3], LayerReply)


async def test_a_plan_tells_of_its_own_call_only() -> None:
    made = setup(waves=LIMITS)
    calls = [call(seed, num_tokens=2, routing=choices([seed, 5], [seed, 5]), want_plan=True) for seed in range(3)]
    replies = await together(made, calls[0], calls[1:])
    for seed, reply in enumerate(replies):
        plan = reply.report.plan
        assert plan.expert_ids.tolist() == [[seed, 5], [seed, 5]]
        assert plan.versions == tuple(sorted(bytes.fromhex(version_of(index)) for index in (seed, 5)))


async def test_a_shadow_counts_for_those_it_answered() -> None:
    def copies(layer: int, index: int) -> list[TableCopy]:
        return [copy_on("s", version_of(index), role=Role.SHADOW)] if index == 4 else one_copy_each(layer, index)

    made = setup(copies, waves=LIMITS)
    made.table = with_ladder(made)
    calls = [
        call(seed, num_tokens=2, routing=routing) for seed, routing in enumerate((choices([0, 1], [2, 3]), choices([4, 1], [2, 3]), choices([0, 1], [2, 3])))
    ]
    replies = await together(made, calls[0], calls[1:])
    assert [(reply.report.exact, reply.report.shadow, reply.report.degraded_tokens) for reply in replies] == [(4, 0, 0), (3, 1, 1), (4, 0, 0)]


def with_ladder(made: Setup) -> RoutingTable:
    """The table with shadows allowed."""
    entry = made.table.models[NAME]
    return replace(made.table, models={NAME: replace(entry, ladder=("shadow",))})


class TestDraft:
    def test_it_holds_no_more_than_its_limits_but_always_one(self) -> None:
        made = self._call(1000)
        draft = WaveDraft.around(made, WaveLimits(max_calls=3, max_bytes=10), 0.0)
        assert draft.take(made)
        assert not draft.take(made), "bytes"
        small = WaveDraft.around(made, WaveLimits(max_calls=2), 0.0)
        assert [small.take(made) for _ in range(3)] == [True, True, False]

    def test_deadlines_lie_close_to_each_other(self) -> None:
        first = self._call(deadline_s=10.0)
        draft = WaveDraft.around(first, WaveLimits(), 0.0)
        assert draft.take(first)
        assert draft.take(self._call(deadline_s=10.0 * (1 + 0.9 * DEADLINE_SLACK)))
        assert not draft.take(self._call(deadline_s=10.0 * (1 + 1.1 * DEADLINE_SLACK)))
        assert not draft.take(self._call(deadline_s=9.0))
        assert (draft.earliest_s, draft.latest_s) == (10.0, 10.0 * (1 + 0.9 * DEADLINE_SLACK))

    def test_patience_follows_what_waves_take_within_its_bounds(self) -> None:
        patience = Patience(WaveLimits(max_hold_s=0.05))
        assert patience.hold_s == 0.05, "nothing is known yet"
        patience.learn(0.01)
        assert patience.hold_s == pytest.approx(0.02)
        for _ in range(100):
            patience.learn(1.0)
        assert patience.hold_s == 0.05

    @staticmethod
    def _call(num_tokens: int = 2, deadline_s: float = 10.0) -> LayerCall:
        return LayerCall("r", NAME, 3, torch.zeros(num_tokens, 16), GateChoice(), deadline_s)


async def _checked(seeds: Sequence[int], tokens: Sequence[int], broken: bool) -> None:
    made = setup(lambda _, index: [copy_on(f"a{place}", version_of(index)) for place in (index % 3, 3)], waves=LIMITS)
    if broken:
        made.lanes.break_actor("a1", ReplicaFaulted("raised"))
    calls = [call(seed, num_tokens=count) for seed, count in zip(seeds, tokens, strict=True)]
    for asked, reply in zip(calls, await together(made, calls[0], calls[1:]), strict=True):
        assert not isinstance(reply, MoeError | BaseException)
        assert torch.equal(reply.hidden_states, expected(asked, made.model))
        assert sum(reply.report.counts.values()) == asked.hidden_states.shape[0] * K


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 12)), min_size=2, max_size=8), st.booleans())
def test_whatever_meets_everybody_gets_what_he_would_get_alone(drawn: list[tuple[int, int]], broken: bool) -> None:
    asyncio.run(_checked([seed for seed, _ in drawn], [count for _, count in drawn], broken))
