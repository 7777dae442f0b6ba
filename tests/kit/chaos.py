"""A cluster and a session for chaos without processes: what was struck and undone is remembered, what goes wrong is asked for."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chaos.core.experiment import Action, Scenario
from chaos.core.observations import Observations, Request, RouterSample, Strike
from chaos.core.targets import ActorView, Inventory, NodeView, Process, Target
from chaos.faults.table import settings_of
from chaos.port import Order
from chaos.scenario_files import ScenarioFile
from cluster.core.errors import FleetError
from cluster.core.ids import ExpertId, Incarnation

MODEL = "m"
PROBE = {"name": "availability", "tolerance": 1}
CHOICES = 4


def actor_view(number: int, *, generation: int = 1, node: str = "n1", shadow_of: int | None = None) -> ActorView:
    """Actor j holds expert j, and perhaps the shadow of another."""
    shadows = frozenset() if shadow_of is None else frozenset({ExpertId(MODEL, 0, shadow_of)})
    name = f"actor-{number}"
    process = Process(name, 1000 + 10 * generation + number, float(generation))
    return ActorView(Incarnation(name, generation), node, "cpu", "127.0.0.1:1", process, frozenset({ExpertId(MODEL, 0, number)}), shadows)


def small_inventory() -> Inventory:
    """Four actors on two nodes beside the router's; each holds its neighbour's shadow."""
    actors = [actor_view(number, node=f"n{1 + number // 2}", shadow_of=(number + 2) % 4) for number in range(4)]
    nodes = (NodeView("n0", "head", can_be_lost=False), NodeView("n1", "node-1", can_be_lost=True), NodeView("n2", "node-2", can_be_lost=True))
    return Inventory(tuple(actors), nodes, (Process("router", 900, 1.0),), Process("controller", 901, 1.0), {ExpertId(MODEL, 0, 2): 9.0})


@dataclass
class FakeCluster:
    """A `ClusterPort` that heals by itself: what is killed is there again, in a later life, at the next look."""

    found: Inventory = field(default_factory=small_inventory)
    done: list[str] = field(default_factory=list)
    killed: set[Process] = field(default_factory=set)
    stopped: set[Process] = field(default_factory=set)
    playing: dict[str, list[str]] = field(default_factory=dict)
    struck: Counter[str] = field(default_factory=Counter)
    refuses: str = ""
    name: str = "fake"
    is_silent: bool = False
    stops: bool = True
    num_struck: int = 3

    def inventory(self) -> Inventory:
        if self.is_silent:
            message = "the controller does not answer"
            raise FleetError(message)
        return self.found

    def kill(self, process: Process) -> None:
        self._may("kill")
        self.done.append(f"kill {process.what}")
        self.killed.add(process)
        self._replace(process)

    def stop(self, process: Process) -> None:
        self._may("stop")
        self.done.append(f"stop {process.what}")
        self.stopped.add(process)

    def resume(self, process: Process) -> None:
        self.done.append(f"resume {process.what}")
        self.stopped.discard(process)

    def is_running(self, process: Process) -> bool:
        return process not in self.killed | (self.stopped if self.stops else set())

    def is_alive(self, process: Process) -> bool:
        return process not in self.killed

    def kill_node(self, node: NodeView) -> float:
        self._may("kill_node")
        self.done.append(f"kill {node.name}")
        for actor in self.found.actors:
            if actor.node_id == node.node_id:
                self.killed.add(actor.process)
                self._replace(actor.process)
        self.found = replace(self.found, nodes=tuple(known for known in self.found.nodes if known != node))
        return time.monotonic()

    def start_node(self, node: NodeView) -> None:
        self.done.append(f"start {node.name}")
        self.found = replace(self.found, nodes=(*self.found.nodes, replace(node, node_id=f"{node.node_id}-again")))

    async def ask(self, actor: ActorView, fault: str, settings: dict[str, Any]) -> str:
        self._may(fault)
        self.done.append(f"{fault} {actor.incarnation.actor_id}")
        active = self.playing.setdefault(actor.incarnation.actor_id, [])
        match fault:
            case "state":
                return json.dumps({"active": dict.fromkeys(active, 1.0), "struck": self.struck})
            case "heal":
                active.clear()
            case _:
                active.append(fault)
                self.struck[fault] += self.num_struck
        return f"{fault} with {sorted(settings)}"

    def _may(self, what: str) -> None:
        if self.refuses == what:
            message = f"{what} is refused by the test"
            raise FleetError(message)

    def _replace(self, process: Process) -> None:
        """The same actor, router or controller, in another process."""

        def later(known: Process) -> Process:
            return replace(known, pid=known.pid + 10_000) if known == process else known

        actors = [
            replace(actor, incarnation=actor.incarnation._replace(generation=actor.incarnation.generation + 100), process=later(actor.process))
            if actor.process == process
            else actor
            for actor in self.found.actors
        ]
        controller = None if self.found.controller is None else later(self.found.controller)
        self.found = replace(self.found, actors=tuple(actors), routers=tuple(map(later, self.found.routers)), controller=controller)


def order_of(cluster: FakeCluster, target: Target, fault: str, *, seconds: float | None = None, **arguments: Any) -> Order:
    """An order to strike, with a recovery that gives up at once when it must wait."""

    async def pause(_seconds: float) -> None:
        return

    action = Action.model_validate({"name": "a", "at": 0, "fault": fault, "target": {"kind": target.kind}})
    return Order(
        cluster=cluster,
        target=target,
        settings=settings_of(action, arguments),
        model=MODEL,
        layer=0,
        rng=random.Random(1),
        clock=time.monotonic,
        pause=pause,
        seconds=seconds,
        recover_limit_s=0.2,
    )


def scenario_file(name: str = "try", **parts: Any) -> ScenarioFile:
    """A scenario that is quick."""
    document = {
        "title": "t",
        "description": "d",
        "steady-state-hypothesis": {"title": "s", "probes": [PROBE]},
        "method": [],
        "control_s": 0.01,
        "observe_s": 0.01,
        "recover_s": 0.5,
        "affected_s": 0.01,
    }
    return ScenarioFile(name, Path(f"{name}.yaml"), Scenario.model_validate(document | parts), "digest")


def action(fault: str = "kill_actor", kind: str = "actor", **parts: Any) -> dict[str, Any]:
    """One action of a method."""
    return {"name": fault, "at": 0, "fault": fault, "target": {"kind": kind, "pick": "rotate"}} | parts


def request(end_s: float, *, took_s: float = 0.01, number: int = 0, status: str = "OK", shadow: int = 0, **parts: Any) -> Request:
    """A request of CHOICES choices, `shadow` of them degraded."""
    outcomes = (CHOICES - shadow, shadow, 0, 0, 0, 0, 0)
    return Request(number, end_s - took_s, end_s - took_s, end_s, status, **{"epoch": 1, "outcomes": outcomes} | parts)


class _Watcher:
    def quicken(self, until_s: float) -> None:
        """Nothing to quicken."""


class _Load:
    def requests(self, _begin_s: float = 0.0) -> list[Request]:
        return []

    def forget(self, before_s: float) -> None:
        """Nothing is remembered."""

    async def begin(self, *, callers: int, rate: float) -> None:
        """Nothing is sent."""


@dataclass(frozen=True)
class _Named:
    name: str = MODEL
    layer: int = 0


@dataclass
class FakeSession:
    """What a repetition needs of a session. `failures` is the number of requests that fail in the next windows, one entry a window."""

    target: FakeCluster = field(default_factory=FakeCluster)
    failures: list[int] = field(default_factory=list)
    lack: str = ""
    rate: float = 10.0
    peak: float = 20.0
    model: _Named = _Named()
    layer: _Named = _Named()
    watcher: _Watcher = field(default_factory=_Watcher)
    load: _Load = field(default_factory=_Load)
    counted: dict[str, float] = field(default_factory=dict)

    def count_from_here(self) -> None:
        """Nothing is counted."""

    def counts(self, _requests: Iterable[Request]) -> dict[str, float]:
        return dict(self.counted)

    def wait_s(self) -> float:
        return 0.0

    def distrust_s(self, _begin_s: float) -> float | None:
        return None

    async def wait_until_whole(self, _limit_s: float) -> str:
        return self.lack

    async def observed(
        self,
        *,
        control_s: float,
        begun_s: float,
        end_s: float,
        affected_s: float,
        strikes: Iterable[Strike] = (),
        counts: Mapping[str, float] | None = None,
        whole_again_s: float | None = None,
    ) -> Observations:
        num_failed = self.failures.pop(0) if self.failures else 0
        requests = [request(begun_s, number=number, status="UNAVAILABLE" if number < num_failed else "OK") for number in range(4)]
        return observations(
            requests, control_s=control_s, begun_s=begun_s, end_s=end_s, affected_s=affected_s, strikes=strikes, counts=counts, whole_again_s=whole_again_s
        )


def observations(requests: Iterable[Request], **parts: Any) -> Observations:
    """Observations with everything that is not said left plain."""
    given = {
        "control_s": 0.0,
        "begun_s": 10.0,
        "end_s": 20.0,
        "samples": (),
        "strikes": (),
        "wanted_replicas": {},
        "choices_per_request": CHOICES,
        "timeout_s": 1.0,
        "affected_s": 1.0,
    } | parts
    return Observations(requests=tuple(requests), **given | {"strikes": tuple(given["strikes"]), "counts": dict(given.get("counts") or {})})


def sample(at_s: float, links: dict[Incarnation, str], holders: dict[int, set[Incarnation]], epoch: int = 1) -> RouterSample:
    """A look at the router: which incarnations hold which expert."""
    replicas = {ExpertId(MODEL, 0, index): frozenset(found) for index, found in holders.items()}
    return RouterSample(at_s, epoch, links, replicas, {})
