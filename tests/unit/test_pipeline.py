"""The data path on lanes that answer in this process: right bits, a true account, and what happens when copies do not answer."""

import asyncio
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster.core.descriptors import DType
from cluster.core.errors import DeadlineExceeded, InvalidRequest, NotFound, NotReady, Overloaded
from kit.lanes import copy_on
from kit.pipelines import D, E, K, T, call, expected, setup, version_of
from router_service import pipeline as pipeline_module
from router_service.core.dispatch_limits import REQUEST_SHARE, DispatchLimits
from router_service.pipeline import GateChoice, Outcome, Overflow, TopK


async def test_a_gated_call_equals_the_reference_bit_for_bit() -> None:
    made, asked = setup(), call()
    reply = await made.pipeline.run(asked)
    assert torch.equal(reply.hidden_states, expected(asked, made.model))
    assert reply.report.counts == {"exact": T * K, "shadow": 0, "omitted": 0, "generalist": 0, "dense": 0, "dropped": 0, "unused": 0}
    assert (reply.report.epoch, reply.report.degraded_tokens, reply.report.plan) == (7, 0, None)


async def test_a_callers_own_choices_are_used_as_they_are() -> None:
    ids_TK = torch.tensor([[0, 5, -1], [-1, -1, -1], [3, -1, 2]], dtype=torch.int32)
    weights_TK = torch.tensor([[0.5, -1.25, math.nan], [1.0, 1.0, 1.0], [2.0, 9.0, 0.125]])
    made, asked = setup(), call(num_tokens=3, routing=TopK(ids_TK, weights_TK), want_plan=True)
    reply = await made.pipeline.run(asked)
    assert torch.equal(reply.hidden_states, expected(asked, made.model))
    assert not reply.hidden_states[1].any()
    assert (reply.report.exact, reply.report.unused, reply.report.degraded_tokens) == (4, 5, 0)
    assert reply.report.plan.weights.tolist() == [[0.5, -1.25, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.125]]


async def test_a_call_whose_choices_are_all_unused_sends_nothing_and_returns_zeros() -> None:
    made = setup()
    reply = await made.pipeline.run(call(num_tokens=2, routing=TopK(torch.full((2, 2), -1, dtype=torch.int32), torch.ones(2, 2))))
    assert not made.lanes.requests
    assert torch.equal(reply.hidden_states, torch.zeros(2, D, dtype=torch.bfloat16))
    assert reply.report.unused == reply.report.num_choices == 4


async def test_fp32_hidden_states_get_an_fp32_reply_from_a_bf16_model() -> None:
    made, asked = setup(), call(dtype=torch.float32)
    reply = await made.pipeline.run(asked)
    assert reply.hidden_states.dtype == torch.float32
    assert torch.equal(reply.hidden_states, expected(asked, made.model))
    assert {request.dtype for request in made.lanes.requests} == {DType.BF16}


async def test_a_thread_for_large_tensors_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = setup(), call()
    small = await made.pipeline.run(asked)
    monkeypatch.setattr(pipeline_module, "THREAD_BYTES", 0)
    large = await made.pipeline.run(asked)
    assert torch.equal(small.hidden_states, large.hidden_states)


async def test_all_rows_of_an_expert_go_to_one_copy_in_one_submit() -> None:
    made = setup(lambda _, index: [copy_on(f"a{place}", version_of(index)) for place in range(4)])
    await made.pipeline.run(call(num_tokens=200))
    assert len(made.lanes.requests) == len({request.expert for request in made.lanes.requests}) == E
    assert sum(len(request.rows) for request in made.lanes.requests) == 200 * K
    assert len({request.copy.incarnation.actor_id for request in made.lanes.requests}) > 1


async def test_the_busier_of_two_replicas_is_spared() -> None:
    made = setup(lambda _, index: [copy_on("busy", version_of(index)), copy_on("free", version_of(index))])
    made.lanes.queued["busy"] = 100
    await made.pipeline.run(call())
    assert {request.copy.incarnation.actor_id for request in made.lanes.requests} == {"free"}


