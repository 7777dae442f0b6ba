"""A whole RouterActor in this process: a control service that speaks when told, one actor behind a real link, a store with one model's gates."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.core.actor_config import RouterConfig
from cluster.core.descriptors import Manifest
from cluster.core.errors import CheckpointError
from cluster.core.routing_table import RoutingTable, TableCopy
from cluster.core.spec import AuthSpec, ClusterSpec, ModelSpec, RouterSpec, SchedulingSpec
from kit.feed import CONTROL_TOKEN, FakeControl, control
from kit.lanes import table_of
from kit.link import SECRET, FakeActor, running_actor, until
from kit.pipelines import NAME, D, E, served, version_of
from kit.router import LAYER, TOKEN
from router_service.client import AsyncRouterClient
from router_service.server import RouterActor, RouterSecrets


@dataclass
class Blob:
    tensors: dict[str, np.ndarray]


@dataclass
class FakeStore:
    """A node-local store of one model's gates."""

    manifests: dict[str, Manifest] = field(default_factory=dict)
    loads: int = 0

    def manifest(self, digest: str) -> Manifest:
        if digest not in self.manifests:
            message = f"no manifest {digest}; import the model"
            raise CheckpointError(message)
        self.loads += 1
        return self.manifests[digest]

    def open(self, digest: str) -> Blob:
        rng = np.random.default_rng(int(digest))
        return Blob({"weight": rng.standard_normal((E, D)).astype(np.float32)})


def manifest() -> Manifest:
    model = served().manifest.model
    return Manifest(model=model, experts={}, gates={str(entry.layer): str(entry.layer) for entry in model.layers})


def store() -> FakeStore:
    return FakeStore({manifest().digest: manifest()})


def placed_on(actor: FakeActor, *, epoch: int = 1, missing: tuple[int, ...] = (), digest: str = "") -> RoutingTable:
    """Every expert of the model on one actor, but for those that are missing."""
    incarnation = actor.server.incarnation
    copies = {(layer, index): () if index in missing else (TableCopy(incarnation, version_of(index)),) for layer in (0, 3) for index in range(E)}
    made = table_of(NAME, copies, epoch=epoch)
    models = {name: type(entry)(name, digest or manifest().digest, entry.num_experts, entry.num_missing) for name, entry in made.models.items()}
    return RoutingTable(epoch, {incarnation.actor_id: actor.endpoint}, made.copies, models)


def config(tmp_path: Path, address: str, *, port: int = 0, **router: Any) -> RouterConfig:
    token = tmp_path / "token"
    token.write_text(f"{TOKEN}\n")
    token.chmod(0o600)
    spec = ClusterSpec(
        scheduling=SchedulingSpec(answering_niceness=0),  # the process may be the tests' own
        name="test",
        models=(ModelSpec(name=NAME, path=tmp_path),),
        router=RouterSpec(port=port, **router),
        auth=AuthSpec(tokens={"default": token}),
    )
    return RouterConfig(router_id="router-0", spec=spec, control_address=address, store_dir=tmp_path / "store")


def make(settings: RouterConfig, models: FakeStore | None = None) -> RouterActor:
    return RouterActor(settings, RouterSecrets(SECRET, CONTROL_TOKEN), store=models or store())


@dataclass
class RouterProcess:
    router: RouterActor
    control: FakeControl
    actor: FakeActor
    client: AsyncRouterClient
    address: str
    config: RouterConfig

    async def serving(self, epoch: int) -> None:
        """Until the router uses this epoch."""
        parts = self.router._parts
        await until(lambda: parts.table is not None and parts.table.epoch == epoch)

    async def health(self, service: str) -> int:
        async with grpc.aio.insecure_channel(self.address) as channel:
            return (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=10)).status

    async def dispatch(self, **options: Any) -> Any:
        return await self.client.dispatch(np.ones((3, D), np.float32), layer=LAYER, **options)


@asynccontextmanager
async def running(tmp_path: Path, models: FakeStore | None = None, **router: Any) -> AsyncIterator[RouterProcess]:
    """A router with a controller that has not spoken yet, and one actor whose experts give back what they get."""
    async with control() as feed, running_actor() as actor:
        settings = config(tmp_path, feed.address, **router)
        hosted = make(settings, models)
        seen = await hosted.start("node-1")
        address = f"{seen.host}:{seen.port}"
        async with AsyncRouterClient(address, token=TOKEN, timeout_s=20.0) as client:
            try:
                yield RouterProcess(hosted, feed, actor, client, address, settings)
            finally:
                await hosted.stop(1.0)
