"""What stays while a scenario is repeated: the cluster, the load process, the watcher, known answers, and what the cluster looked like when all was well."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chaos.busy import neighbours
from chaos.checker import Checker
from chaos.core.experiment import Load
from chaos.core.observations import Observations, Request, RouterSample, Strike
from chaos.core.targets import Process
from chaos.known_answers import write_known_answers
from chaos.load_process import LoadProcess
from chaos.load_settings import LoadSettings
from chaos.router_facts import grown, read_counters, read_waits_s
from chaos.target import LocalTarget
from chaos.watcher import Watcher
from cluster.core.errors import ConfigError, FleetError
from cluster.core.ids import ExpertId
from cluster.core.spec import ModelSpec
from cluster.deploy.connection import read_token
from cluster.local import processes
from protos.moelastic.control.v1 import control_pb2 as pb
from router_service.client import RouterClient
from router_service.client_types import LayerInfo

BF16_BYTES = 2
READY = "ready"


@dataclass(frozen=True, slots=True)
class Healthy:
    """What the cluster looked like when all was well; it is whole again when it looks so again."""

    num_actors: int
    num_nodes: int
    num_shadows: int
    num_processes: int


@dataclass
class Session:
    """One scenario's surroundings. `rate` is what the open loop sends; 0 in a closed one."""

    target: LocalTarget
    load_spec: Load
    model: ModelSpec
    layer: LayerInfo
    client: RouterClient
    watcher: Watcher
    load: LoadProcess
    checker: Checker
    rate: float
    peak: float
    healthy: Healthy
    router: Process | None = None
    lack: str = ""
    _metrics_address: str = ""
    _counters: dict[str, float] = field(default_factory=dict)
    _counted_s: float = 0.0

    @property
    def wanted_replicas(self) -> dict[ExpertId, int]:
        """Copies that the spec wants of each expert of the load's layer."""
        return {ExpertId(self.model.name, self.layer.layer, index): self.model.replicas for index in range(self.layer.num_experts)}

    def lacks(self) -> str:
        """What is not yet as it was when all was well; empty when the cluster is whole. It blocks for a status call."""
        try:
            status = self.target.status()
        except FleetError as error:
            return str(error)
        ready = [actor for actor in status.actors if actor.state == READY]
        shadows = _num_shadowed(status)
        facts = (
            (status.state == "SERVING", f"the controller says {status.state}: {status.message}"),
            (status.num_copies_ready >= status.num_copies_wanted, f"{status.num_copies_ready} of {status.num_copies_wanted} copies"),
            (len(ready) >= self.healthy.num_actors, f"{len(ready)} of {self.healthy.num_actors} actors"),
            (shadows >= self.healthy.num_shadows, f"{shadows} of {self.healthy.num_shadows} shadows"),
            (sum(node.alive for node in status.nodes) >= self.healthy.num_nodes, f"fewer than {self.healthy.num_nodes} nodes"),
        )
        missing = [words for holds, words in facts if not holds]
        return missing[0] if missing else self._lacks_link()

    def _lacks_link(self) -> str:
        sample = self.watcher.look()
        if sample is None:
            return "the router does not answer"
        serving = {incarnation for copies in sample.replicas.values() for incarnation in copies}
        down = sorted(incarnation for incarnation in serving if sample.links.get(incarnation) != READY)
        return f"the router's link to {down[0]} is {sample.links.get(down[0], 'gone')}" if down else ""

    async def wait_until_whole(self, limit_s: float, pause_s: float = 0.25) -> str:
        """Empty once the cluster is whole, else what it lacked when the time was up."""
        deadline_s = time.monotonic() + limit_s
        while lack := await asyncio.to_thread(self.lacks):
            self.lack = lack
            if time.monotonic() > deadline_s:
                return f"not whole within {limit_s:g} s: {lack}"
            await asyncio.sleep(pause_s)
        self.lack = ""
        return ""

    def count_from_here(self) -> None:
        """Remember the router's counters, so that `counts` can say by how much they grew."""
        try:
            addresses = [router.metrics_address for router in self.target.status().routers if router.metrics_address]
        except FleetError:
            addresses = []
        self._metrics_address = addresses[0] if addresses else ""
        self._counters, self._counted_s = read_counters(self._metrics_address), time.monotonic()

    def distrust_s(self, begin_s: float) -> float | None:
        """When the router first lost or ejected an actor after that, as far as it still knows: it keeps the last time of each, and the first of a burst."""
        kept = ("moe_first_distrust_seconds", "moe_last_distrust_seconds")
        found = [value for name, value in read_counters(self._metrics_address).items() if name.startswith(kept) and value >= begin_s]
        return min(found, default=None)

    def counts(self, requests: Iterable[Request]) -> dict[str, float]:
        """What the router's own counters, and the process table, say about the time since `count_from_here`."""
        after = read_counters(self._metrics_address)
        found: dict[str, float] = {"more_processes": float(max(0, len(processes.members(self.target.cluster.state)) - self.healthy.num_processes))}
        sent = grown(self._counters, after, 'moe_link_bytes_total{direction="sent"}')
        if sent is not None:
            found["rows_sent"] = sent / (self.layer.hidden_size * BF16_BYTES)
            found["rows_needed"] = float(sum(sum(request.outcomes[:2]) for request in requests if request.is_ok and request.end_s >= self._counted_s))
        series_of = {
            "redispatches": "moe_redispatches_total",
            "hedges": 'moe_redispatches_total{reason="hedge"}',
            "router_ejections": "moe_ejections_total",
        }
        for name, series in series_of.items():
            if (growth := grown(self._counters, after, series)) is not None:
                found[name] = growth
        return found

    def wait_s(self) -> float:
        """Seconds that the router's threads have waited for a core so far."""
        return read_waits_s([self.router.pid] if self.router is not None else [])

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
        """Everything seen from `control_s` to `end_s`; odd replies are replayed now."""
        requests = [request for request in self.load.requests(control_s) if request.due_s <= end_s]
        odd = {request.answer for request in requests if request.answer}
        wrong, unchecked = await asyncio.to_thread(self.checker.check, odd)
        return Observations(
            control_s=control_s,
            begun_s=begun_s,
            end_s=end_s,
            requests=tuple(requests),
            samples=tuple(sample for sample in self._samples(control_s) if sample.at_s <= end_s),
            strikes=tuple(strikes),
            wanted_replicas=self.wanted_replicas,
            choices_per_request=self.load_spec.tokens * self.layer.top_k,
            timeout_s=self.load_spec.timeout_s,
            affected_s=affected_s,
            wrong_answers=wrong,
            unchecked_answers=unchecked,
            counts=dict(counts or {}),
            whole_again_s=whole_again_s,
        )

    def _samples(self, begin_s: float) -> list[RouterSample]:
        """The samples of a window, and the last one before it: what the table was when it began."""
        before = [sample for sample in self.watcher.since(0.0) if sample.at_s < begin_s]
        return [*before[-1:], *self.watcher.since(begin_s)]


