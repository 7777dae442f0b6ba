"""What may break in a failover simulation. Each fault is a method that breaks something and undoes what can be undone; FAULTS names them all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

from cluster.core.ids import Role
from kit.failover_rules import Rules
from kit.sim_actors import SimActor, SimActors
from kit.sim_control import SimController, SimFleet
from kit.sim_router import SimRouter
from kit.virtual_time import VirtualLoop

LASTING_S = 1.5


class Faults:
    """The faults, on the parts of a world."""

    loop: VirtualLoop
    rng: Random
    fleet: SimFleet
    actors: SimActors
    controller: SimController
    router: SimRouter
    rules: Rules
    paused_until_s: float
    num_nodes: int

    def wake(self, actor: SimActor) -> None:
        """Well again, for routers and for the controller."""
        known = self.fleet.actors.get(actor.incarnation)
        if known is not None:
            known.hung = False
            actor.heal()

    def _some_actor(self) -> SimActor | None:
        living = [actor for actor in self.actors.living() if not actor.is_stopped]
        return self.rng.choice(living) if living else None

    async def _for_a_while(self, actors: list[SimActor], shortest_s: float, longest_s: float) -> None:
        await asyncio.sleep(self.rng.uniform(shortest_s, longest_s))
        for actor in actors:
            self.wake(actor)

    async def kill_actor(self) -> None:
        if (actor := self._some_actor()) is not None:
            self.actors.kill(actor, with_reset=True)

    async def lose_gpu(self) -> None:
        if (actor := self._some_actor()) is not None:
            for other in self._neighbours(actor):
                if other.device == actor.device:
                    self.actors.kill(other, with_reset=True)

    async def lose_node(self) -> None:
        if (actor := self._some_actor()) is not None and sum(node.alive for node in self.fleet.nodes.values()) > self.num_nodes:
            with_reset = self.rng.random() < 0.5
            neighbours = self._neighbours(actor)
            self.fleet.kill_node(actor.node_id)
            for other in neighbours:
                self.actors.bury(other, with_reset=with_reset)
            await asyncio.sleep(self.rng.uniform(0.5, 2.0))
            self.fleet.add_node(f"node-{len(self.fleet.nodes)}")

    async def freeze_node(self) -> None:
        if (actor := self._some_actor()) is not None:
            frozen = self._neighbours(actor)
            for other in frozen:
                self._stop(other)
            await self._for_a_while(frozen, 0.1, 1.5)

    async def stop_actor(self) -> None:
        if (actor := self._some_actor()) is not None:
            self._stop(actor)
            await self._for_a_while([actor], 0.05, 1.5)

    async def stick_compute(self) -> None:
        if (actor := self._some_actor()) is not None:
            actor.is_stuck = True
            await self._for_a_while([actor], 0.1, 1.5)

    async def slow_down(self) -> None:
        if (actor := self._some_actor()) is not None:
            actor.factor = 10.0
            await self._for_a_while([actor], 0.2, 1.5)

    async def corrupt_weights(self) -> None:
        if (actor := self._some_actor()) is not None:
            slots = self.fleet.actors[actor.incarnation].slots
            held = {copy.expert: slot for copy, slot in slots.items() if copy.role is Role.REPLICA}
            if held:
                expert, for_s = self.rng.choice(sorted(held)), self.rng.uniform(1.0, 2.0)
                if for_s >= LASTING_S:  # nothing but loading them anew makes these weights right
                    actor.spoilt[expert] = held[expert]
                    return
                actor.corrupt.add(expert)
                await asyncio.sleep(for_s)
                self.wake(actor)

    async def drop_replies(self) -> None:
        if (actor := self._some_actor()) is not None:
            actor.num_to_drop = self.rng.randint(1, 4)
            await self._for_a_while([actor], 0.3, 1.5)

    async def double_replies(self) -> None:
        if (actor := self._some_actor()) is not None:
            actor.num_to_double = self.rng.randint(1, 20)
            await self._for_a_while([actor], 0.3, 1.5)

    async def delay_replies(self) -> None:
        if (actor := self._some_actor()) is not None:
            actor.late_s = self.rng.uniform(0.02, 0.4)
            await self._for_a_while([actor], 0.2, 1.0)

    async def fail_forwards(self) -> None:
        if (actor := self._some_actor()) is not None:
            actor.num_to_fail = self.rng.randint(1, 5)
            await self._for_a_while([actor], 0.3, 1.0)

    async def lose_one_way(self) -> None:
        if (actor := self._some_actor()) is not None:
            actor.is_quiet = True
            await self._for_a_while([actor], 0.1, 1.5)

    async def lose_network(self) -> None:
        """The router hears nobody."""
        living = self.actors.living()
        for actor in living:
            actor.is_quiet = True
        await self._for_a_while(living, 0.05, 0.6)

    async def answer_for_another_life(self) -> None:
        """Something answers in an older generation's name, with rows of its own."""
        if (actor := self._some_actor()) is not None:
            actor.num_to_forge = self.rng.randint(1, 3)
            await self._for_a_while([actor], 0.3, 1.0)

    async def pause_router(self) -> None:
        pause_s = self.rng.uniform(0.05, 1.2)
        self.rules.paused_s += pause_s
        self.paused_until_s = self.loop.time() + pause_s
        self.loop.jump(pause_s)

    async def pause_controller(self) -> None:
        self.controller.is_paused = True
        await asyncio.sleep(self.rng.uniform(0.3, 2.0))
        self.controller.is_paused = False

    async def crash_controller(self) -> None:
        self.controller.crash()

    async def hold_table_back(self) -> None:
        self.router.stale_until_s = self.loop.time() + self.rng.uniform(0.3, 2.0)

    def _stop(self, actor: SimActor) -> None:
        actor.stop()
        self.fleet.actors[actor.incarnation].hung = True

    def _neighbours(self, actor: SimActor) -> list[SimActor]:
        return [self.actors.of(incarnation) for incarnation in sorted(self.fleet.actors) if self.actors.of(incarnation).node_id == actor.node_id]


NAMES = """
kill_actor lose_gpu lose_node freeze_node stop_actor stick_compute slow_down corrupt_weights drop_replies double_replies delay_replies fail_forwards
lose_one_way lose_network answer_for_another_life pause_router pause_controller crash_controller hold_table_back
"""
FAULTS: dict[str, Callable[[Faults], Awaitable[None]]] = {name: getattr(Faults, name) for name in NAMES.split()}
