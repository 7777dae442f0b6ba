"""Answers that are not finite: blamed on the copy that gave them, or on rows that overflow, never passed on and never on a healthy copy."""

import asyncio
import math

import pytest
import torch

from cluster.core.errors import DataLoss, ExpertUnavailable, Overloaded, ReplicaCorrupt, ReplicaUnavailable
from cluster.core.ids import ExpertId, Role
from cluster.core.routing_table import TableCopy
from kit.lanes import copy_on
from kit.pipelines import NAME, K, Setup, T, call, expected, expert_forward, setup, table, version_of
from router_service.caller import tenant_of_call
from router_service.core.segments import OnEnd, SegmentRequest, Withdraw
from router_service.core.trust import Rank, Trust
from router_service.pipeline import TopK

SICK = f"{99:064x}"
IDS_TK = torch.tensor([[0, 1], [2, 1], [1, 0], [0, 2]], dtype=torch.int32)


def chosen(**fields: object) -> object:
    return call(num_tokens=4, routing=TopK(IDS_TK, torch.ones(4, 2)), **fields)


def sick_forward(expert: ExpertId, version: str, rows: torch.Tensor) -> torch.Tensor:
    """A copy of the version SICK has a NaN among its weights."""
    answer = expert_forward(expert, version, rows)
    return answer * math.nan if version == SICK else answer


def overflowing(expert: ExpertId, version: str, rows: torch.Tensor) -> torch.Tensor:
    """Healthy weights, which large rows overflow."""
    return torch.where(rows.abs() > 1e20, torch.inf, expert_forward(expert, version, rows))


def made_of(*roles_and_versions: tuple[Role, str], busy: tuple[str, ...] = ()) -> Setup:
    """Every expert with these copies, expert 2's as given, others healthy; those that are `busy` are asked last."""

    def copies(_: int, index: int) -> list[TableCopy]:
        return [
            copy_on(f"a{place}", version if index == 2 else version_of(index), generation=place + 1, role=role)
            for place, (role, version) in enumerate(roles_and_versions)
        ]

    made = setup(copies, trust=Trust())
    made.lanes._forward = sick_forward
    for name in busy:
        made.lanes.queued[name] = 100
    return made


async def test_a_copy_with_a_nan_is_blamed_by_a_witness_whose_answer_is_used() -> None:
    made = made_of((Role.REPLICA, SICK), (Role.REPLICA, version_of(2)), busy=("a1",))
    asked = chosen(want_plan=True)
    reply = await made.pipeline.run(asked)
    assert torch.equal(reply.hidden_states, expected(asked, made.model))
    assert reply.report.exact == 8
    trust = made.pipeline.dispatcher.trust
    assert [(expert.index, copy.incarnation.actor_id, kind) for expert, copy, kind in trust.take_accusations()] == [(2, "a0", "non_finite")]
    assert (reply.report.plan.generations[IDS_TK.numpy() == 2] == 2).all()


async def test_a_blamed_copy_is_asked_no_more_until_the_table_has_it_anew() -> None:
    made = made_of((Role.REPLICA, SICK), (Role.REPLICA, version_of(2)), busy=("a1",))
    await made.pipeline.run(chosen())
    made.lanes.requests.clear()
    await made.pipeline.run(chosen())
    assert {request.copy.version for request in made.lanes.requests if request.expert.index == 2} == {version_of(2)}
    trust, expert = made.pipeline.dispatcher.trust, ExpertId(NAME, 3, 2)
    sick = made.table.copies_of(expert)[0]
    assert trust.rank(expert, sick) is Rank.NEVER
    trust.adopt(made.table)
    assert trust.rank(expert, sick) is Rank.NEVER
    trust.adopt(table(lambda _, index: [copy_on("a1", version_of(index))]))
    assert trust.rank(expert, sick) is Rank.GOOD


async def test_rows_that_overflow_every_copy_are_data_loss_with_the_rows_and_nobody_is_blamed() -> None:
    made = made_of((Role.REPLICA, version_of(2)), (Role.REPLICA, version_of(2)))
    made.lanes._forward = overflowing
    asked = chosen()
    asked.hidden_states[3] = 1e30
    with pytest.raises(DataLoss) as lost:
        await made.pipeline.run(asked)
    assert lost.value.failed_rows == (3,)
    assert made.pipeline.dispatcher.trust.is_calm


async def test_without_a_witness_a_golden_row_clears_healthy_weights() -> None:
    made = made_of((Role.REPLICA, version_of(2)), (Role.SHADOW, version_of(50)))
    made.lanes._forward = overflowing
    asked = chosen()
    asked.hidden_states[1] = 1e30
    with pytest.raises(DataLoss) as lost:
        await made.pipeline.run(asked)
    assert lost.value.failed_rows == (1,)
    assert made.pipeline.dispatcher.trust.is_calm
    assert {request.copy.role for request in made.lanes.requests} == {Role.REPLICA}
    assert set(made.lanes.released) == {(expert, copy, True) for expert, copy in made.lanes.warmed}, "a replica's answer stands"
    assert made.lanes.warmed