@contextlib.asynccontextmanager
async def opened(target: LocalTarget, load_spec: Load, folder: Path, *, seed: int, recover_s: float, peak: float | None = None) -> AsyncIterator[Session]:
    """Start everything a scenario needs, end it on every way out. Raises ConfigError, FleetError. `peak`: of an earlier session, not measured again."""
    connection = target.connection
    async with contextlib.AsyncExitStack() as stack:
        client = stack.enter_context(RouterClient(connection.router_address, token=read_token(connection.token_path), timeout_s=load_spec.timeout_s))
        model = _model_of(target, load_spec)
        layer = await asyncio.to_thread(_layer_of, client, model, load_spec)
        known = await asyncio.to_thread(write_known_answers, folder / "known.npz", model, layer.layer, load_spec.tokens, seed=seed)
        settings = LoadSettings(
            address=connection.router_address,
            token_path=connection.token_path,
            model=model.name,
            layer=layer.layer,
            fidelity=load_spec.fidelity,
            timeout_s=load_spec.timeout_s,
            known_path=known,
            records_path=folder / "requests.jsonl",
            kept_dir=folder / "kept",
            seed=seed,
        )
        watcher = Watcher(client, model.name, layer.layer)
        healthy = await _until_healthy(target, recover_s, await asyncio.to_thread(_num_actors, target, client))
        load = await LoadProcess.start(settings, folder)
        stack.push_async_callback(load.close)
        found = peak or (await load.measure_peak(load_spec.callers) if load_spec.share_of_peak is not None else 0.0)
        rate = load_spec.rate or (found * load_spec.share_of_peak if load_spec.share_of_peak is not None else 0.0)
        watcher.start()
        stack.callback(watcher.stop)
        inventory = await asyncio.to_thread(target.inventory)
        router = inventory.routers[0] if inventory.routers else None
        stack.enter_context(neighbours(load_spec.busy_processes))
        yield Session(
            target, load_spec, model, layer, client, watcher, load, Checker(target.store_dirs, known, settings.kept_dir), rate, found, healthy, router
        )  # fmt: skip


