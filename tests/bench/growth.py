"""How cost grows with tokens, experts, actors, layers and callers, with fitted exponents; where one router saturates; what a cluster of 64 GPUs would need.

Experts do next to nothing, so that what is measured is router and link.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from bench.layer import save_layer
from bench.leak import slope_of
from bench.processes import ACTOR, ROUTER, pids_of, usage_of
from bench.rig import with_bench
from bench.rows import CallerProcess, Row, settle
from bench.saturation import saturation_tables
from bench.settings import OURS, Case, Settings
from bench.tables import Section, Table
from cluster.core.spec import ActorsSpec, ClusterSpec, ModelSpec, RouterSpec
from cluster.local.cluster import LocalCluster
from kit.deployments import Deployment, deployed

TOKENS = (1, 16, 256, 4096)
EXPERTS = (8, 32, 128, 256)
ACTORS = (1, 2, 4, 8, 16)
LAYERS = (1, 4, 16)
CALLERS = (1, 4, 16, 64, 256)
BASE_ACTORS = 2
BASE_TOKENS, CALLER_TOKENS = 64, 16
# Requests per second are the limit of small ones, bytes per second of large ones.
SATURATING = (Case(64, 8, "e8"), Case(32, 512, "e8"))


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement. `router_cpu_s` is for each request."""

    size: int
    p50_s: float
    tokens_per_s: float
    router_cpu_s: float
    router_bytes: int = 0
    actor_private_bytes: float = 0.0


def run(cluster: LocalCluster, settings: Settings, folder: Path) -> Section:
    """One deployment for everything but actors, one more for every number of those."""
    models = _models(settings, folder / "growth-models")
    found: dict[str, list[Point]] = {"actors": []}
    saturated: dict[str, Point] = {}
    for count in ACTORS if settings.rounds > 1 else ACTORS[:BASE_ACTORS]:
        with ExitStack() as ending:
            row, deployment = _serve(cluster, settings, folder, models, count, ending)
            found["actors"].append(_point(row, deployment, count, Case(1, BASE_TOKENS, "e32"), settings))
            if count != BASE_ACTORS:
                continue
            found["tokens"] = [_point(row, deployment, tokens, Case(1, tokens, "e8"), settings) for tokens in TOKENS]
            found["experts"] = [_point(row, deployment, experts, Case(1, BASE_TOKENS, f"e{experts}"), settings) for experts in EXPERTS]
            found["layers"] = [_point(row, deployment, layers, Case(1, BASE_TOKENS, f"l{layers}@{layers}"), settings) for layers in LAYERS]
            found["callers"] = [_point(row, deployment, callers, Case(callers, CALLER_TOKENS, "e8"), settings) for callers in CALLERS]
            saturated = {f"{case.callers} x {case.tokens}": _point(row, deployment, case.tokens, case, settings) for case in SATURATING}
    fits = {name: exponents_of(points) for name, points in found.items()}
    data = {"points": {name: [asdict(point) for point in points] for name, points in found.items()}, "exponents": fits}
    needed = saturation_tables({name: (point.size, point.tokens_per_s, point.router_cpu_s) for name, point in saturated.items()}, settings.sizes)
    return Section([_table(found, fits), *needed.tables], data | {"saturation": needed.data})


def _models(settings: Settings, folder: Path) -> dict[str, Path]:
    """Models of many experts, and of many layers."""
    sizes = settings.sizes
    paths = {}
    for experts in EXPERTS:
        paths[f"e{experts}"] = save_layer(folder / f"e{experts}", replace(sizes, num_experts=experts), sizes.idle_size)
    for layers in LAYERS:
        for layer in range(layers):
            paths[f"l{layers}"] = save_layer(folder / f"l{layers}", sizes, sizes.idle_size, seed=layer, layer=layer)
    return paths


def _serve(cluster: LocalCluster, settings: Settings, folder: Path, models: Mapping[str, Path], count: int, ending: ExitStack) -> tuple[Row, Deployment]:
    wanted = models if count == BASE_ACTORS else {"e32": models["e32"]}
    actors = ActorsSpec(count=count, num_gpus=1 / count, free_slots=0, start_parallelism=2)
    served = tuple(ModelSpec(name=name, path=path) for name, path in wanted.items())
    place = folder / f"growth-{count}"
    place.mkdir()
    deployment = ending.enter_context(deployed(cluster, ClusterSpec(name="bench-growth", models=served, actors=actors, router=RouterSpec(port=0)), place))
    connection = deployment.connection
    options = {"address": connection.router_address, "token_file": str(connection.token_path)}
    caller = CallerProcess(OURS, {}, settings, options, with_bench(dict(os.environ)))
    ending.callback(caller.close)
    caller.wait_until_ready()
    settle()
    return Row(OURS, caller, servers=tuple(pids_of(deployment, ROUTER))), deployment


def _point(row: Row, deployment: Deployment, size: int, case: Case, settings: Settings) -> Point:
    sample = row.measure(case, 2 * settings.seconds, settings.warm_up_calls)
    routers, actors = pids_of(deployment, ROUTER), pids_of(deployment, ACTOR)
    private = [usage_of(pid).private_bytes for pid in actors]
    return Point(
        size,
        median(sample.latencies_s),
        sample.tokens_per_s,
        sample.server_cpu_s_per_call,
        sum(usage_of(pid).rss_bytes for pid in routers),
        sum(private) / len(private),
    )


def exponents_of(points: Sequence[Point]) -> dict[str, float]:
    """Of size, by least squares between logarithms: 0 does not grow, 1 grows in proportion."""
    sizes = [math.log(point.size) for point in points]
    series = {
        "p50": [point.p50_s for point in points],
        "router CPU": [point.router_cpu_s for point in points],
        "router memory": [float(point.router_bytes) for point in points],
    }
    return {name: slope_of(sizes, [math.log(max(value, 1e-9)) for value in values]) for name, values in series.items()}


def _table(found: Mapping[str, Sequence[Point]], fits: Mapping[str, Mapping[str, float]]) -> Table:
    what = {
        "tokens": "tokens of one request, 1 caller",
        "experts": f"experts of the layer, 1 caller x {BASE_TOKENS}",
        "actors": f"actors, 32 experts, 1 caller x {BASE_TOKENS}",
        "layers": f"layers, called in turn, 1 caller x {BASE_TOKENS}",
        "callers": f"callers x {CALLER_TOKENS}",
    }
    rows = []
    for name, title in what.items():
        rows += [
            (
                f"{title}: {point.size}",
                f"{1e3 * point.p50_s:.2f}",
                f"{point.tokens_per_s:,.0f}",
                f"{1e3 * point.router_cpu_s:.2f}",
                f"{point.router_bytes / 2**20:.0f}",
                f"{point.actor_private_bytes / 2**20:.0f}",
            )
            for point in found[name]
        ]
        rows.append((f"{name}: exponent", f"{fits[name]['p50']:.2f}", "", f"{fits[name]['router CPU']:.2f}", f"{fits[name]['router memory']:.2f}", ""))
    columns = ("", "p50 ms", "tokens/s", "router CPU ms/request", "router MiB", "private MiB of an actor")
    return Table(
        "cost of growth", columns, rows, f"Experts of width 8; {BASE_ACTORS} actors unless said. An exponent of 0 does not grow, of 1 grows in proportion."
    )