async def test_a_segment_carries_what_actors_need() -> None:
    made, asked = setup(), call(fidelity_exact=True)
    await made.pipeline.run(asked)
    for request in made.lanes.requests:
        assert (request.expert.layer, request.deadline_s, request.exact, request.epoch, request.attempt) == (3, asked.deadline_s, True, 7, 0)
        assert request.rows.flags["C_CONTIGUOUS"]
        assert request.rows.shape[1] == request.row_bytes == 2 * D


async def test_the_plan_names_expert_version_generation_and_attempt_of_every_choice() -> None:
    made = setup(lambda _, index: [copy_on(f"a{index}", version_of(index + 40), generation=index + 100)])
    reply = await made.pipeline.run(call(want_plan=True))
    plan = reply.report.plan
    assert plan.expert_ids.shape == plan.weights.shape == (T, K)
    assert (plan.generations == plan.expert_ids + 100).all()
    assert (plan.attempts == 0).all()
    assert (plan.outcomes == Outcome.EXACT).all()
    assert all(plan.versions[at] == bytes.fromhex(version_of(index + 40)) for at, index in zip(plan.version_index.flat, plan.expert_ids.flat, strict=True))
    assert [array.dtype for array in (plan.expert_ids, plan.weights, plan.outcomes, plan.version_index, plan.generations, plan.attempts)] == [
        np.int32,
        np.float32,
        np.uint8,
        np.int32,
        np.int32,
        np.uint8,
    ]


@pytest.mark.parametrize("overflow", [Overflow.DROP, Overflow.NEXT_BEST])
async def test_capacity_is_counted_and_bounds_every_expert(overflow: Overflow) -> None:
    made = setup()
    reply = await made.pipeline.run(call(num_tokens=60, routing=GateChoice(None, overflow, 0.5), want_plan=True))
    assert all(len(request.rows) <= 10 for request in made.lanes.requests)
    assert reply.report.num_choices == 60 * K
    assert reply.report.dropped == int((reply.report.plan.outcomes == Outcome.DROPPED).sum()) > 0
    assert ((reply.report.plan.expert_ids == -1) == (reply.report.plan.outcomes == Outcome.DROPPED)).all()
    assert reply.report.degraded_tokens == int((reply.report.plan.outcomes == Outcome.DROPPED).any(axis=1).sum())


async def test_the_capacity_of_one_call_never_depends_on_another() -> None:
    made = setup()
    asked = call(routing=GateChoice(None, Overflow.DROP, 0.6), want_plan=True)
    alone = await made.pipeline.run(asked)
    others = [call(seed, num_tokens=50, routing=GateChoice(None, Overflow.NEXT_BEST, 0.5)) for seed in range(1, 9)]
    among = (await asyncio.gather(*(made.pipeline.run(each) for each in [*others, asked])))[-1]
    assert torch.equal(alone.hidden_states, among.hidden_states)
    assert (alone.report.plan.expert_ids == among.report.plan.expert_ids).all()


async def test_permuting_tokens_permutes_the_reply() -> None:
    made, asked = setup(), call()
    order = torch.randperm(T, generator=torch.Generator().manual_seed(4))
    straight = await made.pipeline.run(asked)
    shuffled = await made.pipeline.run(replace(asked, hidden_states=asked.hidden_states[order]))
    assert torch.equal(straight.hidden_states[order], shuffled.hidden_states)


async def test_unknown_models_and_layers_are_not_found_and_the_message_lists_what_there_is() -> None:
    made = setup()
    with pytest.raises(NotFound, match="served: tiny") as unknown_model:
        await made.pipeline.run(call(model="x" * 500))
    with pytest.raises(NotFound, match="those are 0, 3") as unknown_layer:
        await made.pipeline.run(call(layer=1))
    assert (unknown_model.value.resource, unknown_layer.value.resource) == ("model", "layer")
    assert len(unknown_model.value.name) == 128


