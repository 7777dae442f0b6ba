"""What is measured, running: a local Ray cluster with our deployment on it, the peers beside it, one process of load for each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bench.layer import Layer, check, random_rows, save_layer
from bench.processes import ACTOR, ROUTER, below, idle_cores, pids_of
from bench.rows import BestOf, CallerProcess, EchoServer, Row, settle
from bench.settings import (
    ALL_IN_ONE,
    ECHO,
    HIVEMIND,
    IDLE_MODEL,
    IN_PROCESS,
    LANGUAGE_MODEL,
    MODEL,
    OURS,
    PACKED,
    ROWS,
    SERVE_ROWS,
    WIDE_MODEL,
    Case,
    Settings,
    missing,
)
from cluster.cli.generate import EXAMPLE_MODEL
from cluster.core.descriptors import DType
from cluster.core.spec import ActorsSpec, AuthSpec, ClusterSpec, ModelSpec, RouterSpec, TelemetrySpec
from cluster.local.cluster import LocalCluster
from cluster.local.run_folder import RunFolder
from cluster.local.settings import PROJECT_ROOT, LocalSettings
from kit.deployments import Deployment, deployed

CHECKED_TOKENS = 16
ORDER = (*ROWS, ECHO)
IDLE_S = 2.0


@dataclass
class Rig:
    """Rows that are ready to be measured; all but the echo serve the same layer. `left_out` says why a row is not there."""

    settings: Settings
    deployment: Deployment
    folders: dict[str, Path]
    trace_dir: Path
    rows: list[Row | BestOf] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def row(self, name: str) -> Row | BestOf | None:
        """The row of this name, if it is there."""
        return next((row for row in self.rows if row.name == name), None)

    def rows_of(self, case: Case) -> list[Row | BestOf]:
        """The rows that a case is measured on: idle experts beside the echo alone, fp32 beside hivemind, which computes in nothing else."""
        return [row for row in self.rows if case.model in models_of(row.name)]

    def check_answers(self, folder: Path) -> dict[str, float]:
        """Each row's answer against the layer in fp32. Raises ValueError when one is wrong."""
        reference = {name: Layer(path, self.settings.sizes, torch.float32) for name, path in self.folders.items()}
        worst: dict[str, float] = {}
        for row in (row for row in self.rows if row.name != ECHO):
            callers = {row.name: row} if isinstance(row, Row) else {f"{row.name} ({name})": one for name, one in row.variants.items()}
            for name, one in callers.items():
                for model in models_of(row.name):
                    path = folder / "answer.npy"
                    asked = f"{one.flavour}/{model}" if one.flavour else model
                    one.caller.ask({"do": "answer", "model": asked, "tokens": CHECKED_TOKENS, "seed": 77, "path": str(path)})
                    rows = random_rows(self.settings.sizes, CHECKED_TOKENS, 77, model)
                    worst[name] = max(worst.get(name, 0.0), *(check(answer, rows, reference[model]) for answer in np.load(path)))
        return worst

    def idle_cores(self) -> dict[str, float]:
        """What each row's own processes burn while nobody asks, in cores; the rows that share the cluster's daemons are told apart by what they started."""
        found = {}
        for row in self.rows:
            callers = [row] if isinstance(row, Row) else list(row.variants.values())
            pids = [pid for one in callers for pid in (*below(one.caller.pid), *one.servers)]
            found[row.name] = idle_cores(pids, IDLE_S)
        return found


def models_of(row: str) -> tuple[str, ...]:
    """The models that a row can serve."""
    own = {OURS: (MODEL, IDLE_MODEL, WIDE_MODEL), ECHO: (MODEL, IDLE_MODEL), HIVEMIND: (WIDE_MODEL,), IN_PROCESS: (MODEL, WIDE_MODEL)}
    return own.get(row, (MODEL,))


@contextmanager
def running(settings: Settings, folder: Path, cluster: LocalCluster | None = None) -> Iterator[Rig]:
    """Start everything, hand it over, end everything. `cluster`: one that runs already and is left running."""
    layer = save_layer(folder / MODEL, settings.sizes, settings.sizes.intermediate_size)
    folders = {MODEL: layer, IDLE_MODEL: save_layer(folder / IDLE_MODEL, settings.sizes, settings.sizes.idle_size, seed=1), WIDE_MODEL: layer}
    with ExitStack() as ending:
        if cluster is None:
            cluster = start_cluster(folder)
            ending.callback(cluster.stop)
        spec = _spec(settings, folders, folder / "traces")
        (folder / "deployment").mkdir()
        deployment = ending.enter_context(deployed(cluster, spec, folder / "deployment"))
        rig = Rig(settings, deployment, folders, folder / "traces")
        _add_rows(rig, ending)
        settle()
        yield rig


