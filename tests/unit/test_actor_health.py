"""The router's reflex on real links: an actor that makes no progress loses its rows to others, and gets rows again once it answers."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import pytest
import torch

from cluster.core import link_handshake
from cluster.core.errors import ReplicaUnavailable
from cluster.core.ids import ExpertId, Incarnation, Role
from cluster.core.link_frames import Cool, Warm
from cluster.core.link_handshake import MAX_PROTOCOL
from cluster.core.routing_table import RoutingTable, TableCopy, TableModel
from kit.link import SECRET, VERSION, FakeActor, random_rows, request, running_actor, until
from kit.pipelines import NAME, E, K, T, call, served
from router_service.actor_health import ActorHealth
from router_service.core.hedging import HedgeBudget, Lateness
from router_service.core.liveness import Liveness
from router_service.core.trust import Rank, Trust
from router_service.core.verdicts import LivenessLimits, State
from router_service.dispatcher import Hedging
from router_service.lanes import Lanes
from router_service.pipeline import Pipeline

LIMITS = LivenessLimits(probe_s=0.02, suspect_s=0.05, eject_s=0.1, pace_floor_s=0.005, cold_floor_s=0.02)
NEVER_S = 1000.0


@dataclass
class Router:
    """A router's reflex over real links to actors whose experts give rows back as they are."""

    lanes: Lanes
    health: ActorHealth
    trust: Trust
    pipeline: Pipeline
    table: RoutingTable
    actors: list[FakeActor]


@asynccontextmanager
async def router(num_actors: int, *, hedge_s: float = NEVER_S, budget_rows: float = 1e6, roles: tuple[Role, ...] = ()) -> AsyncIterator[Router]:
    """Every expert has a copy on every actor; the first actor's is preferred, because the others have shadows unless `roles` says otherwise."""
    async with AsyncExitStack() as stack:
        actors = [await stack.enter_async_context(running_actor(f"actor-{number}", generation=number + 1)) for number in range(num_actors)]
        roles = roles or (Role.REPLICA, *[Role.SHADOW] * (num_actors - 1))
        copies = tuple(TableCopy(actor.endpoint.incarnation, VERSION, role) for actor, role in zip(actors, roles, strict=True))
        table = RoutingTable(
            1,
            {actor.endpoint.incarnation.actor_id: actor.endpoint for actor in actors},
            {ExpertId(NAME, layer, index): copies for layer in (0, 3) for index in range(E)},
            {NAME: TableModel(NAME, "", E, 0)},
        )
        trust = Trust()
        health = ActorHealth(Liveness(LIMITS), trust)
        lanes = Lanes(router_id="r", link_secret=SECRET, watch=health)
        await lanes.apply(table)
        await lanes.wait_until_settled(10)
        health.adopt(table)
        hedging = Hedging(Lateness(0.99, hedge_s), HedgeBudget(0.05, budget_rows), standstill_s=health.standstill_s)
        pipeline = Pipeline(lanes, {NAME: served()}, lambda: table, random.Random(0), trust=trust, hedging=hedging, shadows=health)
        health.on_pulse = pipeline.dispatcher.pulse
        health.start()
        try:
            yield Router(lanes, health, trust, pipeline, table, actors)
        finally:
            health.close()
            await lanes.close(1.0)


async def test_an_actor_whose_compute_thread_stands_still_is_ejected_and_its_rows_go_elsewhere() -> None:
    async with router(2) as made:
        stuck = made.actors[0]
        stuck.compute.gate.clear()
        reply = await made.pipeline.run(call())
        assert stuck.compute.frames
        assert made.health.num_ejections == 1
        assert made.health.state(str(stuck.endpoint.incarnation)) is State.EJECTED
        assert (reply.report.shadow, reply.report.exact) == (T * K, 0)
        assert made.health.changed.is_set()


async def test_after_an_ejection_new_rows_go_elsewhere_at_once_and_exact_ones_still_try() -> None:
    async with router(2) as made:
        made.actors[0].compute.gate.clear()
        await made.pipeline.run(call())
        before = len(made.actors[0].compute.frames)
        reply = await made.pipeline.run(call(1))
        assert reply.report.shadow == T * K
        assert len(made.actors[0].compute.frames) == before
        made.actors[0].compute.gate.set()
        assert (await made.pipeline.run(call(2, fidelity_exact=True))).report.exact == T * K


