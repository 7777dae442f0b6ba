"""The real controller on a manual clock with seeded faults.

Whatever dies, and wherever the controller crashes, the rules hold at every step, and the goal is reached once the faults end.
MOELASTIC_SIM_SEEDS sets how many seeds are run.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.core.errors import FleetError
from cluster.core.health import LinkReport, Wrong
from cluster.core.ids import CopyId, Incarnation
from cluster.core.spec import ActorsSpec
from cluster.core.status import ActorState, SlotState
from kit.control import ControlRig, ModelRouter, make_spec

SEEDS = range(int(os.environ.get("MOELASTIC_SIM_SEEDS", "16")))
NOTHING_LEFT = ""
TAKEN_OVER = "router-0 runs with another config or code, or the same: it was taken over; `--replace` replaces them one at a time"
FAULT_STEPS = 150
SETTLE_STEPS = 1500
SETTLED_STEPS = 60
COOL_STEPS = 800  # until what was hot is forgotten, and its further replicas are taken back
COMMANDS = ("assume", "drain", "release", "start_actor", "stop_actor", "import_experts", "observe", "start_router", "stop_router")
STRUCK = ("kill_actor", "kill_node", "hang", "wake", "fail", "add_node", "kill_router", "hang_router")
SAID = ("eject", "freeze", "trust", "accuse", "heat")
RECONNECT_STEPS = 10  # how long a router may need to find a restarted controller: below the grace before a drain


class Crash(BaseException):
    """The controller's process ends here."""


class Invariants:
    """What must hold after every command and every step."""

    def __init__(self, rig: SimRig) -> None:
        self.rig = rig
        self.routed: dict[ModelRouter, set[str]] = {}
        self.highest_epoch = 0
        self.published: set[tuple[CopyId, Incarnation]] = set()
        self.broken: list[str] = []

    def note(self, rule: Callable[..., None], *facts: object) -> None:
        """Keep a broken rule for the next check: raised here, the controller would take it for the fleet's failure."""
        try:
            rule(*facts)
        except AssertionError as error:
            self.broken.append(str(error))

    def check(self) -> None:
        """After every step, before time moves on."""
        assert self.broken == []
        assert self.rig.fleet.reused == [], "a generation was used twice"
        self.check_routers()
        table = self.rig.controller.table
        if table is None:
            return
        assert table.epoch >= self.highest_epoch, "an epoch went back"
        self.highest_epoch = table.epoch
        ready = self.rig.fleet.ready_copies()
        recorded = {record.incarnation for record in self.rig.controller.snapshot().memory.actors.values()}
        now = {(copy, entry.incarnation) for copy in self.rig.copies() for entry in table.copies_of(copy.expert)}
        for copy, incarnation in now - self.published:
            assert incarnation in ready.get(copy, ()), f"{copy} is published on {incarnation} before it is ready"
        self.published = now
        for copy in self.rig.copies():
            if ready.get(copy, set()) & recorded:
                assert table.copies_of(copy.expert), f"{copy} is ready somewhere and published nowhere"

    def check_routers(self) -> None:
        """A router that had something to route to has it as long as anything is ready that it was ever told of."""
        ready = {str(life) for lives in self.rig.fleet.ready_copies().values() for life in lives}
        before, self.routed = self.routed, {}
        for router in self.rig.listening():
            routed = {str(entry.incarnation) for copies in router.table.copies.values() for entry in copies} if router.table is not None else set()
            kept = before.get(router, set()) & ready
            assert routed or not kept, f"{router.router_id} was told to forget {sorted(kept)}"
            self.routed[router] = routed

    def forget_records(self) -> None:
        """The controller's records are lost: its numbers begin anew, above what routers and actors say."""
        self.highest_epoch = 0
        if not self.rig.fleet.actors and not self.rig.fleet.routers:
            self.rig.fleet.ever_started.clear()  # nobody is left who could mistake a life for another

    def before_drain(self, incarnation: Incarnation, copies: tuple[CopyId, ...]) -> None:
        """Unpublished before drained; another ready copy is published, or the expert is not wanted."""
        table = self.rig.controller.table
        assert table is not None
        for copy in copies:
            published = {entry.incarnation for entry in table.copies_of(copy.expert)}
            assert incarnation not in published, f"{copy} is drained on {incarnation} while published"
            for router in self.rig.listening():
                known = router.table.copies_of(copy.expert) if router.table is not None else ()
                assert incarnation not in {entry.incarnation for entry in known}, f"{copy} is drained on {incarnation}, where {router.router_id} sends rows"
            others = self.rig.fleet.ready_copies().get(copy, set()) - {incarnation}
            is_wanted = any(model.name == copy.expert.model for model in self.rig.spec.models)
            is_accused = any(held.copy == copy and held.incarnation == incarnation for held in self.rig.controller.snapshot().memory.accused)
            if is_wanted and not is_accused and incarnation in self.rig.fleet.ready_copies().get(copy, set()):
                assert others, f"the last ready copy of {copy} is drained"

    def before_stop(self, incarnation: Incarnation) -> None:
        """Drained before stopped, as far as the actor answers; never one that is published."""
        table = self.rig.controller.table
        actor = self.rig.fleet.actors.get(incarnation)
        if table is not None and not self.rig.controller._is_going_down:
            assert all(entry.incarnation != incarnation for copies in table.copies.values() for entry in copies), f"{incarnation} is stopped while published"
        recorded = self.rig.controller.snapshot().memory.actors.get(incarnation.actor_id)
        is_condemned = incarnation in self.rig.controller.snapshot().memory.condemned
        if actor is not None and recorded is not None and recorded.incarnation == incarnation and not actor.hung and not is_condemned:
            assert all(slot.state is not SlotState.READY for slot in actor.slots.values()), f"{incarnation} is stopped before it is drained"


