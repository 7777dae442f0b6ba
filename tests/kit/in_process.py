"""A whole cluster in one process, without Ray: everything real but the controller and the fleet.

Expert actors with their store, threads and links; a router behind gRPC with a token; the control service, with a table made of what the actors report.

    with in_process_cluster({"m": folder}, tmp_path, replicas=2) as cluster:
        with cluster.client() as client:
            client.dispatch(rows, model="m", layer=0)
        cluster.kill("actor-0")

It runs on an event loop in a thread of its own, so that blocking clients and transformers can be used from the test's thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from actors.expert_actor import ExpertActor
from actors.expert_store import ExpertStore
from cluster.control_service import ControlServer
from cluster.core.descriptors import DType, Manifest
from cluster.core.health import LinkReport, Wrong
from cluster.core.ids import CopyId, ExpertId, Incarnation, Role
from cluster.core.launch import Launch, actor_config, router_config
from cluster.core.link_frames import derive_link_key
from cluster.core.placement import wanted_copies
from cluster.core.routing_table import ActorEndpoint, RoutingTable, TableCopy, TableModel
from cluster.core.spec import ActorsSpec, AuthSpec, ClusterSpec, ControlSpec, HedgingSpec, LinkSpec, ModelSpec, RouterSpec, ShadowSpec, TelemetrySpec
from cluster.core.status import ActorReport, SlotState
from kit.waiting import wait_until
from router_service.client import RouterClient
from router_service.server import RouterActor, RouterSecrets

torch.set_num_threads(1)

TENANT = "default"
TOKEN = "in-process-tenant-token-0123456789abcdef"  # noqa: S105  (of a cluster that ends with its test)
LINK_SECRET = b"the link secret of an in-process cluster"
CONTROL_TOKEN = b"its control token"
LIMIT_S = 60.0
STOP_S = 1.0
POLL_S = 0.005
_R = TypeVar("_R")


@dataclass
class TableDesk:
    """The controller as its control service needs it: hands out the newest table and notes which incarnations routers have lost."""

    generation: int = 1
    table: RoutingTable | None = None
    lost: set[Incarnation] = field(default_factory=set)
    wrong: list[Wrong] = field(default_factory=list)
    _newer: asyncio.Event = field(default_factory=asyncio.Event)

    def publish(self, table: RoutingTable) -> None:
        self.table = table
        self._newer.set()
        self._newer = asyncio.Event()

    def register_router(self, generation: int, last_epoch: int) -> int:  # noqa: ARG002  (the controller's signature)
        return generation or 2

    def report_health(
        self, _router_id: str, _epoch: int, links: Iterable[LinkReport], _tokens: Mapping[ExpertId, int], _window_s: float, wrong: Sequence[Wrong]
    ) -> int:
        self.lost.update(link.incarnation for link in links if not link.is_connected)
        self.wrong += wrong
        return 0 if self.table is None else self.table.epoch

    async def wait_until_newer(self, epoch: int, *, timeout_s: float) -> RoutingTable | None:
        async with asyncio.timeout(timeout_s):
            while self.table is None or self.table.epoch <= epoch:
                await self._newer.wait()
        return self.table


class InProcessCluster:
    """A running cluster. Actor j holds expert j of every layer, as far as there are actors; further replicas go to the next ones, shadows to others."""

    def __init__(self, spec: ClusterSpec, root: Path) -> None:
        self.spec = spec
        self.token = TOKEN
        self.endpoint = ""
        self.metrics_port = 0
        self.store_dir = root / "store"
        self.store = ExpertStore(self.store_dir)
        self.manifests: dict[str, Manifest] = {}
        self.actors: dict[str, ExpertActor] = {}
        self._generations: dict[str, int] = {}
        self._launch = Launch(self.store_dir)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="in-process-cluster", daemon=True)
        self._desk = TableDesk()
        self._control: ControlServer | None = None
        self.router: RouterActor | None = None

    def client(self, **settings: Any) -> RouterClient:
        """A blocking client with the token."""
        return RouterClient(self.endpoint, **{"token": self.token, "timeout_s": LIMIT_S, **settings})

    def kill(self, actor_id: str) -> None:
        """The actor's process is gone, as its peers see it: every socket closes without a word. Nobody else is told."""
        self._call(self._kill(actor_id))

    def stop_actor(self, actor_id: str) -> None:
        """The actor says goodbye and ends."""
        self._call(self.actors.pop(actor_id).stop(STOP_S))

    def start_again(self, actor_id: str) -> None:
        """A new life of an actor that was killed, with all copies that are at home there; routers learn of it with the next `publish`."""
        generation = 1 + max(self._generations.values())
        self._call(self._start_actor(Incarnation(actor_id, generation), self._homes()[actor_id]))

    def publish(self) -> None:
        """A newer table of what the actors that are left report; returns when the router uses it."""
        self._call(self._publish())
        self._wait_until_used()

    def restart_router(self) -> None:
        """End the router and what it has under way, then start another one; it listens where the first one did."""
        self._call(self._stop_router())
        self._call(self._start_router())

    def start(self) -> None:
        self._thread.start()
        self._call(self._start())
        self._wait_until_used()

    def stop(self) -> None:
        try:
            self._call(self._stop())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(LIMIT_S)
            self._loop.close()

    def _call(self, work: Coroutine[Any, Any, _R]) -> _R:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(LIMIT_S)

    def _wait_until_used(self) -> None:
        epoch = self._desk.table.epoch if self._desk.table is not None else 0
        with self.client() as client:
            wait_until(lambda: client.status().epoch >= epoch, f"the router uses the table of epoch {epoch}", timeout_s=LIMIT_S)

    async def _start(self) -> None:
        self._control = ControlServer("127.0.0.1", 0)
        await self._control.start(self._desk, CONTROL_TOKEN)
        self._launch = Launch(self.store_dir, control_address=self._control.address)
        await asyncio.to_thread(self._import_models)
        homes = self._homes()
        for generation, (actor_id, copies) in enumerate(homes.items(), start=1):
            await self._start_actor(Incarnation(actor_id, generation), copies)
        await self._publish()
        await self._start_router()

    def _import_models(self) -> None:
        for model in self.spec.models:
            self.manifests[model.name] = self.store.import_model(model.path, name=model.name, dtype=model.dtype, shadow=model.shadow)

    def _homes(self) -> dict[str, list[CopyId]]:
        count = self.spec.actors.count or 1
        homes: dict[str, list[CopyId]] = {f"actor-{number}": [] for number in range(count)}
        for model in self.spec.models:
            for copy in wanted_copies(self.manifests[model.name]):
                first, step = copy.expert.index, 1 + copy.expert.layer % max(1, count - model.replicas)
                places = range(first, first + model.replicas) if copy.role is Role.REPLICA else (first + model.replicas - 1 + step,)
                for place in places:
                    homes[f"actor-{place % count}"].append(copy)
        return homes

    async def _start_actor(self, incarnation: Incarnation, copies: list[CopyId]) -> None:
        actor = ExpertActor(actor_config(self.spec, self._launch, incarnation, len(copies) or 1), derive_link_key(LINK_SECRET, incarnation))
        self.actors[incarnation.actor_id] = actor
        self._generations[incarnation.actor_id] = incarnation.generation
        await actor.start(f"node-of-{incarnation.actor_id}", "127.0.0.1")
        reply = await actor.assume(copies, 1)
        assert reply.ok, reply.message
        async with asyncio.timeout(LIMIT_S):
            while SlotState.LOADING in (states := {slot.state for slot in (await actor.report()).slots}):  # noqa: ASYNC110  (a report is all there is)
                await asyncio.sleep(POLL_S)
        assert states <= {SlotState.READY}, states

    async def _publish(self) -> None:
        reports = [await actor.report() for actor in self.actors.values()]
        epoch = 1 if self._desk.table is None else self._desk.table.epoch + 1
        self._desk.publish(table_of_reports(reports, self.manifests, epoch=epoch, ladder=self.spec.models[0].ladder))

    async def _start_router(self) -> None:
        self.router = RouterActor(router_config(self.spec, self._launch, "router-0"), RouterSecrets(LINK_SECRET, CONTROL_TOKEN))
        observation = await self.router.start("node-of-router")
        self.endpoint, self.metrics_port = f"{observation.host}:{observation.port}", observation.metrics_port

    async def _stop_router(self) -> None:
        router, self.router = self.router, None
        if router is not None:
            await router.stop(0.0)

    async def _kill(self, actor_id: str) -> None:
        running = self.actors.pop(actor_id)._running
        assert running is not None
        await running.links._stop_listening()
        for link in tuple(running.links._links):
            link.stream.close()
        if running.links._sweeper is not None:
            running.links._sweeper.cancel()
        if running.links._inbox is not None:
            running.links._inbox.close()
        if running.sentinel is not None:  # which ends with a process that is really killed
            await asyncio.to_thread(running.sentinel.stop)
        await asyncio.to_thread(running.runtime.stop, STOP_S)

    async def _stop(self) -> None:
        await self._stop_router()
        for actor in self.actors.values():
            await actor.stop(STOP_S)
        if self._control is not None:
            await self._control.stop()


