"""Which routers to start and to stop: as many as the spec wants, all on the head node, replaced one after the other where they share an address."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from cluster.core.actions import Action, StartRouter, StopRouter
from cluster.core.actor_config import router_ids
from cluster.core.launch import Launch, router_digest
from cluster.core.lifecycle import hung_router, router_life, running_routers
from cluster.core.memory import Following, Memory, RouterRecord, with_failure
from cluster.core.spec import ClusterSpec
from cluster.core.status import ActorState, FleetObservation, NodeObservation, RouterObservation

STARTS_WAITED_FOR: Final = 2
"""A router on its last table waits for all others while one of them might use up `actors.start_timeout_s` so many times, then for any one of them. The last
that answers stays: an old table is better than nobody."""


@dataclass(frozen=True, slots=True)
class RouterPlan:
    """What to remember of the routers, what to do about them, what to say, and in what those that run differ from the spec."""

    memory: Memory
    actions: tuple[Action, ...]
    notes: tuple[str, ...]
    differences: tuple[str, ...]


def plan_routers(
    spec: ClusterSpec, launch: Launch, memory: Memory, status: FleetObservation, head: NodeObservation | None, *, has_copies: bool, replace_differing: bool
) -> RouterPlan:
    """Start routers once there is something to route to; keep them up; replace those that differ, when asked."""
    return _Step(spec, launch, memory, status, head).plan(has_copies=has_copies, replace_differing=replace_differing)


def routers_missing(spec: ClusterSpec, memory: Memory, status: FleetObservation) -> str:
    """Which routers are not ready, as a note; empty when all are that can be before something is replaced."""
    ready = {router.router_id for router in status.routers if router.state is ActorState.READY}
    due = running_routers(status) if _loner(spec, memory, status) else router_ids(spec)
    missing = [router_id for router_id in router_ids(spec) if router_id in due and router_id not in ready]
    if not ready.intersection(router_ids(spec)):
        return "no router is ready"
    return f"{len(missing)} of {spec.router.count} routers are not ready: {', '.join(missing)}" if missing else ""


def _loner(spec: ClusterSpec, memory: Memory, status: FleetObservation) -> str:
    """A router that runs and would let no other listen where it does, though the spec wants several; empty when there is none."""
    if not spec.router.shares_address:
        return ""
    known = memory.routers
    return next((name for name in sorted(running_routers(status)) if name in known and not known[name].shares_address), "")


class _Step:
    def __init__(self, spec: ClusterSpec, launch: Launch, memory: Memory, status: FleetObservation, head: NodeObservation | None) -> None:
        self.spec, self.launch, self.memory, self.head = spec, launch, memory, head
        self.now_s = status.observed_s
        self.digest = router_digest(spec, launch)
        self.seen: Mapping[str, RouterObservation] = {router.router_id: router for router in status.routers}
        self.running = running_routers(status)
        self.loner = _loner(spec, memory, status)
        self.actions: list[Action] = []
        self.notes: list[str] = []

    def plan(self, *, has_copies: bool, replace_differing: bool) -> RouterPlan:
        wanted = router_ids(self.spec)
        self._track_following(wanted)
        stops: list[StopRouter] = []
        differences: list[str] = []
        for router_id in wanted:
            record, router = self.memory.routers.get(router_id), self.seen.get(router_id)
            running = router_id in self.running
            if router is not None and running and (trouble := hung_router(router, self.spec, self.memory, self.now_s)):
                stops.append(StopRouter(router_id, trouble))
            elif self._must_follow(router_id):
                stops += self._follow(router_id, is_first=not stops)
            elif record is not None and record.digest != self.digest and running:
                differences.append(f"{router_id} runs with another config or code" + ("" if record.digest else ", or the same: it was taken over"))
                if replace_differing and not stops and self._can_spare(router_id):
                    stops.append(StopRouter(router_id, "to be replaced"))
            elif not running and self.loner:
                self.notes.append(f"{router_id} waits until {self.loner} has been replaced, which shares its address with nobody")
            elif not running and has_copies:
                self._start(router_id, router)
        stops += [StopRouter(name, "not wanted") for name in sorted(self.running.difference(wanted))]
        self.actions += [stop for stop in stops if self.memory.may_try(stop.key, self.now_s)]
        return RouterPlan(self.memory, tuple(self.actions), tuple(self.notes), tuple(differences))

    def _must_follow(self, router_id: str) -> bool:
        """Whether a router runs that hears nothing any more, since it looks for the controller where it was."""
        record = self.memory.routers.get(router_id)
        return record is not None and router_id in self.running and record.control_address not in ("", self.launch.control_address)

    def _track_following(self, wanted: Sequence[str]) -> None:
        """Whoever has followed begins the wait of the others anew: that one now has to become ready."""
        known, num_routers = self.memory.following, sum(map(self._must_follow, wanted))
        if known is None or known.num_routers != num_routers:
            known = Following(num_routers, self.now_s) if num_routers else None
        self.memory = replace(self.memory, following=known)

    def _follow(self, router_id: str, *, is_first: bool) -> list[StopRouter]:
        """Have a router replaced that must follow: one that is ready once it can be spared, or has waited for that long enough."""
        moved, following = "the controller listens elsewhere now", self.memory.following
        if not self._is_ready(router_id) or (is_first and self._can_spare(router_id)):
            return [StopRouter(router_id, moved)]
        limit_s = STARTS_WAITED_FOR * self.spec.actors.start_timeout_s
        is_late = following is not None and self.now_s - following.since_s >= limit_s
        if is_first and is_late and any(self._is_ready(name) for name in router_ids(self.spec) if name != router_id):
            return [StopRouter(router_id, f"{moved}, and in {limit_s:g} s not all other routers have become ready")]
        wanted = "another one is ready, as none has been for long" if is_late else f"the others are ready, or some of them in {limit_s:g} s"
        self.notes.append(f"{router_id} serves on its last table, and is replaced once {wanted}: {moved}")
        return []

    def _can_spare(self, router_id: str) -> bool:
        """Whether all others that can run do so, so that callers have somewhere to go."""
        others = (name for name in router_ids(self.spec) if name != router_id)
        return router_id == self.loner or all(map(self._is_ready, others))

    def _is_ready(self, router_id: str) -> bool:
        return router_id in self.seen and self.seen[router_id].state is ActorState.READY

    def _start(self, router_id: str, router: RouterObservation | None) -> None:
        life, memory = router_life(router_id), self.memory
        action = StartRouter(router_id, self.head.node_id if self.head is not None else "", "wanted, and there is a table to serve")
        if life in memory.issued:
            if life in memory.returned:
                why = router.reason if router is not None and router.reason else "its process is gone"
                memory = with_failure(memory, action.key, f"{router_id} was lost: {why}", self.now_s)
                memory = replace(memory, issued=memory.issued - {life}, returned=memory.returned - {life})
        elif self.head is None or any((self.head.node_id, model.name) not in memory.stored for model in self.spec.models if model.name in memory.models):
            self.notes.append(f"{router_id} waits for the gates of its models on the head node")
        elif memory.may_try(action.key, self.now_s):
            shares = self.spec.router.shares_address
            record = RouterRecord(router_id, self.head.node_id, self.digest, self.launch.control_address, shares)
            memory = replace(memory, issued=memory.issued | {life}, routers={**memory.routers, router_id: record})
            self.actions.append(action)
        self.memory = memory
