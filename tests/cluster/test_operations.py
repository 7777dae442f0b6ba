"""The `moelastic` command against a Ray cluster that somebody else runs: up as a job, status without an endpoint, down past a controller that hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli.status_facts import gather
from cluster.config import dump_config
from cluster.core.descriptors import DType
from cluster.core.spec import ActorsSpec, ClusterSpec, ModelSpec, RouterSpec
from cluster.deploy.connection import FILE_NAME, Connection
from cluster.local import processes
from cluster.local.cluster import LocalCluster
from cluster.local.settings import PROJECT_ROOT
from cluster.scheduling import CONTROL_NICENESS, START_NICENESS, may_come_forward
from kit.deployments import cmdline_of
from kit.models import save_custom
from kit.waiting import wait_until

pytestmark = pytest.mark.cluster
HOSTED = ("HostedExpertActor", "NodeAgent", "RouterHost", "ControllerActor")


def moelastic(cluster: LocalCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    return subprocess.run(command, cwd=PROJECT_ROOT, env=cluster.environment(), capture_output=True, text=True, timeout=240, check=False)


def hosted(cluster: LocalCluster, kind: str) -> list[int]:
    """Processes of the cluster that host actors of this class."""
    return [process.pid for process in processes.members(cluster.state) if "".join(cmdline_of(process.pid)[:1]).startswith(f"ray::{kind}")]


def test_a_job_s_deployment_is_found_by_status_and_ended_by_force_although_its_controller_hangs(shared_cluster: LocalCluster, tmp_path: Path) -> None:
    model = save_custom(tmp_path / "random")
    spec = ClusterSpec(
        name="operated",
        models=(ModelSpec(name="random", path=model, dtype=DType.BF16),),
        actors=ActorsSpec(count=2, num_gpus=0.25),
        router=RouterSpec(port=0),
    )
    config, run_dir = tmp_path / "operated.yaml", tmp_path / "run"
    config.write_text(dump_config(spec))
    up = moelastic(shared_cluster, "up", str(config), "--run-dir", str(run_dir))
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        assert "next: moelastic status" in up.stdout
        assert "operated: serving on" in up.stdout
        connection = Connection.read(run_dir / FILE_NAME)
        assert connection is not None
        assert connection.token_path is not None
        assert connection.token_path.read_text() not in up.stdout
        status = moelastic(shared_cluster, "status", "--run-dir", str(run_dir))
        assert status.returncode == 0, status.stdout + status.stderr
        assert "SERVING" in status.stdout
        assert gather(connection).is_serving
        (controller,) = hosted(shared_cluster, "ControllerActor")
        if may_come_forward(-5):  # else all of them are as Ray started them
            expected = {"HostedExpertActor": {0}, "RouterHost": {-5}, "ControllerActor": {CONTROL_NICENESS}, "NodeAgent": {START_NICENESS}}
            assert {kind: {os.getpriority(os.PRIO_PROCESS, pid) for pid in hosted(shared_cluster, kind)} for kind in expected} == expected
        os.kill(controller, signal.SIGSTOP)
    finally:
        down = moelastic(shared_cluster, "down", str(config), "--force", "--run-dir", str(run_dir))
    assert down.returncode == 0, down.stdout + down.stderr
    assert "operated: ended" in down.stdout
    for kind in HOSTED:
        wait_until(lambda kind=kind: not hosted(shared_cluster, kind), f"no {kind} is left")  # type: ignore[misc]
    assert not (run_dir / FILE_NAME).exists()
