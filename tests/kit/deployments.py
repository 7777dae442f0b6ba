"""A deployment on a real Ray cluster, as operators make it: `python -m cluster.deploy` in a process of its own, reached through files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.cli.status_facts import gather
from cluster.config import dump_config
from cluster.core.spec import ClusterSpec
from cluster.deploy.connection import Connection, read_token
from cluster.local import processes
from cluster.local.cluster import LocalCluster
from cluster.local.settings import PROJECT_ROOT
from kit.waiting import wait_until
from router_service.client import RouterClient

WAIT_S = 180.0
REAL_WORLD_LIMIT_S = 60.0


@dataclass
class Deployment:
    """A running deployment; `apply` may be called again with another spec of the same name. `deployer`: the module that deploys."""

    cluster: LocalCluster
    spec: ClusterSpec
    folder: Path
    deployer: str = "cluster.deploy"

    @property
    def connection(self) -> Connection:
        found = Connection.read(self.folder / "connection.json")
        assert found is not None
        return found

    def client(self, **settings: Any) -> RouterClient:
        connection = self.connection
        return RouterClient(connection.router_address, **{"token": read_token(connection.token_path), "timeout_s": 30.0, **settings})

    def command(self, *options: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            self.deployer,
            "--config",
            str(self.folder / "config.yaml"),
            "--connection-file",
            str(self.folder / "connection.json"),
            "--wait-s",
            str(WAIT_S),
            *options,
        ]

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        """The deployer once, to its end."""
        environment = self.cluster.environment()
        environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(PROJECT_ROOT / "tests")])
        return subprocess.run(self.command(*options), env=environment, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=2 * WAIT_S, check=False)

    def apply(self, spec: ClusterSpec | None = None, *options: str) -> str:
        """Deploy (again); what the deployer printed."""
        self.spec = spec or self.spec
        (self.folder / "config.yaml").write_text(dump_config(self.spec))
        done = self.run(*options)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def control(self) -> dict[str, Any]:
        """The controller's status; empty when it does not answer now."""
        return dict(gather(self.connection).control)

    def told(self) -> dict[str, Any]:
        """The controller's status; it may miss a question or two on a busy machine."""
        answers: list[dict[str, Any]] = []
        wait_until(lambda: answers.append(self.control()) or bool(answers[-1]), "the controller answers", timeout_s=REAL_WORLD_LIMIT_S)
        return answers[-1]

    def actors(self) -> dict[str, dict[str, Any]]:
        """The actors in the controller's status, by id."""
        return {actor["actor_id"]: actor for actor in self.control().get("actors", ())}

    def pid_of(self, actor_id: str) -> int:
        pid = int(self.actors()[actor_id]["pid"])
        assert is_alive(pid)
        return pid

    def controller_pid(self) -> int:
        """The controller's process, among those of this cluster alone."""
        found = [process.pid for process in processes.members(self.cluster.state) if "ControllerActor" in " ".join(cmdline_of(process.pid))]
        assert len(found) == 1, found
        return found[0]

    def until_serving(self) -> None:
        """Wait until the goal is reached (again)."""
        wait_until(lambda: self.control().get("state") == "SERVING", "the goal is reached again", timeout_s=REAL_WORLD_LIMIT_S)


@contextmanager
def deployed(cluster: LocalCluster, spec: ClusterSpec, folder: Path, deployer: str = "cluster.deploy") -> Iterator[Deployment]:
    """Deploy, hand over, take down in order; nothing of it may be left."""
    deployment = Deployment(cluster, spec, folder, deployer)
    try:
        deployment.apply()
        yield deployment
    finally:
        done = deployment.run("--down")
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def cmdline_of(pid: int) -> list[str]:
    """The command line of a process; empty when it is gone."""
    try:
        return list(psutil.Process(pid).cmdline())
    except psutil.Error:
        return []


def kill(pid: int) -> None:
    """SIGKILL, and the proof that it happened."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), f"process {pid} is gone", timeout_s=REAL_WORLD_LIMIT_S)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
