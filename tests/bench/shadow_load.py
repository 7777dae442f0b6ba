"""Half of the usual peak, with the primaries of one actor gone for good: what shadows of each codec answer of it, and whether the queue stays bounded.

One deployment serves the same layer once for each codec, an actor on each node. One actor is killed and cannot come back: its GPU is quarantined after one
failure, the others are full, and so are all slots. int8 to int2 are packed from the primaries by the nodes. Shadows in the other codecs are fitted by
calibration; here a ladder file beside the layer holds some of the right shape and finite numbers, since what counts is what they cost, not what they answer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import numpy as np

from actors.core.codecs import CODECS, FITTED_CODECS, packed_bytes, packed_layout
from actors.expert_blob import digest_of, encode
from bench.layer import random_rows, save_layer
from bench.rig import with_bench
from bench.rows import CallerProcess, Row, settle
from bench.settings import LAYER, OURS, Case, Settings, ShadowCodec
from bench.tables import Section, Table
from cluster.core.descriptors import CodecRecord, ExpertDescriptor
from cluster.core.ladder_record import SHIPPED, WITHOUT, LadderRecord, LadderShadow
from cluster.core.spec import ActorsSpec, ClusterSpec, ModelSpec, RepairSpec, RouterSpec, ShadowSpec
from cluster.local.cluster import LocalCluster
from cluster.registry.checkpoint import Checkpoint
from cluster.registry.ladder_file import write_ladder
from kit.deployments import Deployment, deployed, kill
from kit.waiting import wait_until
from router_service.client import RouterClient

LOST_ACTOR = "actor-0"
CALLERS, TOKENS = 16, 64
SHARE, GOAL = 0.5, 0.8
TIMEOUT_S = 5.0
LOOK_S = 0.1
WAIT_S = 60.0
ALL_CODECS = {**CODECS, **FITTED_CODECS}


@dataclass(frozen=True, slots=True)
class Look:
    """Rows that waited for a frame or were under way in one, over all links."""

    at_s: float
    queued_tokens: int


@dataclass
class Queue:
    """Looks at the router's queue while something runs."""

    deployment: Deployment
    looks: list[Look] = field(default_factory=list)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look every LOOK_S meanwhile."""
        is_over = threading.Event()
        looking = threading.Thread(target=self._look, args=(is_over,), daemon=True)
        looking.start()
        try:
            yield
        finally:
            is_over.set()
            looking.join(WAIT_S)

    def _look(self, is_over: threading.Event) -> None:
        with self.deployment.client() as client:
            while not is_over.wait(LOOK_S):
                status = client.status()
                self.looks.append(Look(status.uptime_s, sum(link.queued_tokens for link in status.links)))

    def halves(self) -> tuple[float, float]:
        """The mean of the first half of all looks, and of the second."""
        tokens = [look.queued_tokens for look in self.looks]
        half = max(1, len(tokens) // 2)
        return (mean(tokens[:half]), mean(tokens[half:] or tokens)) if tokens else (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Sustained:
    """One codec. Requests are those offered at half of the healthy peak; `ratio`: answered while they were offered, beside offered.

    `num_answered` includes those that were answered after that. `peak_ratio`: callers who wait, after the loss beside before it.
    """

    codec: str
    memory_percent: float
    shadow_share: float
    offered_tokens_per_s: float
    num_sent: int
    num_answered: int
    ratio: float
    p50_s: float
    p99_s: float
    largest_queue_tokens: int
    queue_first_half: float
    queue_second_half: float
    peak_ratio: float

    @property
    def is_bounded(self) -> bool:
        """Whether the queue is no longer in the second half than in the first, but for what one round of callers makes."""
        return self.queue_second_half <= 1.5 * self.queue_first_half + CALLERS * TOKENS

    @property
    def is_reached(self) -> bool:
        """Against the goal."""
        return self.ratio >= GOAL and self.is_bounded


def run(cluster: LocalCluster, settings: Settings, folder: Path) -> Section:
    """Find the healthy peak, kill an actor, offer half of the peak to each codec's layer in turn."""
    spec = spec_of(cluster, settings, folder)
    (folder / "shadow-load").mkdir()
    with deployed(cluster, spec, folder / "shadow-load") as deployment, _caller(deployment, settings) as row:
        healthy = {codec: _peak(row, codec, settings) for codec in settings.shadow_codecs}
        peak = median(healthy.values())
        kill(deployment.pid_of(LOST_ACTOR))
        shares = _wait_for_shadows(deployment, settings)
        found = [_sustained(deployment, row, settings, codec, peak, healthy[codec], shares[codec]) for codec in settings.shadow_codecs]
        left = {codec: _shadow_share(deployment, settings, codec) for codec in settings.shadow_codecs}
    if back := [codec for codec, share in left.items() if share == 0.0]:
        message = f"replicas answered again for {', '.join(back)} before everything was measured"
        raise RuntimeError(message)
    return section_of(found, peak)


