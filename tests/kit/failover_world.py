"""A whole deployment in virtual time: fleet, controller core, router, load with known answers, faults from a seed, and the rules over all of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from unittest import mock

from cluster.core.ids import CopyId, ExpertId, Role
from cluster.core.launch import Launch
from cluster.core.routing_table import TableCopy
from cluster.core.spec import ActorsSpec, ClusterSpec, ModelSpec, ShadowSpec
from kit.failover_faults import FAULTS, Faults
from kit.failover_rules import RuleBroken, Rules
from kit.fleet import make_manifest
from kit.sim_actors import SimActors
from kit.sim_control import LoopClock, SimController, SimFleet
from kit.sim_router import Request, SimRouter
from kit.virtual_time import VirtualLoop, run_in_virtual_time
from router_service import actor_lane

LAUNCH = Launch(Path("/store"), code_digest="code-1", control_address="127.0.0.1:7777")
LAYERS, EXPERTS, ACTORS, NODES = 2, 4, 9, 3
RECONCILE_S = 0.25
EXACT_AGAIN_S = 60.0
IDLE_AGAIN_S = 35.0  # the longest ejection, and a little
DEPLOY_LIMIT_S = 60.0


@dataclass(frozen=True)
class Plan:
    """What a run is made of. `faults` are drawn from `kinds`; a run with none must see no ejection and no failed request."""

    seed: int
    replicas: int = 2
    has_shadows: bool = True
    faults: int = 2
    kinds: tuple[str, ...] = ()
    run_s: float = 3.0
    calls_per_s: float = 40.0
    exact_share: float = 0.3
    overflow_share: float = 0.01
    timeout_s: float = 1.5

    @classmethod
    def of(cls, seed: int) -> Plan:
        """The plan of a seed."""
        rng = Random(seed)
        faults = rng.choice((0, 1, 1, 2, 2, 3, 4))
        return cls(seed, replicas=rng.choice((1, 2, 2)), has_shadows=rng.random() < 0.8, faults=faults, run_s=2.5, calls_per_s=rng.choice((15.0, 30.0, 45.0)))


@dataclass
class Ended:
    """How a run went, for whoever adds them up."""

    history: str
    num_events: int
    num_requests: int
    outcomes: dict[str, int]
    num_ejections: int
    asked_rows: int
    hedged_rows: int
    resent_rows: int
    num_shadow_answers: int
    exact_again_s: float
    faults: list[str]


class World(Faults):
    """One run. Everything random comes from the seed."""

    def __init__(self, plan: Plan, loop: VirtualLoop) -> None:
        self.plan, self.loop, self.rng = plan, loop, Random(plan.seed)
        self.fleet = SimFleet(LoopClock(loop), nodes=NODES, gpus=1.0, start_s=0.5, load_s=0.2)  # type: ignore[arg-type]
        self.actors = self.fleet.world = SimActors(self.fleet, loop, self.rng)
        self.fleet.models[Path("/models/m")] = make_manifest("m", layers=LAYERS, experts=EXPERTS)
        shadow = ShadowSpec(memory_fraction=1.0) if plan.has_shadows else None
        model = ModelSpec(name="m", path=Path("/models/m"), replicas=plan.replicas, shadow=shadow)
        spec = ClusterSpec(name="sim", models=(model,), actors=ActorsSpec(count=ACTORS, num_gpus=0.25, free_slots=2, start_parallelism=9))
        self.controller = SimController(self.fleet, spec, LAUNCH)
        self.rules = Rules(self.actors)
        self.router = SimRouter(self.controller, self.rules, Random(plan.seed + 1))
        self.rules.router = self.router
        self.actors.on_frame = self.rules.framed
        self.router.on_table = self.rules.adopted
        self.num_requests = 0
        self.num_nodes = NODES
        self.done_faults: list[str] = []
        self.paused_until_s = 0.0
        self.calls: set[asyncio.Task[None]] = set()

    async def run(self) -> Ended:
        """Deploy, load and break, heal, and wait until everything is exact again."""
        background = [self.loop.create_task(work) for work in (self._reconcile(), self.router.hear())]
        await self._until(lambda: self.controller.is_settled and self._is_exact(), DEPLOY_LIMIT_S, "deployed")
        load = self.loop.create_task(self._load())
        breaks = [self.loop.create_task(self._fault(at_s, kind)) for at_s, kind in self._schedule()]
        await asyncio.gather(load, *breaks)
        healed_s = self.loop.time()
        self._heal_all()
        await self._until_exact_again()
        exact_again_s = self.loop.time() - healed_s
        await asyncio.gather(*self.calls)
        await self._until(self._is_idle, IDLE_AGAIN_S, "nothing is left under way")
        for task in background:
            task.cancel()
        self.router.health.close()
        self.rules.check()
        outcomes = list(self.rules.outcomes.values())
        rules = self.rules
        return Ended(
            rules.history.hexdigest(), rules.num_events, self.num_requests, {kind: outcomes.count(kind) for kind in sorted(set(outcomes))},
            rules.num_ejections, rules.asked_rows, rules.hedged_rows, rules.resent_rows, rules.num_shadow_answers, exact_again_s, self.done_faults,
        )  # fmt: skip

    async def _reconcile(self) -> None:
        while True:
            await self.controller.step()
            await asyncio.sleep(RECONCILE_S)

    async def _until(self, condition: Callable[[], bool], limit_s: float, what: str) -> None:
        until_s = self.loop.time() + limit_s
        while not condition():
            self.rules.check()
            if self.loop.time() > until_s:
                state = self.controller.decision
                message = f"{what}: not within {limit_s} s: {state.message if state is not None else 'no decision'}"
                raise RuleBroken(message)
            await asyncio.sleep(0.05)

    def _is_exact(self) -> bool:
        table = self.router.table
        return table is not None and all(
            sum(copy.role is Role.REPLICA and self._is_up(copy) for copy in table.copies_of(expert)) >= 1 for expert in self._experts()
        )

    def _is_up(self, copy: TableCopy) -> bool:
        return copy.incarnation in self.fleet.actors and self.router.liveness.may_send(str(copy.incarnation))

    def _is_idle(self) -> bool:
        """No lane of a living actor waits for anything: not even for an answer that was lost."""
        living = [link for link in self.router.lanes.status() if link.endpoint.incarnation in self.fleet.actors]
        return all(not link.frames_in_flight and not link.queued_tokens for link in living)

    def _experts(self) -> list[ExpertId]:
        return [ExpertId("m", layer, index) for layer in range(LAYERS) for index in range(EXPERTS)]

    async def _load(self) -> None:
        until_s = self.loop.time() + self.plan.run_s
        while self.loop.time() < until_s:
            await asyncio.sleep(self.rng.expovariate(self.plan.calls_per_s))
            self._call()

    def _call(self) -> None:
        rng, now_s, table = self.rng, self.loop.time(), self.router.table
        assert table is not None
        self.num_requests += 1
        rows_of = {index: rng.choice((1, 2, 4, 8, 8, 40)) for index in rng.sample(range(EXPERTS), rng.choice((1, 2, 2, 3)))}
        is_exact, overflows = rng.random() < self.plan.exact_share, rng.random() < self.plan.overflow_share
        request = Request(self.num_requests, rng.randrange(LAYERS), rows_of, is_exact, overflows, now_s, now_s + self.plan.timeout_s, table)
        self._begin(request)

    def _begin(self, request: Request) -> None:
        task = self.loop.create_task(self._finish(request))
        self.calls.add(task)
        task.add_done_callback(self.calls.discard)

    async def _finish(self, request: Request) -> None:
        self.rules.finished(await self.router.call(request), self._healthy_copy)

    def _healthy_copy(self, request: Request, index: int) -> str:
        """A copy that has been well all along and that the router knew: it should have answered. Empty where there is an excuse."""
        table, expert = self.router.table, ExpertId("m", request.layer, index)
        assert table is not None
        since_s = request.begun_s - 0.3
        if request.outcome == "deadline" and self._is_excused_for_slowness(request, expert):
            return ""
        ill_nodes: list[str] = [actor.node_id for actor in self.actors.actors.values() if actor.was_ill_since(since_s - 1.0)]
        for copy in request.table.copies_of(expert):
            actor = self.actors.of(copy.incarnation)
            is_allowed = copy.role is Role.REPLICA or not request.exact
            is_right = not (actor.is_wrong(expert) and copy.role is Role.REPLICA) and (expert, copy) not in self.rules.blamed
            is_known = (
                copy in table.copies_of(expert)
                and actor.is_linked_since(request.begun_s)
                and self.actors.is_ready_since(copy.incarnation, _copy_id(expert, copy), request.begun_s)
            )
            if is_allowed and is_right and is_known and not self.rules.may_fail(actor, since_s) and ill_nodes.count(actor.node_id) < 2:
                return f"{copy.incarnation} as {copy.role.name}"
        return ""

    def _is_excused_for_slowness(self, request: Request, expert: ExpertId) -> bool:
        """Rows under way in a slow actor are hedged within the budget only; a router that doubts itself ejects nobody."""
        known = [self.actors.of(copy.incarnation) for copy in request.table.copies_of(expert)]
        is_slow = any(actor.factor > 1 or actor.late_s > 0 or actor.slow_s >= request.begun_s for actor in known)
        return is_slow or self.router.liveness.doubts_itself or self.paused_until_s > request.begun_s

    def _schedule(self) -> list[tuple[float, str]]:
        kinds = self.plan.kinds or tuple(FAULTS)
        return sorted((self.rng.uniform(0.2, self.plan.run_s * 0.7), self.rng.choice(kinds)) for _ in range(self.plan.faults))

    async def _fault(self, at_s: float, kind: str) -> None:
        await asyncio.sleep(at_s)
        self.done_faults.append(kind)
        self.rules.note("fault", kind)
        await FAULTS[kind](self)

    def _heal_all(self) -> None:
        self.controller.is_paused = False
        self.router.stale_until_s = 0.0
        for actor in self.actors.actors.values():
            if actor.incarnation in self.fleet.actors:
                self.wake(actor)

    async def _until_exact_again(self) -> None:
        """Traffic re-admits: EXACT calls on every expert until a whole round of them is answered at the first try and nothing is left to repair."""
        limit_s = self.loop.time() + EXACT_AGAIN_S
        while True:
            requests = []
            for layer in range(LAYERS):
                assert self.router.table is not None
                self.num_requests += 1
                now_s = self.loop.time()
                rows_of = dict.fromkeys(range(EXPERTS), 1)
                requests.append(Request(self.num_requests, layer, rows_of, True, False, now_s, now_s + self.plan.timeout_s, self.router.table))  # noqa: FBT003
            await asyncio.gather(*(self._finish(request) for request in requests))
            is_first_try = all(request.outcome == "ok" and all(not reply.attempt for reply in request.replies.values()) for request in requests)
            if is_first_try and self.controller.is_settled and self._is_all_good():
                return
            self.rules.check()
            if self.loop.time() > limit_s:
                message = f"exact again: not within {EXACT_AGAIN_S} s: {self.controller.decision.message if self.controller.decision else ''}"
                raise RuleBroken(message)
            await asyncio.sleep(0.05)

    def _is_all_good(self) -> bool:
        """As many live replicas of every expert as wanted, in the router's table."""
        table = self.router.table
        assert table is not None
        return all(
            sum(copy.role is Role.REPLICA and copy.incarnation in self.fleet.actors for copy in table.copies_of(expert)) >= self.plan.replicas
            for expert in self._experts()
        )


def _copy_id(expert: ExpertId, copy: TableCopy) -> CopyId:
    return CopyId(expert, copy.version, copy.role)


def simulate(plan: Plan) -> Ended:
    """Run one plan from beginning to end. Raises RuleBroken."""
    loop = VirtualLoop()
    world: list[World] = []

    async def run() -> Ended:
        world.append(World(plan, loop))
        with mock.patch.object(actor_lane, "LinkClient", world[0].actors):
            return await world[0].run()

    try:
        return run_in_virtual_time(run(), loop)
    except RuleBroken as error:
        message = f"{error}; faults: {world[0].done_faults if world else []}; replay: {replace(plan)}"
        raise RuleBroken(message) from None
