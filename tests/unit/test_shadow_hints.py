"""A shadow is made ready while rows that only it could take are late, before it is asked, and let go after; an actor that advances keeps its rows."""

from __future__ import annotations

import asyncio

import pytest

from cluster.core.errors import ReplicaUnavailable
from cluster.core.ids import Incarnation, Role
from cluster.core.routing_table import TableCopy
from kit.lanes import copy_on
from kit.pipelines import E, Setup, call, setup, version_of
from kit.virtual_time import VirtualLoop, run_in_virtual_time
from router_service.core.hedging import HedgeBudget, Lateness
from router_service.dispatcher import Hedging

STEP_S = 0.005
LATE_S, SHADOW_S = 0.02, 0.08


def with_replicas(num_replicas: int, still_s: float | None = None) -> Setup:
    """Every expert with so many replicas and a shadow; nobody answers, and everybody is said to stand still for so long."""

    def copies(_: int, index: int) -> list[TableCopy]:
        replicas = [copy_on(f"a{number}", version_of(index)) for number in range(num_replicas)]
        return [*replicas, copy_on("shadows", version_of(90 + index), role=Role.SHADOW)]

    lateness = Lateness(0.99, LATE_S, unlearned_s=0.0, unlearned_s_per_row=0.0)
    made = setup(copies, hedging=Hedging(lateness, HedgeBudget(0.05, 1e6), SHADOW_S, lambda _actor, _now_s: still_s))
    made.lanes.hold()
    return made


async def held_for(made: Setup, time_s: float, **fields: object) -> list[Role]:
    """Have a call wait for so long under a pulse; whom it has asked by then, in order."""
    loop = asyncio.get_running_loop()
    asked = asyncio.ensure_future(made.pipeline.run(call(**fields)))
    until_s = loop.time() + time_s
    while loop.time() < until_s:
        await asyncio.sleep(STEP_S)
        made.pipeline.dispatcher.pulse(loop.time())
    await asyncio.sleep(0)
    roles = [request.copy.role for request in made.lanes.requests]
    asked.cancel()
    await asyncio.wait([asked])
    return roles


def test_a_shadow_is_hinted_at_once_for_each_late_part_before_it_is_asked() -> None:
    made = with_replicas(1)
    assert run_in_virtual_time(held_for(made, LATE_S + STEP_S), VirtualLoop()) == [Role.REPLICA] * E
    assert made.lanes.warmed == []  # late, but so is a hundredth of all rows
    made = with_replicas(1)
    assert run_in_virtual_time(held_for(made, SHADOW_S - 2 * STEP_S), VirtualLoop()) == [Role.REPLICA] * E
    assert sorted(expert.index for expert, _ in made.lanes.warmed) == list(range(E))
    assert {copy for _, copy in made.lanes.warmed} == {TableCopy(Incarnation("shadows", 1), version_of(90 + index), Role.SHADOW) for index in range(E)}
    made = with_replicas(1)
    assert run_in_virtual_time(held_for(made, SHADOW_S + 3 * STEP_S), VirtualLoop()) == [Role.REPLICA] * E + [Role.SHADOW] * E
    assert len(made.lanes.warmed) == E


async def answered_after(made: Setup, time_s: float) -> None:
    """Have a call wait for so long under a pulse, then let everybody answer; what replicas had not answered by then, shadows may have."""
    loop = asyncio.get_running_loop()
    asked = asyncio.ensure_future(made.pipeline.run(call()))
    loop.call_later(time_s, made.lanes.let_go)
    while not asked.done():
        await asyncio.sleep(STEP_S)
        made.pipeline.dispatcher.pulse(loop.time())
    await asked


def test_a_shadow_is_let_go_once_for_each_hint_with_who_answered_and_when_nobody_waits_any_more() -> None:
    made = with_replicas(1)
    run_in_virtual_time(answered_after(made, SHADOW_S - 2 * STEP_S), VirtualLoop())
    assert made.lanes.released == [(expert, copy, True) for expert, copy in made.lanes.warmed]
    assert len(made.lanes.warmed) == E
    made = with_replicas(1)
    made.lanes.break_actor("a0", ReplicaUnavailable("gone"))  # found out when everybody answers
    run_in_virtual_time(answered_after(made, SHADOW_S - 2 * STEP_S), VirtualLoop())
    assert sorted(made.lanes.released) == sorted((expert, copy, False) for expert, copy in made.lanes.warmed)
    assert len(made.lanes.released) == E
    made = with_replicas(1)
    run_in_virtual_time(held_for(made, SHADOW_S - 2 * STEP_S), VirtualLoop())  # its caller leaves
    assert sorted(made.lanes.released) == sorted((expert, copy, False) for expert, copy in made.lanes.warmed)


@pytest.mark.parametrize(("num_replicas", "exact"), [(3, False), (1, True)])
def test_no_shadow_is_hinted_at_that_would_not_be_asked_next(num_replicas: int, exact: bool) -> None:
    made = with_replicas(num_replicas)
    roles = run_in_virtual_time(held_for(made, SHADOW_S - 2 * STEP_S, fidelity_exact=exact), VirtualLoop())
    assert set(roles) == {Role.REPLICA}
    assert made.lanes.warmed == []


def test_rows_that_are_merely_late_stay_with_an_actor_that_advances_for_four_times_as_long() -> None:
    made = with_replicas(1, still_s=0.0)
    assert run_in_virtual_time(held_for(made, 4 * SHADOW_S - 2 * STEP_S), VirtualLoop()) == [Role.REPLICA] * E
    assert made.lanes.warmed == []
    made = with_replicas(1, still_s=0.0)
    assert run_in_virtual_time(held_for(made, 4 * SHADOW_S + 3 * STEP_S), VirtualLoop()) == [Role.REPLICA] * E + [Role.SHADOW] * E


def test_rows_of_an_actor_that_stands_still_go_to_a_shadow_once_they_are_late_and_not_before() -> None:
    made = with_replicas(1, still_s=SHADOW_S)
    assert run_in_virtual_time(held_for(made, LATE_S - STEP_S), VirtualLoop()) == [Role.REPLICA] * E
    made = with_replicas(1, still_s=SHADOW_S)
    assert run_in_virtual_time(held_for(made, LATE_S + 2 * STEP_S), VirtualLoop()) == [Role.REPLICA] * E + [Role.SHADOW] * E


def test_another_replica_is_asked_though_the_actor_advances() -> None:
    made = with_replicas(2, still_s=0.0)
    assert run_in_virtual_time(held_for(made, LATE_S + 3 * STEP_S), VirtualLoop()) == [Role.REPLICA] * 2 * E