def spec_of(cluster: LocalCluster, settings: Settings, folder: Path) -> ClusterSpec:
    """A model for each codec; slots for homes of replicas and shadows, and not one more."""
    num_nodes = len(cluster.state.nodes) - 1
    num_experts, codecs = settings.sizes.num_experts, settings.shadow_codecs
    if num_experts % num_nodes:
        message = f"{num_experts} experts on {num_nodes} nodes leave slots free, and the lost experts would be loaded there"
        raise ValueError(message)
    return ClusterSpec(
        name="bench-shadows",
        models=tuple(_model(codec, settings, folder / f"shadows-{codec}") for codec in codecs),
        actors=ActorsSpec(
            count=num_nodes,
            num_gpus=settings.gpus_per_node,
            slots_per_actor=2 * len(codecs) * num_experts // num_nodes,
            free_slots=0,
            start_parallelism=2,
            layout=settings.layout,
        ),
        router=RouterSpec(port=0),
        repair=RepairSpec(quarantine_failures=1, stock=False),
    )


def _model(codec: ShadowCodec, settings: Settings, folder: Path) -> ModelSpec:
    save_layer(folder, settings.sizes, settings.sizes.intermediate_size)
    if codec in FITTED_CODECS:
        add_shadows(folder, FITTED_CODECS[codec])
    return ModelSpec(name=codec, path=folder, shadow=ShadowSpec(memory_fraction=1.0, codecs=(codec,)))