async def test_an_actor_that_answers_again_is_trusted_again() -> None:
    async with router(2) as made:
        name = str(made.actors[0].endpoint.incarnation)
        made.actors[0].compute.gate.clear()
        await made.pipeline.run(call())
        assert made.health.state(name) is State.EJECTED
        made.actors[0].compute.gate.set()
        seed = 0
        async with asyncio.timeout(20):
            while made.health.state(name) is not State.HEALTHY:
                seed += 1
                await made.pipeline.run(call(seed))
                await asyncio.sleep(0)
        await until(lambda: made.trust.is_calm)
        assert (await made.pipeline.run(call())).report.exact == T * K


async def test_an_actor_on_trial_gets_no_rows_beside_its_trial_though_nobody_else_is_distrusted() -> None:
    async with router(2, roles=(Role.REPLICA, Role.REPLICA)) as made:
        name = str(made.actors[0].endpoint.incarnation)
        made.actors[0].compute.gate.clear()
        waiting = asyncio.create_task(made.lanes.submit(request(made.actors[0].endpoint, random_rows(3))))
        with pytest.raises(ReplicaUnavailable, match="ejected"):
            await waiting
        await until(lambda: made.trust.is_calm)
        trial = asyncio.create_task(made.lanes.submit(request(made.actors[0].endpoint, random_rows(3))))
        await until(lambda: made.health.state(name) is State.ON_TRIAL and not made.health._liveness.may_send(name))
        assert made.trust.actors == {name: Rank.DOUBTFUL}
        made.actors[0].compute.gate.set()
        assert len((await trial).rows) == 3
        await until(lambda: made.trust.is_calm)


async def test_a_late_answer_of_an_ejected_actor_reaches_nobody() -> None:
    async with router(2) as made:
        made.actors[0].compute.gate.clear()
        waiting = asyncio.create_task(made.lanes.submit(request(made.actors[0].endpoint, random_rows(3))))
        with pytest.raises(ReplicaUnavailable, match="ejected"):
            await waiting
        made.actors[0].compute.gate.set()
        await until(lambda: made.health.state(str(made.actors[0].endpoint.incarnation)) is not State.EJECTED)
        assert all(link.frames_in_flight == 0 for link in made.lanes.status())


async def test_late_rows_are_hedged_and_the_first_success_wins_without_an_ejection() -> None:
    async with router(2, hedge_s=0.01) as made:
        lateness = made.pipeline.dispatcher.hedging.lateness
        for _ in range(64):
            lateness.observe(8, 0.001, 0.0)
        made.actors[0].compute.gate.clear()
        reply = await made.pipeline.run(call(want_plan=True))
        assert reply.report.shadow == T * K
        assert made.health.num_ejections == 0
        assert (reply.report.plan.attempts == 1).all()
        assert made.pipeline.dispatcher.hedging.budget.hedged_rows == T * K


async def test_without_budget_nothing_is_hedged_and_the_ejection_cures_it() -> None:
    async with router(2, hedge_s=0.01, budget_rows=0.0) as made:
        made.actors[0].compute.gate.clear()
        reply = await made.pipeline.run(call())
        budget = made.pipeline.dispatcher.hedging.budget
        assert (reply.report.shadow, made.health.num_ejections, budget.hedged_rows, budget.resent_rows) == (T * K, 1, 0, T * K)


async def test_an_exact_call_is_hedged_to_replicas_only() -> None:
    async with router(3, hedge_s=0.01, roles=(Role.REPLICA, Role.SHADOW, Role.REPLICA)) as made:
        made.actors[0].compute.gate.clear()
        reply = await made.pipeline.run(call(fidelity_exact=True))
        assert reply.report.exact == T * K
        assert not made.actors[1].compute.frames