async def test_a_router_without_a_table_is_not_ready() -> None:
    made = setup()
    made.table = None
    with pytest.raises(NotReady):
        await made.pipeline.run(call())


async def test_a_bad_call_sends_nothing_and_breaks_nothing_for_others() -> None:
    made = setup(max_tokens=50)
    good, bad = call(), [call(num_tokens=51), call(hidden_states=torch.full((2, D), math.nan)), call(hidden_states=torch.ones(2, D + 1))]
    results = await asyncio.gather(*(made.pipeline.run(each) for each in [*bad, good]), return_exceptions=True)
    assert [type(result) for result in results[:3]] == [InvalidRequest] * 3
    assert torch.equal(results[3].hidden_states, expected(good, made.model))
    assert sum(len(request.rows) for request in made.lanes.requests) == T * K


async def test_a_call_that_comes_too_late_computes_nothing() -> None:
    made = setup()
    with pytest.raises(DeadlineExceeded):
        await made.pipeline.run(call(timeout_s=-0.001))
    assert not made.lanes.requests


async def test_an_actor_that_never_answers_costs_the_deadline_and_no_more() -> None:
    made = setup()
    made.lanes.hold()
    with pytest.raises(DeadlineExceeded):
        await made.pipeline.run(call(timeout_s=0.05))


async def test_cancelling_a_call_withdraws_all_its_segments() -> None:
    made = setup()
    made.lanes.hold()
    running = asyncio.ensure_future(made.pipeline.run(call()))
    await made.lanes.wait_until_submitted(E)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert len(made.lanes.withdrawn) == len(made.lanes.requests) == E


async def test_an_error_that_no_other_copy_can_cure_ends_the_call_and_withdraws_the_rest() -> None:
    made = setup()
    made.lanes.hold()
    running = asyncio.ensure_future(made.pipeline.run(call()))
    await made.lanes.wait_until_submitted(E)
    made.lanes.fail_next("a1", Overloaded("full"))
    made.lanes.let_go()
    with pytest.raises(Overloaded, match="full"):
        await running


async def test_more_choices_than_one_request_may_have_are_refused_by_name_before_a_row_is_copied() -> None:
    row_bytes = D * 2
    made = setup(limits=DispatchLimits(max_choices=1000, max_bytes=REQUEST_SHARE * 30 * row_bytes))
    await made.pipeline.run(call(num_tokens=15))
    sent = len(made.lanes.requests)
    wide = TopK(torch.arange(6, dtype=torch.int32).repeat(6, 1), torch.ones(6, 6))
    for asked, field in ((call(num_tokens=16), "hidden_states.shape"), (call(num_tokens=6, routing=wide), "top_k.expert_ids.shape")):
        with pytest.raises(InvalidRequest, match=r"limit of 30 .*max_choices_per_request") as caught:
            await made.pipeline.run(asked)
        assert (caught.value.field, caught.value.retryable) == (field, False)
    assert len(made.lanes.requests) == sent


async def test_rows_of_all_requests_together_stay_within_the_dispatch_budget() -> None:
    made = setup(limits=DispatchLimits(max_bytes=2 * T * K * D * 2 * REQUEST_SHARE // 4))
    made.lanes.hold()
    calls = [asyncio.create_task(made.pipeline.run(call(num_tokens=T // 2))) for _ in range(4)]
    await made.lanes.wait_until_submitted(4)
    assert made.pipeline.budget.held_bytes == made.pipeline.budget.limit_bytes
    with pytest.raises(Overloaded, match=r"router\.max_dispatch_bytes") as caught:
        await made.pipeline.run(call(num_tokens=1))
    assert caught.value.retryable
    calls[0].cancel()
    await asyncio.wait(calls[:1])
    made.lanes.let_go()
    await asyncio.gather(*calls[1:])
    assert made.pipeline.budget.held_bytes == 0