def start_cluster(folder: Path, num_nodes: int = 1) -> LocalCluster:
    """A head and so many nodes of one logical GPU; it is the caller's to stop."""
    return LocalCluster.start(LocalSettings(name="bench", num_nodes=num_nodes), RunFolder(folder / "cluster"))


def _spec(settings: Settings, folders: dict[str, Path], trace_dir: Path) -> ClusterSpec:
    """Nothing is traced unless the caller asks for it, which the profile does."""
    count = settings.num_actors
    models = [ModelSpec(name=name, path=path, dtype=DType.FP32 if name == WIDE_MODEL else "checkpoint") for name, path in folders.items()]
    if settings.language_model:
        models.append(ModelSpec(name=LANGUAGE_MODEL, path=EXAMPLE_MODEL))
    return ClusterSpec(
        name="bench",
        models=tuple(models),
        actors=ActorsSpec(count=count, num_gpus=1 / count, free_slots=0, start_parallelism=2, layout=settings.layout),
        router=RouterSpec(port=0),
        auth=AuthSpec(trusted_trace_tenants=frozenset({"default"})),
        telemetry=TelemetrySpec(sampling_ratio=0.0, trace_dir=trace_dir),
    )


def _add_rows(rig: Rig, ending: ExitStack) -> None:
    environment = with_bench(dict(os.environ))
    rig.left_out = {name: why for name in rig.settings.rows if (why := missing(name))}
    started: list[CallerProcess] = []
    cores = os.cpu_count() or 1
    if IN_PROCESS in rig.settings.rows:
        best = BestOf.in_process(rig.folders, rig.settings)
        rig.rows += [best, *([best.flavoured(PACKED, "packed")] if PACKED in rig.settings.rows else [])]
        started += [row.caller for row in best.variants.values()]
    echo = EchoServer(environment)
    ending.callback(echo.close)
    rig.rows.append(Row(ECHO, CallerProcess("grpc_echo", rig.folders, rig.settings, {"address": echo.address()}, environment), servers=(echo.pid,)))
    started.append(rig.rows[-1].caller)
    for caller in started:
        ending.callback(caller.close)
    wanted = [name for name in rig.settings.rows if name not in rig.left_out and name not in (IN_PROCESS, PACKED)]
    for name in sorted(wanted, key=lambda name: "." in name):
        variants = {}
        for threads in (1, cores) if name == ALL_IN_ONE and cores > 1 else (cores,):
            row = variants[f"{threads} threads"] = _peer_row(rig, name, threads, environment)
            ending.callback(row.caller.close)
            if name in SERVE_ROWS:  # two that start at once would both start Serve itself
                row.caller.wait_until_ready()
            else:
                started.append(row.caller)
        rig.rows.append(BestOf(name, variants) if len(variants) > 1 else row)
    for caller in started:
        caller.wait_until_ready()
    rig.rows.sort(key=lambda row: ORDER.index(row.name))


def _peer_row(rig: Rig, name: str, threads: int, environment: dict[str, str]) -> Row:
    """A peer that serves, with so many threads where it has the choice; those on Ray use the cluster that ours is on."""
    connection = rig.deployment.connection
    peer, _, shape = name.partition(".")
    options = {"address": connection.router_address, "token_file": str(connection.token_path), "num_actors": str(rig.settings.num_actors)}
    options |= {"shape": shape, "threads": str(threads)}
    folders = {model: rig.folders[model] for model in models_of(name)}
    own = environment if name in (OURS, HIVEMIND) else with_bench(rig.deployment.cluster.environment())
    servers = (*pids_of(rig.deployment, ROUTER), *pids_of(rig.deployment, ACTOR)) if name == OURS else ()
    return Row(name, CallerProcess(peer, folders, rig.settings, options, own), servers=servers)


def with_bench(environment: dict[str, str]) -> dict[str, str]:
    """The environment with this package importable."""
    paths = [str(PROJECT_ROOT), str(PROJECT_ROOT / "tests"), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    return environment | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