async def test_no_rows_are_late_for_the_time_that_the_router_itself_did_not_run() -> None:
    async with router(2, hedge_s=0.05) as made:
        made.health.close()  # no beats but those of this test
        dispatcher = made.pipeline.dispatcher
        for _ in range(64):
            dispatcher.hedging.lateness.observe(8, 0.001, 0.0)
        made.actors[0].compute.gate.clear()
        waiting = asyncio.create_task(made.pipeline.run(call()))
        await until(lambda: bool(made.actors[0].compute.frames))
        now_s = asyncio.get_running_loop().time()
        dispatcher.pulse(now_s + 60.0, 60.0)
        assert dispatcher.hedging.budget.hedged_rows == 0
        dispatcher.pulse(now_s + 120.0)
        assert dispatcher.hedging.budget.hedged_rows == T * K
        assert (await waiting).report.shadow == T * K


async def test_idle_actors_are_never_accused() -> None:
    async with router(3) as made:
        for actor in made.actors:
            actor.compute.gate.clear()
        beats = 0

        def count(_now_s: float, _late_s: float) -> None:
            nonlocal beats
            beats += 1

        made.health.on_pulse = count
        await until(lambda: beats >= 3)
        assert made.health.num_ejections == 0
        assert made.trust.is_calm


async def test_when_most_actors_look_stuck_the_router_doubts_itself_and_ejects_none() -> None:
    async with router(4, roles=(Role.REPLICA,) * 4) as made:
        for actor in made.actors:
            actor.compute.gate.clear()
        waiting = [asyncio.create_task(made.lanes.submit(request(actor.endpoint, random_rows(2)))) for actor in made.actors]
        await until(lambda: made.pipeline.dispatcher is not None and made.health._liveness.doubts_itself)
        assert made.health.num_ejections == 0
        for actor in made.actors:
            actor.compute.gate.set()
        assert [len(reply.rows) for reply in await asyncio.gather(*waiting)] == [2] * 4


async def test_a_reset_takes_rows_elsewhere_at_once_and_ejects() -> None:
    async with router(2) as made:
        lost = made.actors[0]
        lost.compute.gate.clear()
        running = asyncio.create_task(made.pipeline.run(call()))
        await until(lambda: bool(lost.compute.frames))
        for link in tuple(lost.server._links):
            link.stream.close()
        reply = await running
        assert reply.report.shadow == T * K
        assert made.health.num_ejections == 1
        assert torch.isfinite(reply.hidden_states).all()


@pytest.mark.parametrize("newest", [1, MAX_PROTOCOL])
async def test_an_actor_too_old_for_a_hint_does_not_get_it_and_keeps_its_link(newest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_handshake, "MAX_PROTOCOL", newest)
    async with router(2) as made:
        hints: list[Warm | Cool] = []
        made.actors[0].server.hint = hints.append
        lane, place = made.lanes._lanes[made.actors[0].endpoint.incarnation], (NAME, 3, 0, bytes(32))
        lane.hint(Cool(*place))
        lane.hint(Warm(*place))
        await until(lambda: Warm(*place) in hints)
        assert (Cool(*place) in hints) is (newest > 1)
        assert made.lanes.status()[0].num_connects == 1


async def test_a_hint_reaches_who_holds_the_shadow_and_nobody_else() -> None:
    async with router(2) as made:
        hints = hints_to(made.actors[1])
        expert, shadow = ExpertId(NAME, 3, 2), made.table.copies_of(ExpertId(NAME, 3, 2))[1]
        made.health.warm(expert, shadow._replace(incarnation=Incarnation("nobody", 1)))
        made.health.warm(expert, shadow)
        await until(lambda: bool(hints))
        assert hints == [Warm(NAME, 3, 2, bytes.fromhex(VERSION))]


async def test_a_shadow_that_late_rows_waited_for_is_let_go_once_the_last_of_them_has_an_answer_of_a_replica() -> None:
    async with router(2) as made:
        hints = hints_to(made.actors[1])
        expert, shadow = ExpertId(NAME, 3, 2), made.table.copies_of(ExpertId(NAME, 3, 2))[1]
        for _ in range(2):
            made.health.warm(expert, shadow)
        made.health.release(expert, shadow, is_back=True)
        made.health.warm(expert, shadow)  # hints arrive in their order: no Cool came before this one
        await until(lambda: len(hints) == 3)
        assert all(isinstance(hint, Warm) for hint in hints), "others still wait"
        made.health.release(expert, shadow, is_back=False)
        made.health.release(expert, shadow, is_back=True)
        await until(lambda: len(hints) == 4)
        assert hints[-1] == Cool(NAME, 3, 2, bytes.fromhex(VERSION))
        made.health.warm(expert, shadow)
        made.health.release(expert, shadow, is_back=False)
        made.health.warm(expert, shadow)
        await until(lambda: len(hints) == 6)
        assert isinstance(hints[-2], Warm), "it answered, and may have to again"
        made.health.release(expert, shadow, is_back=True)
        assert not made.health._awaited


