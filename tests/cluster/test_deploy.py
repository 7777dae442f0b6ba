"""A deployment on a real Ray cluster, as operators meet it: up, again, cut off, looked at, down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cluster.cli.status_facts import StatusFacts, gather
from cluster.config import dump_config, load_config
from cluster.core.spec import ClusterSpec
from cluster.deploy.connection import FILE_NAME, Connection, read_token
from cluster.local import processes
from cluster.local.cluster import LocalCluster
from cluster.local.settings import PROJECT_ROOT
from kit.waiting import wait_until
from router_service.client import RouterClient

pytestmark = pytest.mark.cluster
MODEL = PROJECT_ROOT / "examples" / "tiny_moe_lm" / "checkpoint"
NAME = "deploy-test"


def command(config: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "cluster.deploy", "--config", str(config), "--connection-file", str(config.parent / FILE_NAME), *options]


def run_deploy(cluster: LocalCluster, config: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(config, *options), env=cluster.environment(), capture_output=True, text=True, timeout=240, check=False)


def hosted(cluster: LocalCluster, kind: str) -> list[psutil.Process]:
    """The cluster's processes that host actors of this class."""
    found = []
    for process in processes.members(cluster.state):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{kind}"):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deployment") / "cluster.yaml"
    spec = {
        "name": NAME,
        "models": [{"name": "tiny", "path": str(MODEL)}],
        "actors": {"count": 2, "num_gpus": 0.5},
        "router": {"port": 0},
    }
    path.write_text(dump_config(ClusterSpec.model_validate(spec)))
    return path


@pytest.fixture(scope="module")
def connection(shared_cluster: LocalCluster, config: Path) -> Iterator[Connection]:
    """The deployment, finished by a second `up` after the first was killed in the middle."""
    try:
        with subprocess.Popen(command(config), env=shared_cluster.environment(), stdout=subprocess.PIPE, text=True) as first:
            assert first.stdout is not None
            for line in first.stdout:
                if "copies 0/32" in line:
                    first.kill()
        assert first.returncode == -signal.SIGKILL
        controllers = [process.pid for process in hosted(shared_cluster, "ControllerActor")]
        assert len(controllers) == 1
        done = run_deploy(shared_cluster, config)
        assert done.returncode == 0, done.stderr
        assert [process.pid for process in hosted(shared_cluster, "ControllerActor")] == controllers
        found = Connection.read(config.parent / FILE_NAME)
        assert found is not None
        yield found
    finally:
        run_deploy(shared_cluster, config, "--down")


def incarnations(facts: StatusFacts) -> set[tuple[str, int, int]]:
    return {(actor["actor_id"], actor["generation"], actor["pid"]) for actor in facts.control["actors"]}


def dispatch(connection: Connection) -> int:
    with RouterClient(connection.router_address, token=read_token(connection.token_path), timeout_s=30.0) as client:
        width = client.model("tiny").layers[0].hidden_size
        reply = client.dispatch(np.ones((3, width), np.float32), model="tiny", layer=0)
    return reply.report.outcomes["exact"]


def test_a_submitter_that_was_killed_leaves_a_service_that_the_next_one_adopts(connection: Connection) -> None:
    facts = gather(connection)
    assert facts.is_serving
    assert (facts.control["num_copies_ready"], facts.control["num_copies_wanted"]) == (32, 32)
    assert {generation for _, generation, _ in incarnations(facts)} == {1, 2}
    assert dispatch(connection) == 6


def test_status_is_for_machines_too(connection: Connection, config: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "status", "--json", "--run-dir", str(config.parent)],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    document: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == 0
    assert document["state"] == "SERVING"
    assert document["epoch"] == gather(connection).epoch
    assert {node["name"] for node in document["control"]["nodes"]} == {"head", "node-1", "node-2"}


def test_text_is_generated_through_it(connection: Connection, config: Path) -> None:
    assert connection.name == NAME
    options = ["generate", "def parse(", "--max-new-tokens", "4", "--run-dir", str(config.parent)]
    done = subprocess.run([sys.executable, "-m", "cluster.cli", *options], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def parse(")
    assert done.stderr.splitlines()[-1].startswith("choices: exact ")


def test_running_up_again_changes_nothing(connection: Connection, shared_cluster: LocalCluster, config: Path) -> None:
    before = gather(connection)
    assert run_deploy(shared_cluster, config, "--replace").returncode == 0
    after = gather(connection)
    assert incarnations(after) == incarnations(before)
    assert (after.epoch, after.control["spec_revision"]) == (before.epoch, before.control["spec_revision"])


def test_what_differs_is_told_and_not_replaced_unless_asked(connection: Connection, shared_cluster: LocalCluster, config: Path) -> None:
    before, original = gather(connection), config.read_text()
    spec = load_config(config)
    try:
        config.write_text(dump_config(spec.model_copy(update={"actors": spec.actors.model_copy(update={"max_tokens_per_frame": 512})})))
        done = run_deploy(shared_cluster, config)
    finally:
        config.write_text(original)
    assert done.returncode == 0, done.stderr
    assert "replaced only with --replace" in done.stdout
    assert incarnations(gather(connection)) == incarnations(before)
    assert run_deploy(shared_cluster, config).returncode == 0


def test_a_deployment_that_cannot_serve_fails_with_the_reason_and_leaves_the_running_one(
    connection: Connection, shared_cluster: LocalCluster, config: Path, tmp_path: Path
) -> None:
    spec = load_config(config)
    broken = tmp_path / "broken.yaml"
    broken.write_text(dump_config(spec.model_copy(update={"name": "broken", "models": (spec.models[0].model_copy(update={"path": tmp_path}),)})))
    done = run_deploy(shared_cluster, broken)
    assert run_deploy(shared_cluster, broken, "--down").returncode == 0
    assert done.returncode == 1
    assert str(tmp_path) in done.stderr
    assert dispatch(connection) == 6


def test_without_the_controller_status_answers_and_the_router_serves(connection: Connection, shared_cluster: LocalCluster) -> None:
    (controller,) = hosted(shared_cluster, "ControllerActor")
    os.kill(controller.pid, signal.SIGSTOP)
    try:
        facts = gather(connection)
        assert facts.is_serving
        assert not facts.control_source.is_answering
        assert dispatch(connection) == 6
    finally:
        os.kill(controller.pid, signal.SIGCONT)
    wait_until(lambda: gather(connection).control_source.is_answering, "the controller answers again")


def test_down_ends_every_actor_of_the_deployment_and_may_be_repeated(connection: Connection, shared_cluster: LocalCluster, config: Path) -> None:
    assert connection.name == NAME
    assert len(hosted(shared_cluster, "HostedExpertActor")) == 2
    for words in ("ended", "nothing ran"):
        done = run_deploy(shared_cluster, config, "--down")
        assert done.returncode == 0, done.stderr
        assert words in done.stdout
    for kind in ("HostedExpertActor", "NodeAgent", "RouterHost", "ControllerActor"):
        wait_until(lambda kind=kind: not hosted(shared_cluster, kind), f"no {kind} is left")  # type: ignore[misc]
    assert not (config.parent / FILE_NAME).exists()
    assert not gather(connection).is_serving
