"""A local cluster's processes are found and ended exactly, checked on plain processes in place of Ray's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.core.errors import ConfigError, FleetError
from cluster.local import cluster, processes
from cluster.local.run_folder import LocalState, NodeRecord, ProcessRecord, RunFolder, boot_id
from cluster.local.settings import LocalSettings, client_environment, server_environment

WAIT_FOREVER = "import time; print('up', flush=True); time.sleep(600)"
# A parent that starts a child in a session of its own, without the marker, and says its id.
WITH_CHILD = f"""
import os, subprocess, sys, time
environment = {{k: v for k, v in os.environ.items() if k != {processes.MARKER_VARIABLE!r}}}
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environment, start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""

Spawn = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    started: list[subprocess.Popen[str]] = []

    def start(script: str = WAIT_FOREVER, *, marker: str | None = None, session: bool = False) -> subprocess.Popen[str]:
        environment = dict(os.environ) | ({processes.MARKER_VARIABLE: marker} if marker else {})
        process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=session)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def state_of(folder: Path, marker: str = "m1", keeper: ProcessRecord | None = None, boot: str | None = None) -> LocalState:
    return LocalState(
        name="t",
        phase="ready",
        marker=marker,
        boot_id=boot_id() if boot is None else boot,
        created_unix_s=time.time() - 60,
        temp_dir=folder / "tmp",
        token_path=folder / "token",
        keeper=keeper,
    )


def pids(state: LocalState) -> set[int]:
    return {process.pid for process in processes.members(state)}


def test_marked_processes_are_ended_and_a_neighbour_s_are_not(tmp_path: Path, spawn: Spawn) -> None:
    ours, neighbour, stranger = spawn(marker="m1"), spawn(marker="m2"), spawn()
    for process in (ours, neighbour, stranger):
        assert first_line(process) == "up"
    assert pids(state_of(tmp_path)) == {ours.pid}
    assert processes.end(state_of(tmp_path)) == []
    assert ours.wait(10) is not None
    assert pids(state_of(tmp_path)) == set()
    assert neighbour.poll() is None
    assert stranger.poll() is None


def test_a_child_that_hid_its_marker_and_left_the_session_is_ended_with_its_parent(tmp_path: Path, spawn: Spawn) -> None:
    parent = spawn(WITH_CHILD, marker="m1")
    child = int(first_line(parent))
    assert pids(state_of(tmp_path)) == {parent.pid, child}
    assert processes.end(state_of(tmp_path)) == []
    assert not processes.is_running(ProcessRecord(kind="x", pid=child, start_s=0))
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_the_keeper_s_session_is_found_without_a_marker(tmp_path: Path, spawn: Spawn) -> None:
    keeper = spawn(session=True)
    assert first_line(keeper) == "up"
    record = processes.record("keeper", keeper.pid)
    assert pids(state_of(tmp_path, keeper=record)) == {keeper.pid}
    assert processes.end(state_of(tmp_path, keeper=record)) == []


def test_another_process_under_a_recorded_id_is_left_alone(tmp_path: Path, spawn: Spawn) -> None:
    stranger = spawn(session=True)
    assert first_line(stranger) == "up"
    reused = processes.record("keeper", stranger.pid).model_copy(update={"start_s": 1.0})
    assert not processes.is_running(reused)
    assert processes.end(state_of(tmp_path, keeper=reused)) == []
    assert stranger.poll() is None


def test_nothing_recorded_before_a_reboot_is_ended(tmp_path: Path, spawn: Spawn) -> None:
    process = spawn(marker="m1")
    assert first_line(process) == "up"
    assert processes.end(state_of(tmp_path, boot="another boot")) == []
    assert process.poll() is None


def test_a_zombie_counts_as_ended(tmp_path: Path, spawn: Spawn) -> None:
    process = spawn(marker="m1")
    assert first_line(process) == "up"
    record = processes.record("x", process.pid)
    assert processes.is_running(record)
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has reaped it
    assert not processes.is_running(record)
    assert pids(state_of(tmp_path)) == set()


def test_leftovers_of_a_killed_start_are_ended_with_their_temp_dir_and_their_token(tmp_path: Path, spawn: Spawn) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    process = spawn(marker="m1")
    assert first_line(process) == "up"
    temp_dir = tmp_path / "tmp"
    (temp_dir / "session").mkdir(parents=True)
    (temp_dir / cluster.MARKER_FILE).write_text("m1")
    folder.write(state_of(tmp_path).model_copy(update={"phase": "starting", "token_path": folder.make_token()}))
    assert cluster.end_leftovers(folder) == 1
    assert pids(state_of(tmp_path)) == set()
    assert not temp_dir.exists()
    assert folder.read() is None
    assert not folder.token_path.exists()
    assert cluster.end_leftovers(folder) == 0