def _model_of(target: LocalTarget, load_spec: Load) -> ModelSpec:
    model = target.spec.models[0] if load_spec.model is None else target.spec.model(load_spec.model)
    if model is None:
        message = f"load.model: {load_spec.model} is not served by {target.name}; served: {', '.join(found.name for found in target.spec.models)}"
        raise ConfigError(message)
    return model


def _layer_of(client: RouterClient, model: ModelSpec, load_spec: Load) -> LayerInfo:
    layers = client.model(model.name).layers
    found = layers[0] if load_spec.layer is None else next((layer for layer in layers if layer.layer == load_spec.layer), None)
    if found is None:
        message = f"load.layer: {load_spec.layer} is not a MoE layer of {model.name}; there are {', '.join(str(layer.layer) for layer in layers)}"
        raise ConfigError(message)
    return found


async def _until_healthy(target: LocalTarget, limit_s: float, num_wanted: int) -> Healthy:
    """What the cluster looks like once the controller says that all is well. Raises FleetError when it does not within the limit."""
    deadline_s = time.monotonic() + limit_s
    while True:
        status = await asyncio.to_thread(target.status)
        if status.state == "SERVING" and status.num_copies_ready >= status.num_copies_wanted:
            break
        if time.monotonic() > deadline_s:
            message = f"{target.name} is not whole within {limit_s:g} s: {status.state}: {status.message}; `moelastic status` shows what is missing"
            raise FleetError(message)
        await asyncio.sleep(0.25)
    ready = [actor for actor in status.actors if actor.state == READY]
    return Healthy(
        num_actors=min(len(ready), num_wanted),
        # Ray still counts a node that was lost a moment ago, beside the one that was started in its place.
        num_nodes=min(sum(node.alive for node in status.nodes), len(target.cluster.state.nodes)),
        num_shadows=_num_shadowed(status),
        num_processes=len(await asyncio.to_thread(processes.members, target.cluster.state)),
    )


def _num_actors(target: LocalTarget, client: RouterClient) -> int:
    """Actors that the spec wants: one that is being replaced may run beside its successor for a while, and does not count twice."""
    actors = target.spec.actors
    widest = max(layer.num_experts for model in target.spec.models for layer in client.model(model.name).layers)
    return (actors.count or widest) + actors.standby


def _num_shadowed(status: pb.GetClusterStatusResponse) -> int:
    """Experts with a shadow that is ready, however many it has."""
    slots = [slot for actor in status.actors if actor.state == READY for slot in actor.slots]
    return len({(slot.model, slot.layer, slot.index) for slot in slots if slot.role == pb.ROLE_SHADOW and slot.state == READY})