def table_of_reports(reports: list[ActorReport], manifests: Mapping[str, Manifest], *, epoch: int, ladder: tuple[str, ...] = ("shadow",)) -> RoutingTable:
    """Every copy that is ready, and what is missing of each model."""
    copies: dict[ExpertId, tuple[TableCopy, ...]] = {copy.expert: () for manifest in manifests.values() for copy in wanted_copies(manifest)}
    for report in reports:
        for slot in report.slots:
            if slot.state is SlotState.READY:
                copies[slot.copy.expert] += (TableCopy(report.incarnation, slot.copy.version, slot.copy.role),)
    copies = {expert: tuple(sorted(held, key=lambda copy: (copy.role, copy.incarnation))) for expert, held in copies.items()}
    models = {}
    for name, manifest in manifests.items():
        missing = sum(not published for expert, published in copies.items() if expert.model == name)
        models[name] = TableModel(name, manifest.digest, len(manifest.experts), missing, ladder)
    endpoints = {report.incarnation.actor_id: ActorEndpoint(report.incarnation, report.host, report.port, report.node_id, report.device) for report in reports}
    return RoutingTable(epoch, endpoints, copies, models)


@contextmanager
def in_process_cluster(
    models: Mapping[str, Path],
    root: Path,
    *,
    dtype: DType | str = "checkpoint",
    num_actors: int = 2,
    replicas: int = 1,
    shadow: ShadowSpec | None = None,
    ladder: tuple[str, ...] = ("shadow",),
    trace_dir: Path | None = None,
    actor_spans: bool = False,
    router: Mapping[str, Any] | None = None,
    actors: Mapping[str, Any] | None = None,
    hedging: HedgingSpec | None = None,
) -> Iterator[InProcessCluster]:
    """A cluster that serves `models` (name: checkpoint folder) until the block ends. `root` takes the store and the token file.

    `router` and `actors` are further fields of those sections of the spec. With a `trace_dir` every request is traced and its caller's trace joined.
    """
    root.mkdir(parents=True, exist_ok=True)
    token_file = root / "token"
    token_file.write_text(TOKEN)
    token_file.chmod(0o600)
    spec = ClusterSpec(
        name="in-process",
        models=tuple(ModelSpec(name=name, path=path, dtype=dtype, replicas=replicas, shadow=shadow, ladder=ladder) for name, path in models.items()),
        actors=ActorsSpec(**{"count": num_actors, "device": "cpu", "memory_bytes": 1 << 30, **(actors or {})}),
        link=LinkSpec(host="127.0.0.1"),
        router=RouterSpec(**{"port": 0, **(router or {})}),
        hedging=hedging or HedgingSpec(),
        control=ControlSpec(host="127.0.0.1"),
        auth=AuthSpec(tokens={TENANT: token_file}, trusted_trace_tenants=frozenset({TENANT})),
        telemetry=TelemetrySpec(sampling_ratio=0.0 if trace_dir is None else 1.0, trace_dir=trace_dir, actor_spans=actor_spans),
    )
    cluster = InProcessCluster(spec, root)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