@pytest.mark.parametrize("has_shadow", [False, True])
async def test_rows_that_the_only_copy_could_not_do_once_do_not_overflow(has_shadow: bool) -> None:
    """It may have been loaded anew between its answer and the golden row, or have erred once: nobody is blamed for that, least of all the rows."""
    made = made_of((Role.REPLICA, version_of(2)), *[(Role.SHADOW, version_of(2))] * has_shadow)
    num_answers = 0

    def forward(expert: ExpertId, version: str, rows: torch.Tensor) -> torch.Tensor:
        nonlocal num_answers
        num_answers += expert.index == 2
        answer = expert_forward(expert, version, rows)
        return answer * math.nan if expert.index == 2 and num_answers == 1 else answer

    made.lanes._forward = forward
    if has_shadow:
        assert (await made.pipeline.run(chosen())).report.shadow == 2
    else:
        with pytest.raises(ExpertUnavailable, match="not finite") as lost:
            await made.pipeline.run(chosen())
        assert lost.value.failed_rows == (1, 3)
    assert made.pipeline.dispatcher.trust.is_calm


async def test_without_a_witness_a_golden_row_convicts_and_the_shadow_answers() -> None:
    made = made_of((Role.REPLICA, SICK), (Role.SHADOW, version_of(2)))
    asked = chosen(want_plan=True)
    reply = await made.pipeline.run(asked)
    assert (reply.report.exact, reply.report.shadow) == (6, 2)
    assert torch.equal(reply.hidden_states, expected(asked, made.model))
    golden = [request for request in made.lanes.requests if request.expert.index == 2 and len(request.rows) == 1]
    assert len(golden) == 1
    assert golden[0].copy.version == SICK


async def test_a_shadow_is_made_ready_while_the_golden_row_is_under_way_unless_the_call_is_exact() -> None:
    made = made_of((Role.REPLICA, SICK), (Role.SHADOW, version_of(2)))
    await made.pipeline.run(chosen())
    assert [(expert.index, copy.role) for expert, copy in made.lanes.warmed] == [(2, Role.SHADOW)]
    assert [is_back for _, _, is_back in made.lanes.released] == [False], "it answers now"
    made = made_of((Role.REPLICA, SICK), (Role.SHADOW, version_of(2)))
    with pytest.raises(ExpertUnavailable):
        await made.pipeline.run(chosen(fidelity_exact=True))
    assert made.lanes.warmed == []


async def test_a_copy_that_another_call_has_convicted_meanwhile_is_not_asked_for_a_golden_row_again() -> None:
    made = made_of((Role.REPLICA, SICK), (Role.SHADOW, version_of(2)))
    made.lanes.hold()
    calls = [asyncio.create_task(made.pipeline.run(chosen())) for _ in range(3)]
    await made.lanes.wait_until_submitted(9)
    trust, expert = made.pipeline.dispatcher.trust, ExpertId(NAME, 3, 2)
    trust.accuse(expert, made.table.copies_of(expert)[0], "non_finite", by="another", now_s=0.0)
    made.lanes.let_go()
    for reply in await asyncio.gather(*calls):
        assert (reply.report.exact, reply.report.shadow) == (6, 2)
        assert torch.isfinite(reply.hidden_states).all()
    assert not [request for request in made.lanes.requests if len(request.rows) == 1]
    assert sum(trust.take_accusations().values()) == 1


async def test_the_only_copy_convicted_leaves_the_call_unavailable_and_an_exact_call_never_takes_the_shadow() -> None:
    for roles, fields in (([(Role.REPLICA, SICK)], {}), ([(Role.REPLICA, SICK), (Role.SHADOW, version_of(2))], {"fidelity_exact": True})):
        made = made_of(*roles)
        with pytest.raises(ExpertUnavailable, match="not finite") as lost:
            await made.pipeline.run(chosen(**fields))
        assert lost.value.failed_rows == (1, 3)
        assert Role.SHADOW not in {request.copy.role for request in made.lanes.requests}


async def test_rows_that_overflow_excuse_no_copy_that_fails_on_others() -> None:
    """The copy with a NaN is blamed although its witness overflows, too; of the rows only those are named that overflow."""
    made = made_of((Role.REPLICA, SICK), (Role.REPLICA, version_of(2)), busy=("a1",))

    def forward(expert: ExpertId, version: str, rows: torch.Tensor) -> torch.Tensor:
        answer = overflowing(expert, version, rows) if expert.index == 2 else expert_forward(expert, version, rows)
        return answer * math.nan if version == SICK else answer

    made.lanes._forward = forward
    asked = chosen()
    asked.hidden_states[3] = 1e30
    with pytest.raises(DataLoss) as lost:
        await made.pipeline.run(asked)
    assert lost.value.failed_rows == (3,)
    assert [copy.version for _, copy, _ in made.pipeline.dispatcher.trust.take_accusations()] == [SICK]


