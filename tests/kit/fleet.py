# ruff: noqa: ARG002 - the port's arguments, also where a fleet of nothing has no use for them
"""A fleet of nothing: the port's behaviour on a manual clock, with faults to order. As plain as the port, and no richer."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.core.actor_config import ExpertActorConfig, RouterConfig
from cluster.core.descriptors import DType, ExpertDescriptor, GateDescriptor, LayerDescriptor, Manifest, ModelDescriptor, ShadowRecord
from cluster.core.errors import CheckpointError, FleetError, SlotsExhausted, StaleTable
from cluster.core.ids import CopyId, Incarnation
from cluster.core.spec import ShadowSpec
from cluster.core.status import (
    ActorObservation,
    ActorReport,
    ActorState,
    FleetObservation,
    GpuFault,
    GpuReading,
    NodeObservation,
    RouterObservation,
    SlotReport,
    SlotState,
)


class ManualClock:
    """Time that moves when told to."""

    def __init__(self, now_s: float = 100.0) -> None:
        self.time_s = now_s
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def now_s(self) -> float:
        return self.time_s

    def unix_s(self) -> float:
        return 1.7e9 + self.time_s

    def advance(self, by_s: float) -> None:
        self.time_s += by_s
        for until_s, sleeper in self._sleepers:
            if until_s <= self.time_s and not sleeper.done():
                sleeper.set_result(None)
        self._sleepers = [entry for entry in self._sleepers if not entry[1].done()]

    async def sleep(self, for_s: float) -> None:
        """Until the clock was moved on by this much."""
        sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if for_s > 0:
            self._sleepers.append((self.time_s + for_s, sleeper))
            await sleeper


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_manifest(name: str = "m", *, layers: int = 2, experts: int = 4, salt: str = "", source: str = "/models/m") -> Manifest:
    """A model of tiny experts with made-up digests."""
    expert = ExpertDescriptor(hidden_size=4, intermediate_size=8)
    gate = GateDescriptor(num_experts=experts, top_k=min(2, experts))
    model = ModelDescriptor(
        name=name,
        family="custom",
        dtype=DType.BF16,
        layers=tuple(LayerDescriptor(layer=layer, num_experts=experts, expert=expert, gate=gate) for layer in range(layers)),
    )
    blobs = {f"{layer}/{index}": digest(f"{name}{salt}/{layer}/{index}") for layer in range(layers) for index in range(experts)}
    return Manifest(model=model, experts=blobs, gates={f"{layer}": digest(f"{name}{salt}/{layer}") for layer in range(layers)}, source=source)


def with_shadows(manifest: Manifest, spec: ShadowSpec) -> Manifest:
    """The manifest with a made-up shadow for every expert; another spec gives others."""

    def record(key: str) -> ShadowRecord:
        version = digest(f"shadow {manifest.experts[key]} {spec.model_dump_json()}")
        return ShadowRecord(version=version, codec=spec.codecs[0], num_bytes=24, relative_error=0.4, cosine=0.9)

    return manifest.model_copy(update={"shadows": {key: record(key) for key in manifest.experts}})


@dataclass
class FakeSlot:
    copy: CopyId
    state: SlotState
    ready_at_s: float
    num_bytes: int


@dataclass
class FakeActor:
    config: ExpertActorConfig
    node_id: str
    num_gpus: float
    ready_at_s: float
    slots: dict[CopyId, FakeSlot] = field(default_factory=dict)
    max_epoch: int = 0
    hung: bool = False
    silent_since_s: float | None = None  # it does not answer, and its last report still stands in
    frames_done: int = 0
    oldest_age_s: float = 0.0
    device: str = "cpu"


@dataclass
class FakeNode:
    node_id: str
    num_gpus: float
    alive: bool = True
    is_head: bool = False
    blobs: set[str] = field(default_factory=set)


class FakeFleet:
    """Nodes, actors and routers in memory. `log` has every command that was accepted, in order."""

    def __init__(self, clock: ManualClock, *, nodes: int = 4, gpus: float = 1.0, start_s: float = 1.0, load_s: float = 0.5, capacity_bytes: int = 0) -> None:
        self.clock, self.start_s, self.load_s, self.capacity_bytes = clock, start_s, load_s, capacity_bytes
        self.nodes = {"head": FakeNode("head", 0.0, is_head=True)}
        for index in range(1, nodes + 1):
            self.nodes[f"node-{index}"] = FakeNode(f"node-{index}", gpus)
        self.actors: dict[Incarnation, FakeActor] = {}
        self.routers: dict[str, tuple[RouterConfig, str, float]] = {}
        self.models: dict[Path, Manifest] = {}
        self.hung_routers: set[str] = set()
        self.import_s = 0.0
        self.importing: set[str] = set()
        self.ever_started: set[Incarnation] = set()
        self.fail_next: dict[str, Exception] = {}
        self.reused: list[Incarnation] = []
        self.verified_anew: list[tuple[str, str]] = []
        self.gpu_faults: dict[str, tuple[GpuFault, ...]] = {}
        self.gpus: dict[str, tuple[GpuReading, ...]] = {}
        self.log: list[str] = []

    async def observe(self, *, out: Collection[Incarnation] = ()) -> FleetObservation:
        self._fail("observe")
        self._settle()
        nodes = tuple(
            NodeObservation(
                n.node_id,
                n.node_id,
                f"10.0.0.{i + 1}",
                n.alive,
                n.num_gpus,
                2.0,
                n.is_head,
                gpu_faults=self.gpu_faults.get(n.node_id, ()),
                gpus=self.gpus.get(n.node_id, ()),
            )
            for i, n in enumerate(self.nodes.values())
        )
        actors = tuple(self._observation(incarnation, actor) for incarnation, actor in self.actors.items())
        routers = tuple(RouterObservation(name, self.router_state(name), node, "127.0.0.1", 50051, pid=1) for name, (_, node, _) in self.routers.items())
        return FleetObservation(self.clock.time_s, nodes, actors, routers)

    def router_state(self, router_id: str) -> ActorState:
        if router_id in self.hung_routers:
            return ActorState.UNREACHABLE
        return ActorState.READY if self.clock.time_s >= self.routers[router_id][2] else ActorState.STARTING

    async def import_model(self, node_id: str, *, name: str, source: Path, dtype: str, expected: Manifest | None, shadow: ShadowSpec | None = None) -> Manifest:
        self._fail("import_model")
        await self.clock.sleep(self.import_s)
        manifest = self.models.get(source)
        if manifest is None:
            message = f"{source}: there is no checkpoint in this folder"
            raise CheckpointError(message)
        if expected is not None and expected.experts != manifest.experts:
            message = f"{source}: digests differ from the manifest"
            raise CheckpointError(message)
        if shadow is not None:
            manifest = with_shadows(manifest, shadow)
        self._alive(node_id).blobs.update(manifest.experts.values(), manifest.gates.values(), (record.version for record in manifest.shadows.values()))
        self.log.append(f"import_model {name} on {node_id} as {dtype}")
        return manifest

    async def import_experts(
        self,
        node_id: str,
        *,
        manifest: Manifest,
        source: Path,
        experts: Collection[tuple[int, int]],
        shadows: Collection[tuple[int, int]] = (),
        distrusted: Collection[str] = (),
    ) -> None:
        self._fail("import_experts")
        self.verified_anew += [(node_id, version) for version in distrusted]
        self.importing.add(node_id)
        try:
            await self.clock.sleep(self.import_s)
        finally:
            self.importing.discard(node_id)
        if source not in self.models:
            message = f"{source}: there is no checkpoint in this folder"
            raise CheckpointError(message)
        blobs = self._alive(node_id).blobs
        blobs.update(manifest.gates.values())
        blobs.update(manifest.experts[f"{layer}/{index}"] for layer, index in experts)
        blobs.update(manifest.shadows[f"{layer}/{index}"].version for layer, index in shadows)
        self.log.append(f"import_experts {len(experts)} of {manifest.model.name} on {node_id}")

    async def import_progress(self) -> dict[str, tuple[int, int]]:
        return {}

    async def start_actor(self, config: ExpertActorConfig, *, node_id: str, num_gpus: float, num_cpus: float) -> None:
        self._fail("start_actor")
        if config.incarnation in self.actors:
            return
        if config.incarnation in self.ever_started:
            self.reused.append(config.incarnation)
        node = self._alive(node_id)
        used = sum(actor.num_gpus for actor in self.actors.values() if actor.node_id == node_id)
        if used + num_gpus > node.num_gpus + 1e-6:
            message = f"{node_id} has {node.num_gpus - used} of {node.num_gpus} GPUs free"
            raise FleetError(message)
        self.ever_started.add(config.incarnation)
        self.actors[config.incarnation] = FakeActor(config, node_id, num_gpus, self.clock.time_s + self.start_s)
        self.log.append(f"start {config.incarnation} on {node_id}")

    async def stop_actor(self, incarnation: Incarnation, *, timeout_s: float) -> None:
        self._fail("stop_actor")
        if self.actors.pop(incarnation, None) is not None:
            self.log.append(f"{'kill' if timeout_s == 0 else 'stop'} {incarnation}")

    async def assume(self, incarnation: Incarnation, copies: Sequence[CopyId], *, epoch: int) -> None:
        self._fail("assume")
        actor = self._running(incarnation, epoch)
        new = [copy for copy in copies if copy not in actor.slots]
        if len(actor.slots) + len(new) > actor.config.num_slots:
            message = f"{incarnation} has {actor.config.num_slots - len(actor.slots)} of {actor.config.num_slots} slots free; {len(new)} were asked for"
            raise SlotsExhausted(message)
        for copy in new:
            if copy.version not in self.nodes[actor.node_id].blobs:
                message = f"{copy} is not in the store of {actor.node_id}"
                raise CheckpointError(message)
            actor.slots[copy] = FakeSlot(copy, SlotState.LOADING, self.clock.time_s + self.load_s, 192)
        self.log.append(f"assume {' '.join(str(copy.expert) for copy in copies)} on {incarnation} @{epoch}")

    async def drain(self, incarnation: Incarnation, copies: Sequence[CopyId], *, epoch: int) -> None:
        self._fail("drain")
        actor = self._running(incarnation, epoch)
        for copy in copies:
            if copy in actor.slots:
                actor.slots[copy].state = SlotState.DRAINING
        self.log.append(f"drain {' '.join(str(copy.expert) for copy in copies)} on {incarnation} @{epoch}")

    async def release(self, incarnation: Incarnation, copies: Sequence[CopyId], *, epoch: int) -> None:
        self._fail("release")
        actor = self._running(incarnation, epoch)
        for copy in copies:
            actor.slots.pop(copy, None)
        self.log.append(f"release {' '.join(str(copy.expert) for copy in copies)} on {incarnation} @{epoch}")

    async def start_router(self, config: RouterConfig, *, node_id: str) -> None:
        self._fail("start_router")
        self._alive(node_id)
        if config.router_id not in self.routers:
            self.routers[config.router_id] = (config, node_id, self.clock.time_s + self.start_s)
            self.log.append(f"start {config.router_id} on {node_id}")

    async def stop_router(self, router_id: str, *, timeout_s: float) -> None:
        self._fail("stop_router")
        self.hung_routers.discard(router_id)
        if self.routers.pop(router_id, None) is not None:
            self.log.append(f"stop {router_id}")

    async def stop_agents(self, *, timeout_s: float) -> None:
        self.log.append("stop agents")

    async def close(self) -> None:
        return

    def kill_actor(self, incarnation: Incarnation) -> None:
        """Its process is gone; nobody is told."""
        del self.actors[incarnation]

    def kill_node(self, node_id: str) -> None:
        """The machine is gone with all on it."""
        self.nodes[node_id].alive = False
        self.nodes[node_id].blobs.clear()
        self.actors = {incarnation: actor for incarnation, actor in self.actors.items() if actor.node_id != node_id}

    def add_node(self, node_id: str, gpus: float = 1.0) -> None:
        """A machine joins."""
        self.nodes[node_id] = FakeNode(node_id, gpus)

    def ready_copies(self) -> dict[CopyId, set[Incarnation]]:
        """Who could answer for each copy right now."""
        self._settle()
        ready: dict[CopyId, set[Incarnation]] = {}
        for incarnation, actor in self.actors.items():
            for slot in actor.slots.values():
                if slot.state is SlotState.READY and not actor.hung and actor.silent_since_s is None:
                    ready.setdefault(slot.copy, set()).add(incarnation)
        return ready

    def _settle(self) -> None:
        for actor in self.actors.values():
            for slot in actor.slots.values():
                if slot.state is SlotState.LOADING and self.clock.time_s >= slot.ready_at_s:
                    slot.state = SlotState.READY

    def _observation(self, incarnation: Incarnation, actor: FakeActor) -> ActorObservation:
        if actor.hung:
            return ActorObservation(incarnation, ActorState.UNREACHABLE, actor.node_id, reason="no report")
        if self.clock.time_s < actor.ready_at_s:
            return ActorObservation(incarnation, ActorState.STARTING, actor.node_id)
        slots = tuple(SlotReport(slot.copy, slot.state, slot.num_bytes) for slot in actor.slots.values())
        report = ActorReport(
            incarnation=incarnation,
            pid=1000 + incarnation.generation % 10_000,
            process_start_s=actor.ready_at_s,
            node_id=actor.node_id,
            host="10.0.0.1",
            port=7000 + incarnation.generation % 10_000,
            device=actor.device,
            num_slots=actor.config.num_slots,
            capacity_bytes=self.capacity_bytes,
            used_bytes=sum(slot.num_bytes for slot in slots),
            slots=slots,
            max_epoch=actor.max_epoch,
            code_digest=actor.config.code_digest,
            config_digest=actor.config.config_digest,
            frames_done=actor.frames_done,
            oldest_age_s=actor.oldest_age_s,
        )
        silent_s = 0.0 if actor.silent_since_s is None else max(1e-3, self.clock.time_s - actor.silent_since_s)
        return ActorObservation(incarnation, ActorState.READY, actor.node_id, report, silent_s=silent_s)

    def _running(self, incarnation: Incarnation, epoch: int) -> FakeActor:
        actor = self.actors.get(incarnation)
        if actor is None or actor.hung or actor.silent_since_s is not None or self.clock.time_s < actor.ready_at_s:
            message = f"{incarnation} does not answer"
            raise FleetError(message)
        if epoch < actor.max_epoch:
            message = f"epoch {epoch} is older than {actor.max_epoch}, which {incarnation} has seen"
            raise StaleTable(message)
        actor.max_epoch = epoch
        return actor

    def _alive(self, node_id: str) -> FakeNode:
        node = self.nodes.get(node_id)
        if node is None or not node.alive:
            message = f"{node_id} is not alive"
            raise FleetError(message)
        return node

    def _fail(self, command: str) -> None:
        error = self.fail_next.pop(command, None)
        if error is not None:
            raise error
