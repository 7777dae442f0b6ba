"""The main job, end to end: a local cluster, a real deployment by `ray job submit`, text scored and generated through the router, everything stopped.

Reads top to bottom like what people see. On every way out, what was started is ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.status_facts import StatusFacts, gather
from cluster.config import dump_config
from cluster.core.actor_config import TelemetryConfig
from cluster.core.errors import FleetError
from cluster.core.ids import Role
from cluster.deploy.connection import FILE_NAME, Connection, read_token
from cluster.local import processes
from cluster.local.cluster import LocalCluster
from cluster.local.run_folder import RunFolder
from cluster.local.settings import LocalSettings
from cluster.telemetry.trace_files import SpanRecord, last_trace, read_spans
from cluster.telemetry.trace_view import write_perfetto
from cluster.telemetry.tracing import Tracing
from examples.demo.layout import Layout
from examples.demo.node_loss import lose_a_node
from examples.demo.settings import ROOT, DemoReport, DemoSettings, DomainResult

if TYPE_CHECKING:
    from examples.demo.models import Models

TRACE_WAIT_S = 10.0
TRACE_POLL_S = 0.2
DOWN_WAIT_S = 60.0
LOG_TAIL_LINES = 12
DOMAINS = ("code", "prose", "markup")


def run_demo(settings: DemoSettings, *, cluster: LocalCluster | None = None, layout: Layout | None = None) -> DemoReport:
    """Run it and write `report.json`. With `cluster`, deploy on that one and leave it running, without the deployment.

    Raises FleetError, ConfigError or CheckpointError when it cannot; what differs from the promise is in the report.
    """
    layout, begin_s, seconds = layout or Layout(), time.perf_counter(), dict[str, float]()
    settings.out_dir.mkdir(parents=True, exist_ok=True)
    layout.title(settings)
    layout.install(install_seconds(Path(sys.prefix)))
    with ExitStack() as stack:
        used = cluster or stack.enter_context(_own_cluster(settings, layout, seconds))
        connection = stack.enter_context(_deployed(settings, used, layout, seconds))
        report = _measure(settings, used, connection, layout, seconds)
        layout.written(report, settings)
    if cluster is None:
        report = report.model_copy(update={"num_processes_left": len(processes.members(used.state))})
    seconds["total"] = time.perf_counter() - begin_s
    report = report.model_copy(update={"seconds": seconds})
    (settings.out_dir / "report.json").write_text(report.model_dump_json(indent=2))
    left = "nothing left behind" if not report.num_processes_left else f"{report.num_processes_left} PROCESSES LEFT"
    layout.line("", f"Everything stopped, {left}.   total {seconds['total']:.1f} s")
    return report


@contextmanager
def _own_cluster(settings: DemoSettings, layout: Layout, seconds: dict[str, float]) -> Iterator[LocalCluster]:
    folder = RunFolder(settings.out_dir / "cluster")
    with layout.waiting("starting a local cluster"), _timed(seconds, "cluster"):
        cluster = LocalCluster.start(LocalSettings(name="demo", num_nodes=settings.num_nodes, gpus_per_node=settings.gpus_per_node), folder)
    try:
        layout.step("local cluster", f"{len(cluster.state.nodes)} nodes, token auth on", seconds["cluster"])
        yield cluster
    finally:
        cluster.stop()


@contextmanager
def _deployed(settings: DemoSettings, cluster: LocalCluster, layout: Layout, seconds: dict[str, float]) -> Iterator[Connection]:
    """The deployment, made by a real job; ended in order, so that spans and requests under way are finished."""
    config, connection_file = settings.out_dir / "cluster.yaml", settings.out_dir / FILE_NAME
    config.write_text(dump_config(settings.spec()))
    arguments = ["--config", str(config), "--connection-file", str(connection_file)]
    job = ["ray", "job", "submit", "--runtime-env", str(ROOT / "examples" / "job" / "runtime_env.yaml"), "--working-dir", str(ROOT), "--"]
    job += ["python", "-m", "cluster.deploy", *arguments, "--wait-s", str(settings.wait_s)]
    try:
        with layout.waiting("deploying by ray job submit"), _timed(seconds, "deploy"):
            _run_logged([str(Path(sys.executable).parent / job[0]), *job[1:]], cluster, settings.out_dir / "deploy.log", limit_s=settings.wait_s + DOWN_WAIT_S)
        connection = Connection.read(connection_file)
        if connection is None:
            message = f"{connection_file}: the job ended without writing it; its log is {settings.out_dir / 'deploy.log'}"
            raise FleetError(message)
        facts = gather(connection)
        layout.step("deploy (ray job submit)", _deployed_line(facts, connection), seconds["deploy"])
        layout.tree(facts.control)
        yield connection
    finally:
        with _timed(seconds, "down"):
            down = [sys.executable, "-m", "cluster.deploy", *arguments, "--down", "--wait-s", str(DOWN_WAIT_S)]
            _run_logged(down, cluster, settings.out_dir / "down.log", limit_s=2 * DOWN_WAIT_S)


def _measure(settings: DemoSettings, cluster: LocalCluster, connection: Connection, layout: Layout, seconds: dict[str, float]) -> DemoReport:
    tracing = Tracing(service="client", instance="demo", config=TelemetryConfig(sampling_ratio=1.0, trace_dir=settings.trace_dir))
    from router_service.client import RouterClient

    with RouterClient(connection.router_address, token=read_token(connection.token_path), tracing=tracing) as client:
        with layout.waiting("loading the model without its experts"), _timed(seconds, "load"):
            from examples.demo.models import Models  # imports torch and transformers: seconds that the cluster's start did not wait for

            models = Models.load(settings, client=client)
        info = client.model(settings.model_name)
        num_experts = sum(layer.num_experts for layer in info.layers)
        layout.step("checkpoint", f"verified {num_experts} experts, {len(info.layers)} gates, sha256 ok ({info.manifest[:12]})", seconds["load"])
        with layout.waiting("scoring and generating through the router"), _timed(seconds, "measure"):
            domains = {domain: models.examine(domain, settings) for domain in DOMAINS}
        trace = _trace_one_pass(settings, models, tracing)
        report = _report(settings, info.name, len(client.routing_table().actors), models, domains, trace, seconds)
        layout.report(report)
        if settings.loses_node:
            with layout.waiting("killing a node while two texts are generated"), _timed(seconds, "node loss"):
                models.accept_exact_only()
                report = report.model_copy(update={"node_loss": lose_a_node(settings, cluster, connection, models, client)})
            layout.node_loss(report, settings)
    tracing.shutdown(1.0)
    return report


def _report(
    settings: DemoSettings,
    model: str,
    num_actors: int,
    models: Models,
    domains: dict[str, DomainResult],
    trace: list[SpanRecord],
    seconds: dict[str, float],
) -> DemoReport:
    return DemoReport(
        model=model,
        num_nodes=settings.num_nodes,
        num_actors=num_actors,
        outcomes=dict(models.outcomes),
        domains=domains,
        scored_tokens_per_s=models.scored.tokens_per_s,
        generated_tokens_per_s=models.generated.tokens_per_s,
        num_spans=len(trace),
        num_traced_nodes=len({span.node_id for span in trace if span.node_id}),
        trace_services=tuple(sorted({span.service for span in trace})),
        seconds=seconds,
    )


def _trace_one_pass(settings: DemoSettings, models: Models, tracing: Tracing) -> list[SpanRecord]:
    """Trace one forward pass; its spans arrive from every process within moments."""
    models.trace_one_pass(tracing)
    tracing.flush(1.0)
    deadline_s = time.monotonic() + TRACE_WAIT_S
    while True:
        trace = last_trace(read_spans(settings.trace_dir), root="moe.forward")
        if {span.service for span in trace} >= {"client", "router", "expert"} or time.monotonic() > deadline_s:
            break
        time.sleep(TRACE_POLL_S)
    if trace:
        write_perfetto(trace, settings.out_dir / "trace.json")
    return trace


def _deployed_line(facts: StatusFacts, connection: Connection) -> str:
    actors, routers = facts.control.get("actors", ()), facts.control.get("routers", ())
    roles = Counter(slot["role"] for actor in actors for slot in actor["slots"])
    copies = f"{roles[Role.REPLICA]} replicas, {roles[Role.SHADOW]} shadows"
    return f"{len(actors)} actors, {copies}, {len(routers)} router on {connection.router_address}"


def install_seconds(prefix: Path) -> float | None:
    """How long making the environment took, told once: make notes when it began, and stamps the end. None: it was there already."""
    began, stamp = prefix / "install_began", prefix / "installed.stamp"
    try:
        began_s = float(began.read_text())
        began.unlink()
        return max(0.0, stamp.stat().st_mtime - began_s)
    except (OSError, ValueError):
        return None


def _run_logged(command: list[str], cluster: LocalCluster, log: Path, *, limit_s: float) -> None:
    """Run a command against the cluster, its output in a file; raises FleetError with the end of it."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=cluster.environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file)  # noqa: S603  # no shell
        try:
            code = process.wait(limit_s)
        except BaseException:
            process.kill()
            process.wait()
            raise
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
        message = f"`{' '.join(command[:3])} ...` failed with exit code {code}; the end of {log}:{os.linesep}{tail}"
        raise FleetError(message)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    begin_s = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = time.perf_counter() - begin_s