async def test_a_witness_that_does_not_answer_is_replaced_by_the_next() -> None:
    made = made_of((Role.REPLICA, SICK), (Role.REPLICA, version_of(2)), (Role.REPLICA, version_of(2)), busy=("a1", "a2"))
    made.lanes.break_actor("a1", ReplicaUnavailable("reset"))
    reply = await made.pipeline.run(chosen())
    assert reply.report.exact == 8


async def test_who_may_accuse_nobody_any_more_is_still_answered_by_the_shadow() -> None:
    """The quota keeps a tenant from talking a router out of its copies; it is no reason to ask the sick copy again and then to blame the rows."""
    made = made_of((Role.REPLICA, SICK), (Role.SHADOW, version_of(2)))
    trust, tenant = made.pipeline.dispatcher.trust, tenant_of_call.get()
    now_s = asyncio.get_running_loop().time()
    while trust.accuse(ExpertId(NAME, 0, 5), copy_on("elsewhere", version_of(5)), "non_finite", by=tenant, now_s=now_s):
        pass
    asked = chosen()
    reply = await made.pipeline.run(asked)
    assert (reply.report.exact, reply.report.shadow) == (6, 2)
    assert torch.equal(reply.hidden_states, expected(asked, made.model))
    assert [request.copy.version for request in made.lanes.requests if request.expert.index == 2] == [SICK, SICK, version_of(2)]  # the second: golden


@pytest.mark.parametrize("has_shadow", [False, True])
async def test_where_nobody_can_tell_the_copy_is_not_asked_again_and_the_rows_are_not_blamed(has_shadow: bool) -> None:
    made = made_of((Role.REPLICA, SICK), *[(Role.SHADOW, version_of(2))] * has_shadow)

    def forward(expert: ExpertId, version: str, rows: torch.Tensor) -> torch.Tensor:
        if version == SICK and len(rows) == 1:
            message = "gone before the golden row"
            raise ReplicaUnavailable(message)
        return sick_forward(expert, version, rows)

    made.lanes._forward = forward
    if has_shadow:
        assert (await made.pipeline.run(chosen())).report.shadow == 2
    else:
        with pytest.raises(ExpertUnavailable, match="not finite") as lost:
            await made.pipeline.run(chosen())
        assert lost.value.failed_rows == (1, 3)
    assert sum(request.copy.version == SICK for request in made.lanes.requests) == 2


async def test_a_doubt_that_ends_the_call_withdraws_the_questions_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_of((Role.REPLICA, version_of(2)))
    made.lanes._forward = lambda expert, version, rows: expert_forward(expert, version, rows) * math.nan
    begin, withdrawn = made.lanes.begin, []

    def refusing(request: SegmentRequest, on_end: OnEnd) -> Withdraw:
        if len(request.rows) > 1:
            return begin(request, on_end)
        if request.expert.index == 2:
            asyncio.get_running_loop().call_soon(on_end, Overloaded("full"))
        return lambda: withdrawn.append(request.expert.index)

    monkeypatch.setattr(made.lanes, "begin", refusing)
    with pytest.raises(Overloaded):
        await made.pipeline.run(chosen())
    await asyncio.sleep(0)
    assert sorted(withdrawn) == [0, 1, 2]


async def test_a_checksum_that_fails_sends_the_rows_to_another_copy_and_accuses_the_first() -> None:
    made = made_of((Role.REPLICA, version_of(2)), (Role.REPLICA, version_of(2)), busy=("a1",))
    made.lanes.fail_next("a0", ReplicaCorrupt("checksum"))
    reply = await made.pipeline.run(call())
    assert reply.report.exact == T * K
    assert [kind for _, _, kind in made.pipeline.dispatcher.trust.take_accusations()] == ["checksum"]


def test_one_tenant_can_accuse_only_so_many_copies_a_minute() -> None:
    trust, copy = Trust(), copy_on("a", version_of(1))
    believed = [trust.accuse(ExpertId(NAME, 0, index), copy, "non_finite", by="mallory", now_s=1.0) for index in range(40)]
    assert sum(believed) < 40
    assert believed == sorted(believed, reverse=True)
    assert trust.accuse(ExpertId(NAME, 1, 0), copy, "non_finite", by="alice", now_s=1.0)
    assert trust.accuse(ExpertId(NAME, 1, 1), copy, "non_finite", by="mallory", now_s=62.0)