class SimRig(ControlRig):
    """A rig whose fleet checks the rules on every command, and can crash the controller between any two."""

    num_crashes = 0
    num_losses = 0

    def arm(self, rng: random.Random) -> None:
        self.rng, self.invariants, self.crash_chance = rng, Invariants(self), 0.0
        self.deaf_steps: dict[str, int] = {}
        self.fleet.import_s = rng.choice((0.0, 0.6, 4.0))
        fleet = self.fleet
        drain, stop = fleet.drain, fleet.stop_actor

        async def checked_drain(incarnation: Incarnation, copies: tuple[CopyId, ...], *, epoch: int) -> None:
            self.invariants.note(self.invariants.before_drain, incarnation, copies)
            await drain(incarnation, copies, epoch=epoch)

        async def checked_stop(incarnation: Incarnation, *, timeout_s: float) -> None:
            self.invariants.note(self.invariants.before_stop, incarnation)
            await stop(incarnation, timeout_s=timeout_s)

        fleet.drain, fleet.stop_actor = checked_drain, checked_stop  # type: ignore[method-assign]
        for name in ("start_actor", "assume", "drain", "release", "stop_actor", "import_experts", "import_model", "start_router"):
            setattr(fleet, name, self.crashing(getattr(fleet, name)))
        self.crash_wanted, self.loss_chance = False, 0.0
        self.after_step = self.invariants.check

    def crashing(self, command):  # noqa: ANN001, ANN201 - any command of the port
        async def run(*args, **kwargs):  # noqa: ANN002, ANN003, ANN202
            if self.rng.random() < self.crash_chance:
                self.crash_wanted = True
                if self.rng.random() < 0.5:
                    raise FleetError("the controller died before it sent this")  # noqa: EM101, TRY003
            result = await command(*args, **kwargs)
            if self.crash_wanted and self.rng.random() < 0.5:
                await asyncio.Event().wait()
            return result

        return run

    def listening(self) -> list[ModelRouter]:
        """Routers that run, and have heard of the controller since they last hung."""
        return [router for name, router in self.routers.items() if self.deaf_steps.get(name, 0) >= 0 and name in self.fleet.routers]

    def hear(self) -> None:
        """As in the rig, but each router in its own time; one that hung is not `listening` before it hears again."""
        self.routers = {name: self.routers.get(name) or ModelRouter(name) for name in self.fleet.routers}
        for name, router in self.routers.items():
            deaf = self.deaf_steps.get(name, 0)
            if self.fleet.router_state(name) is not ActorState.READY:
                self.deaf_steps[name] = -1
            elif deaf > 0:
                self.deaf_steps[name] = deaf - 1
            else:
                router.hear(self.controller)
                self.deaf_steps[name] = self.rng.choice((0, 0, 1, 3))

    async def end_controller(self) -> None:
        """It crashes; at times its records are lost as well. Routers find the next one some time later."""
        if self.rng.random() < self.loss_chance:
            await self.lose_store()
            self.invariants.forget_records()
            self.num_losses += 1
            await self.controller.apply(self.spec)
        else:
            await self.crash()
            self.num_crashes += 1
        for name in self.routers:
            if self.deaf_steps.get(name, 0) >= 0:
                self.deaf_steps[name] = self.rng.randint(0, RECONNECT_STEPS)

    async def sim_step(self) -> None:
        try:
            await self.step()
        except FleetError:
            self.clock.advance(0.25)
        if self.crash_wanted or self.rng.random() < self.crash_chance / 10:
            self.crash_wanted = False
            await self.end_controller()

    async def fault(self) -> None:
        kind = self.rng.choice((*STRUCK, *SAID))
        if kind in SAID:
            self.router_says(kind)
        else:
            self.strike(kind)

    def strike(self, kind: str) -> None:
        fleet, rng = self.fleet, self.rng
        alive = [node.node_id for node in fleet.nodes.values() if node.alive and not node.is_head]
        if kind == "kill_actor" and fleet.actors:
            fleet.kill_actor(rng.choice(sorted(fleet.actors)))
        elif kind == "kill_node" and len(alive) > 2:
            fleet.kill_node(rng.choice(alive))
        elif kind == "hang" and fleet.actors:
            fleet.actors[rng.choice(sorted(fleet.actors))].hung = True
        elif kind == "wake":
            for actor in fleet.actors.values():
                actor.hung = False
            fleet.hung_routers.clear()
        elif kind == "kill_router" and fleet.routers:
            fleet.hung_routers.clear()
            fleet.routers.clear()
            self.routers.clear()
        elif kind == "hang_router":
            fleet.hung_routers.update(fleet.routers)
            self.deaf_steps.update(dict.fromkeys(fleet.routers, -1))
        elif kind == "fail":
            fleet.fail_next[rng.choice(COMMANDS)] = FleetError("injected")
        elif kind == "add_node" and len(alive) < 4:
            fleet.add_node(f"node-{len(fleet.nodes)}")

    def router_says(self, kind: str) -> None:
        """A router ejects, trusts or accuses an actor, or tells of a hot expert; a frozen actor is silent while its last report still stands in."""
        lives = sorted(self.fleet.actors)
        for router in self.routers.values():
            if kind == "trust":
                router.out.clear()
                for actor in self.fleet.actors.values():
                    actor.silent_since_s = None
            elif kind == "heat":
                hot = self.rng.choice(self.copies()).expert
                router.tokens = {copy.expert: 5000 if copy.expert == hot else 100 for copy in self.copies()}
                router.window_s, router.queue_age_s = 0.25, {f"actor-{hot.index}": self.rng.choice((0.0, 0.1))}
            elif lives and kind == "accuse":
                life = self.rng.choice(lives)
                router.wrong = [Wrong(life, copy, "checksum") for copy in list(self.fleet.actors[life].slots)[:1]]
            elif lives:
                life = self.rng.choice(lives)
                router.out[life] = LinkReport(life, is_ejected=True, evidence="no progress")
                if kind == "freeze":
                    self.fleet.actors[life].silent_since_s = self.clock.time_s