def test_a_temp_dir_without_the_cluster_s_marker_is_never_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    precious = tmp_path / "tmp"
    precious.mkdir()
    (precious / cluster.MARKER_FILE).write_text("somebody else's")
    folder.write(state_of(tmp_path))
    cluster.end_leftovers(folder)
    assert precious.is_dir()


def test_a_state_reads_back_as_it_was_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    raylet = ProcessRecord(kind="raylet", pid=7, start_s=1.5)
    state = state_of(tmp_path, keeper=raylet).model_copy(update={"nodes": (NodeRecord(name="node-1", node_id="ab", num_gpus=2, raylet=raylet),)})
    assert folder.read() is None
    folder.write(state)
    assert folder.read() == state


def test_a_state_that_is_not_ours_is_refused_by_path(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.state_path.write_text('{"pid": 1}')
    with pytest.raises(ConfigError, match=r"state\.json"):
        folder.read()


def test_the_token_can_be_read_by_its_owner_only_and_is_new_each_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    first = folder.make_token().read_text()
    second = folder.make_token().read_text()
    assert len(first) == 64
    assert first != second
    assert folder.token_path.stat().st_mode & 0o777 == 0o600


def test_two_commands_never_hold_one_run_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path).locked(), pytest.raises(ConfigError, match="another command"), RunFolder(tmp_path).locked():
        pytest.fail("locked twice")


def test_the_caller_s_own_ray_settings_reach_neither_servers_nor_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://elsewhere:10001")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    servers = server_environment(
        LocalSettings(ray_config={"worker_niceness": "3"}), marker="m1", run_dir=tmp_path, token_path=tmp_path / "t", temp_dir=tmp_path
    )
    clients = client_environment(gcs_address="127.0.0.1:1", dashboard_url="http://127.0.0.1:2", token_path=tmp_path / "t")
    assert "RAY_ADDRESS" not in servers
    assert clients["RAY_ADDRESS"] == "127.0.0.1:1"
    for environment in (servers, clients):
        assert "RAY_AUTH_TOKEN" not in environment
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "t")
        assert environment["PYTHONPATH"].endswith(":/theirs")
    assert servers["RAY_worker_niceness"] == "3"
    assert servers["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert processes.MARKER_VARIABLE not in clients


def test_a_root_never_stays_stopped_whatever_happens_while_its_tree_is_listed(spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    raylet = spawn()
    first_line(raylet)
    root = processes.record("raylet", raylet.pid)

    def breaks(_: psutil.Process) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(psutil.Process, "name", breaks)
    with pytest.raises(ZeroDivisionError):
        processes.kill_tree(root)
    assert raylet.wait(10.0) == -signal.SIGKILL


def test_what_ends_while_the_tree_is_listed_is_no_victim_and_no_trouble(spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    raylet = spawn(WITH_CHILD)
    child, name_of = int(first_line(raylet)), psutil.Process.name

    def gone(self: psutil.Process) -> str:
        if self.pid == child:
            self.kill()
            raise psutil.NoSuchProcess(child)
        return name_of(self)

    monkeypatch.setattr(psutil.Process, "name", gone)
    assert [victim.pid for victim in processes.kill_tree(processes.record("raylet", raylet.pid))] == [raylet.pid]


def test_a_node_is_killed_with_all_that_it_started_and_nothing_else(spawn: Spawn) -> None:
    raylet, other = spawn(WITH_CHILD), spawn()
    child, _ = int(first_line(raylet)), first_line(other)
    killed = processes.kill_tree(processes.record("raylet", raylet.pid))
    assert {victim.pid for victim in killed} == {raylet.pid, child}
    assert not [victim for victim in killed if processes.is_running(victim)]
    assert raylet.wait(10) == -signal.SIGKILL
    assert other.poll() is None


def test_the_head_and_unknown_nodes_are_not_killed(tmp_path: Path) -> None:
    raylet = processes.record("raylet", os.getpid())
    state = state_of(tmp_path).model_copy(update={"nodes": (NodeRecord(name="head", node_id="ab", num_gpus=0, raylet=raylet),)})
    for name in ("head", "node-9"):
        with pytest.raises(FleetError, match=f"{name}: not a running node"):
            cluster.LocalCluster(RunFolder(tmp_path), state).kill_node(name)
