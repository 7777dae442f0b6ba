"""Whom `chaos run` may touch: processes of this local cluster that its own status named, and nobody else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from typer.testing import CliRunner

from chaos import cli, target
from chaos.core.run_machine import Ending
from chaos.core.targets import Process
from chaos.target import LocalTarget
from cluster.cli.app import app
from cluster.core.errors import ConfigError
from cluster.core.spec import ClusterSpec
from cluster.deploy.connection import Connection
from cluster.local import processes
from cluster.local.run_folder import RunFolder
from cluster.store import ControlStore
from kit.waiting import wait_until
from protos.moelastic.control.v1 import control_pb2 as pb

LISTEN = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"


def process_of(child: subprocess.Popen[bytes], what: str = "child") -> Process:
    return Process(what, child.pid, psutil.Process(child.pid).create_time())


@pytest.fixture
def start() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Start a process of Python that runs some code and waits; all of them end with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def make(code: str = "print(0, flush=True); input()") -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        return started[-1]

    yield make
    for child in started:
        child.kill()
        child.communicate()


def deployed(tmp_path: Path, chaos: str, monkeypatch: pytest.MonkeyPatch, address: str = "127.0.0.1:1") -> Connection:
    """The records of a deployment on a local cluster that seems to run."""
    spec = ClusterSpec.model_validate({"name": "d", "models": [{"name": "m", "path": "/nowhere"}], "chaos": chaos})
    store = ControlStore(tmp_path / "control")
    store.take_over()
    store.put_goal(spec.model_dump_json())
    store.close()
    (tmp_path / "control" / "control_token").write_text("t")
    state = SimpleNamespace(temp_dir=tmp_path, nodes=())
    monkeypatch.setattr(target.LocalCluster, "find", lambda folder: SimpleNamespace(folder=folder, state=state, is_usable=True))
    return Connection(name="d", router_address="127.0.0.1:1", control_address=address, control_token_path=tmp_path / "control" / "control_token")


def answering(found: LocalTarget, monkeypatch: pytest.MonkeyPatch, members: list[int], pids: list[int]) -> None:
    """A status that names actors with these processes, of which `members` are the local cluster's own."""
    slot = pb.SlotStatus(model="m", layer=0, index=0, role=pb.ROLE_REPLICA, state="ready")
    actors = [pb.ActorStatus(actor_id=f"actor-{number}", generation=1, state="ready", pid=pid, slots=[slot]) for number, pid in enumerate(pids)]
    monkeypatch.setattr(found, "status", lambda: pb.GetClusterStatusResponse(actors=actors))
    monkeypatch.setattr(processes, "members", lambda _state: [psutil.Process(pid) for pid in members])


def test_a_cluster_whose_recorded_spec_does_not_allow_chaos_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = deployed(tmp_path, "refused", monkeypatch)
    with pytest.raises(ConfigError, match=r"chaos: refused.*set `chaos: allowed`"):
        LocalTarget(RunFolder(tmp_path), connection)


def test_a_process_that_the_status_did_not_name_is_never_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable[[], subprocess.Popen[bytes]]
) -> None:
    found = LocalTarget(RunFolder(tmp_path), deployed(tmp_path, "allowed", monkeypatch))
    process = process_of(start())
    for strike in (found.kill, found.stop, found.resume):
        with pytest.raises(ConfigError, match="was not named by the status of d"):
            strike(process)
    assert found.is_running(process)
    assert not found.is_alive(Process("another life", process.pid, process.start_s - 5))
    found.close()


def test_a_stranger_whose_stop_was_refused_is_not_resumed_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable[[], subprocess.Popen[bytes]]
) -> None:
    """Somebody else has stopped it, for reasons of their own: neither closing nor the dead man's switch may let it go on."""
    found = LocalTarget(RunFolder(tmp_path), deployed(tmp_path, "allowed", monkeypatch))
    process = process_of(start())
    os.kill(process.pid, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, "it is stopped")
    with pytest.raises(ConfigError, match="was not named"):
        found.stop(process)
    found.close()
    assert psutil.Process(process.pid).status() == psutil.STATUS_STOPPED


def test_only_processes_of_this_cluster_are_taken_from_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    controller, stranger = start(LISTEN), start()
    assert controller.stdout is not None
    connection = deployed(tmp_path, "allowed", monkeypatch, f"127.0.0.1:{int(controller.stdout.readline())}")
    found = LocalTarget(RunFolder(tmp_path), connection)
    answering(found, monkeypatch, [controller.pid], [controller.pid, stranger.pid])
    inventory = found.inventory()
    assert [actor.incarnation.actor_id for actor in inventory.actors] == ["actor-0"]
    assert inventory.controller is not None
    assert {process.pid for process in inventory.processes} == {controller.pid}
    with pytest.raises(ConfigError, match="was not named by the status of d"):
        found.kill(process_of(stranger, "actor-1"))
    controller.kill()
    controller.wait()
    answering(found, monkeypatch, [], [])
    assert found.inventory().controller is None  # it has answered as ours before: now it is only gone
    found.close()


def test_chaos_run_refuses_a_connection_that_points_to_another_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable[[], subprocess.Popen[bytes]]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:  # this process is no member of the local cluster
        connection = deployed(tmp_path, "allowed", monkeypatch, f"127.0.0.1:{elsewhere.getsockname()[1]}")
        found, actor = LocalTarget(RunFolder(tmp_path), connection), start()
        answering(found, monkeypatch, [actor.pid], [actor.pid])
        monkeypatch.setattr(cli, "_target", lambda _run_dir: found)
        result = CliRunner().invoke(app, ["chaos", "run", "kill_actor", "--yes"])
    assert result.exit_code == Ending.BAD_SCENARIO
    assert "is no process of the local cluster in" in result.output
    assert actor.poll() is None