def add_shadows(folder: Path, codec: CodecRecord, seed: int = 0) -> None:
    """Write a ladder beside a layer, with a shadow of every expert that is fitted to nothing."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    experts, shadows, damage = {}, {}, {}
    with Checkpoint.open(folder) as checkpoint:
        model = checkpoint.descriptor("m")
        for entry in model.layers:
            for index in range(entry.num_experts):
                key = f"{entry.layer}/{index}"
                experts[key] = digest_of(encode(entry.expert, checkpoint.expert(entry.layer, index, model.dtype)))
                shadows[key] = LadderShadow(codec=codec, relative_error=0.5, cosine=0.5)
                damage[key] = {WITHOUT: 1.0, SHIPPED: 0.5}
                tensors |= {f"shadow.{entry.layer}.{index}.{name}": array for name, array in _made_up(entry.expert, codec, rng).items()}
    record = LadderRecord(dtype=model.dtype, experts=experts, generalists={}, shadows=shadows, damage=damage)
    write_ladder(folder, record, tensors)


def _made_up(expert: ExpertDescriptor, codec: CodecRecord, rng: np.random.Generator) -> dict[str, Any]:
    """Arrays of a packed expert: codes and scales at random, among those that stand for numbers below 1."""
    arrays: dict[str, Any] = {}
    for name, place in packed_layout(expert, codec).items():
        is_code = place.dtype == np.uint8
        arrays[name] = rng.integers(0, 0x38, place.shape, dtype=np.uint8) if is_code else np.full(place.shape, 2.0**-6).astype(place.dtype)
    return arrays


@contextmanager
def _caller(deployment: Deployment, settings: Settings) -> Iterator[Row]:
    connection = deployment.connection
    options = {"address": connection.router_address, "token_file": str(connection.token_path)}
    caller = CallerProcess(OURS, {}, settings, options, with_bench(dict(os.environ)))
    try:
        caller.wait_until_ready()
        settle()
        yield Row(OURS, caller)
    finally:
        caller.close()


def _peak(row: Row, codec: str, settings: Settings) -> float:
    case = Case(CALLERS, TOKENS, codec)
    return median(row.measure(case, 2 * settings.seconds, settings.warm_up_calls).tokens_per_s for _ in range(3 if settings.rounds > 1 else 1))


def _wait_for_shadows(deployment: Deployment, settings: Settings) -> dict[str, float]:
    """The share of choices that shadows answer, by codec, once they do for each."""
    found: dict[str, float] = {}

    def is_there() -> bool:
        found.update({codec: _shadow_share(deployment, settings, codec) for codec in settings.shadow_codecs})
        return all(found.values())

    wait_until(is_there, "shadows answer for the lost actor", timeout_s=WAIT_S)
    return found


def _shadow_share(deployment: Deployment, settings: Settings, codec: str) -> float:
    client: RouterClient
    with deployment.client() as client:
        outcomes = client.dispatch(random_rows(settings.sizes, 8 * TOKENS, 3), model=codec, layer=LAYER).report.outcomes
    return outcomes["shadow"] / sum(outcomes.values())


def _sustained(deployment: Deployment, row: Row, settings: Settings, codec: str, peak: float, healthy: float, share: float) -> Sustained:
    """Offer half of the peak for a while, in even intervals, after a moment that expands what is packed; then let callers wait."""
    row.measure(Case(CALLERS, TOKENS, codec), settings.seconds, settings.warm_up_calls)
    queue, seconds = Queue(deployment), settings.overload_seconds
    rate_per_s = SHARE * peak / TOKENS
    with queue.watched():
        answer = row.caller.ask({"do": "flood", "model": codec, "tokens": TOKENS, "rate_per_s": rate_per_s, "seconds": seconds, "timeout_s": TIMEOUT_S})
    latencies = sorted(answer["answered_s"])
    first, second = queue.halves()
    expert = ExpertDescriptor(hidden_size=settings.sizes.hidden_size, intermediate_size=settings.sizes.intermediate_size)
    return Sustained(
        codec=codec,
        memory_percent=100 * packed_bytes(expert, ALL_CODECS[codec]) / expert.num_bytes,
        shadow_share=share,
        offered_tokens_per_s=answer["num_sent"] * TOKENS / seconds,
        num_sent=answer["num_sent"],
        num_answered=len(latencies),
        ratio=answer["num_in_window"] / answer["num_sent"],
        p50_s=median(latencies) if latencies else TIMEOUT_S,
        p99_s=quantiles(latencies, n=100)[-1] if len(latencies) > 1 else TIMEOUT_S,
        largest_queue_tokens=max((look.queued_tokens for look in queue.looks), default=0),
        queue_first_half=first,
        queue_second_half=second,
        peak_ratio=_peak(row, codec, settings) / healthy,
    )


def section_of(found: Sequence[Sustained], peak: float) -> Section:
    """The table, and what is behind it."""
    rows = [
        (
            one.codec,
            f"{one.memory_percent:.1f} %",
            f"{one.shadow_share:.0%}",
            f"{one.ratio:.3f} x {one.offered_tokens_per_s:,.0f}",
            f"{1e3 * one.p50_s:.0f} / {1e3 * one.p99_s:.0f}",
            f"{one.largest_queue_tokens:,} ({one.queue_first_half:,.0f}, {one.queue_second_half:,.0f})",
            f"{one.peak_ratio:.2f}",
            "yes" if one.is_reached else "NO",
        )
        for one in found
    ]
    columns = ("codec", "packed", "choices by shadows", "answered x offered tokens/s", "p50 / p99 ms", "queue, rows", "peak x healthy", "reached")
    note = (
        f"Healthy peak of {CALLERS} callers who wait: {peak:,.0f} tokens/s; offered: {SHARE:.0%} of it, requests of {TOKENS} tokens at even intervals."
        f" Goal: at least {GOAL} x answered meanwhile, with a bounded queue (its largest; in brackets the means of first and second half)."
        " A shadow in use is expanded once, so codecs differ in memory and in their first answer, hardly in these."
    )
    table = Table("half-peak load on shadows, one actor gone", columns, rows, note)
    return Section(
        [table], {"peak_tokens_per_s": peak, "codecs": [asdict(one) | {"is_bounded": one.is_bounded, "is_reached": one.is_reached} for one in found]}
    )
