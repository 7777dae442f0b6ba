"""What is measured, running: a local Ray cluster with our deployment on it, the peers beside it, one process of load for each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bench.layer import BF16, Layer, check, random_rows, save_layer
from bench.rows import BestOf, CallerProcess, EchoServer, Row, settle
from bench.settings import IDLE_MODEL, MODEL, Case, Settings
from cluster.core.spec import ActorsSpec, AuthSpec, ClusterSpec, ModelSpec, RouterSpec, TelemetrySpec
from cluster.local.cluster import LocalCluster
from cluster.local.run_folder import RunFolder
from cluster.local.settings import PROJECT_ROOT, LocalSettings
from kit.deployments import Deployment, deployed

CHECKED_TOKENS = 16


@dataclass
class Rig:
    """Rows that are ready to be measured; all but the echo serve the same layer."""

    settings: Settings
    deployment: Deployment
    folders: dict[str, Path]
    trace_dir: Path
    rows: list[Row | BestOf] = field(default_factory=list)
    echo: Row | None = None

    def rows_of(self, case: Case) -> list[Row | BestOf]:
        """The rows that a case is measured on; idle experts are compared with the echo alone."""
        ours = [row for row in self.rows if row.name == "moelastic"]
        return [*ours, *([self.echo] if self.echo else [])] if case.model == IDLE_MODEL else self.rows

    def check_answers(self, folder: Path) -> dict[str, float]:
        """Each row's answer against the layer in fp32. Raises ValueError when one is wrong."""
        reference = {name: Layer(path, self.settings.sizes, torch.float32) for name, path in self.folders.items()}
        worst: dict[str, float] = {}
        for row in self.rows:
            for name, caller in ({row.name: row.caller} if isinstance(row, Row) else {name: one.caller for name, one in row.variants.items()}).items():
                for model, layer in reference.items():
                    path = folder / "answer.npy"
                    caller.ask({"do": "answer", "model": model, "tokens": CHECKED_TOKENS, "seed": 77, "path": str(path)})
                    rows = random_rows(self.settings.sizes, CHECKED_TOKENS, 77)
                    differences = [check(answer.view(BF16), rows, layer) for answer in np.load(path)]
                    worst[name] = max(worst.get(name, 0.0), *differences)
        return worst


@contextmanager
def running(settings: Settings, folder: Path, cluster: LocalCluster | None = None) -> Iterator[Rig]:
    """Start everything, hand it over, end everything. `cluster`: one that runs already and is left running."""
    folders = {
        MODEL: save_layer(folder / MODEL, settings.sizes, settings.sizes.intermediate_size),
        IDLE_MODEL: save_layer(folder / IDLE_MODEL, settings.sizes, settings.sizes.idle_size, seed=1),
    }
    with ExitStack() as ending:
        if cluster is None:
            cluster = LocalCluster.start(LocalSettings(name="bench", num_nodes=1), RunFolder(folder / "cluster"))
            ending.callback(cluster.stop)
        spec = _spec(settings, folders, folder / "traces")
        (folder / "deployment").mkdir()
        deployment = ending.enter_context(deployed(cluster, spec, folder / "deployment"))
        rig = Rig(settings, deployment, folders, folder / "traces")
        _add_rows(rig, ending)
        settle()
        yield rig


def _spec(settings: Settings, folders: dict[str, Path], trace_dir: Path) -> ClusterSpec:
    """Nothing is traced unless the caller asks for it, which the profile does."""
    count = settings.num_actors
    return ClusterSpec(
        name="bench",
        models=tuple(ModelSpec(name=name, path=path) for name, path in folders.items()),
        actors=ActorsSpec(count=count, num_gpus=1 / count, free_slots=0, start_parallelism=2),
        router=RouterSpec(port=0),
        auth=AuthSpec(trusted_trace_tenants=frozenset({"default"})),
        telemetry=TelemetrySpec(sampling_ratio=0.0, trace_dir=trace_dir),
    )


def _add_rows(rig: Rig, ending: ExitStack) -> None:
    environment = _with_bench(dict(os.environ))
    connection = rig.deployment.connection
    started: list[CallerProcess] = []
    for name in rig.settings.rows:
        if name == "in_process":
            best = BestOf.in_process(rig.folders, rig.settings)
            rig.rows.append(best)
            started += [row.caller for row in best.variants.values()]
            continue
        options = {"address": connection.router_address, "token_file": str(connection.token_path), "num_actors": str(rig.settings.num_actors)}
        peer, _, shape = name.partition(".")
        options["shape"] = shape
        own = environment if name == "moelastic" else _with_bench(rig.deployment.cluster.environment())
        rig.rows.append(Row(name, CallerProcess(peer, rig.folders, rig.settings, options, own)))
        started.append(rig.rows[-1].caller)
        if shape:  # two that start at once would both start Serve itself
            started[-1].wait_until_ready()
            ending.callback(started.pop().close)
    echo = EchoServer(environment)
    ending.callback(echo.close)
    rig.echo = Row("grpc_echo", CallerProcess("grpc_echo", rig.folders, rig.settings, {"address": echo.address()}, environment))
    started.append(rig.echo.caller)
    for caller in started:
        ending.callback(caller.close)
    for caller in started:
        caller.wait_until_ready()


def _with_bench(environment: dict[str, str]) -> dict[str, str]:
    """The environment with this package importable."""
    paths = [str(PROJECT_ROOT), str(PROJECT_ROOT / "tests"), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    return environment | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