@pytest.mark.parametrize("seed", SEEDS)
async def test_faults_and_crashes_break_no_rule_and_the_goal_is_reached(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    actors = ActorsSpec(free_slots=rng.choice((0, 2, 4)), slots_per_actor=rng.choice((None, None, 6)), standby=rng.choice((0, 1)), start_parallelism=2)
    rig = SimRig(tmp_path, make_spec(actors=actors, replicas=rng.choice((1, 1, 2))))
    rig.arm(rng)
    await rig.controller.apply(rig.spec)
    rig.crash_chance, rig.loss_chance = 0.08, 0.15
    for _ in range(FAULT_STEPS):
        if rng.random() < 0.12:
            await rig.fault()
        await rig.sim_step()
    rig.crash_chance = 0.0
    rig.fleet.hung_routers.clear()
    rig.router_says("trust")
    for router in rig.routers.values():
        router.tokens, router.queue_age_s, router.wrong = {copy.expert: 100 for copy in rig.copies()}, {}, []
    for device in list(rig.controller.snapshot().memory.quarantined):
        rig.controller.release_device(device)
    for actor in rig.fleet.actors.values():
        actor.hung = False
    while sum(node.alive for node in rig.fleet.nodes.values()) < 5:
        rig.fleet.add_node(f"node-{len(rig.fleet.nodes)}")
    for _ in range(SETTLE_STEPS):
        await rig.sim_step()
        if rig.state == "SERVING" and rig.message in (NOTHING_LEFT, TAKEN_OVER):
            break
    assert rig.state == "SERVING"
    assert rig.message in (NOTHING_LEFT, TAKEN_OVER)
    await check_goal(rig)


async def check_goal(rig: SimRig) -> None:
    """Every copy ready at home and only there, no actor twice, nothing left over."""
    for step in range(COOL_STEPS):
        await rig.sim_step()
        if step >= SETTLED_STEPS and not rig.controller.snapshot().memory.further:
            break
    for _ in range(SETTLED_STEPS):
        await rig.sim_step()
    ready = rig.fleet.ready_copies()
    replicas = rig.spec.models[0].replicas
    for copy in rig.copies():
        assert len(ready[copy]) == replicas
        assert sorted(map(str, ready[copy])) == sorted(rig.published_on(copy))
        assert len({inc.actor_id for inc in ready[copy]}) == replicas
    names = [incarnation.actor_id for incarnation in rig.fleet.actors]
    assert len(names) == len(set(names))
    assert set(ready) == set(rig.copies())