async def test_what_an_ejection_keeps_ready_stays_so_though_late_rows_have_their_answer_and_the_other_way_round() -> None:
    async with router(2) as made:
        stuck, hints, all_shadows = made.actors[0], hints_to(made.actors[1]), 2 * E
        name, expert = str(stuck.endpoint.incarnation), ExpertId(NAME, 3, 2)
        shadow = made.table.copies_of(expert)[1]
        stuck.compute.gate.clear()
        made.health.warm(expert, shadow)
        await made.pipeline.run(call())
        assert made.health.state(name) is State.EJECTED
        made.health.release(expert, shadow, is_back=True)
        made.health.warm(expert, shadow)
        stuck.compute.gate.set()
        await until(lambda: made.health.state(name) is State.ON_TRIAL)
        while made.health.state(name) is not State.HEALTHY:
            await made.pipeline.run(call(1))
        await until(lambda: len(cooled(hints)) == all_shadows - 1)
        assert (3, 2) not in cooled(hints)
        made.health.release(expert, shadow, is_back=True)
        await until(lambda: len(cooled(hints)) == all_shadows)


def hints_to(actor: FakeActor) -> list[Warm | Cool]:
    """What an actor is told from now on."""
    hints: list[Warm | Cool] = []
    actor.server.hint = hints.append
    return hints


def cooled(hints: list[Warm | Cool]) -> set[tuple[int, int]]:
    """Of which layer and index somebody said that they need not stay ready."""
    return {(hint.layer, hint.index) for hint in hints if isinstance(hint, Cool)}


async def test_an_actor_that_never_answered_its_window_is_tried_on_a_fresh_link() -> None:
    async with router(2) as made:
        stuck = made.actors[0]
        name = str(stuck.endpoint.incarnation)
        stuck.compute.gate.clear()
        await made.pipeline.run(call())
        connects = made.lanes.status()[0].num_connects
        await until(lambda: made.lanes.status()[0].num_connects > connects)
        assert made.health.state(name) is State.ON_TRIAL
        stuck.compute.gate.set()
        await until(lambda: not stuck.compute._queue.qsize())
        assert (await made.pipeline.run(call(1))).report.exact == T * K
        await until(lambda: made.health.state(name) is State.HEALTHY)


async def test_a_shadow_that_stands_in_is_let_go_when_its_replica_is_trusted_again_or_has_a_new_place() -> None:
    async with router(2) as made:
        hints: list[Warm | Cool] = []
        made.actors[1].server.hint = hints.append

        def kinds() -> Counter[type]:
            return Counter(type(hint) for hint in hints)

        stuck, all_shadows = made.actors[0], 2 * E
        table = made.table
        made.health.adopt(table)
        stuck.compute.gate.clear()
        await made.pipeline.run(call())
        await until(lambda: kinds()[Warm] >= all_shadows)
        assert kinds()[Cool] == 0
        made.health.adopt(table)  # its replica is in the table still, and is not trusted
        stuck.compute.gate.set()
        await until(lambda: made.health.state(str(stuck.endpoint.incarnation)) is State.ON_TRIAL)
        assert kinds()[Cool] == 0
        while made.health.state(str(stuck.endpoint.incarnation)) is not State.HEALTHY:
            await made.pipeline.run(call(1))
        await until(lambda: kinds()[Cool] == all_shadows)
        warmed = {(hint.layer, hint.index) for hint in hints if isinstance(hint, Warm)}
        assert warmed == {(hint.layer, hint.index) for hint in hints if isinstance(hint, Cool)}

        hints.clear()
        without = {expert: tuple(copy for copy in copies if copy.role is Role.SHADOW) for expert, copies in table.copies.items()}
        made.health.adopt(replace(table, epoch=2, copies=without))
        made.health.adopt(table)
        made.health.adopt(table)
        await until(lambda: kinds() == {Cool: all_shadows})
