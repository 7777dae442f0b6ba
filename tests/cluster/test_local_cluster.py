"""Real local clusters: what they leave alone, and that nothing of them stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.core.errors import FleetError
from cluster.local import processes
from cluster.local.cluster import LocalCluster
from cluster.local.run_folder import LocalState, RunFolder
from cluster.local.settings import PROJECT_ROOT, LocalSettings
from cluster.scheduling import START_NICENESS, may_come_forward
from kit.waiting import wait_until

SMALL = LocalSettings(num_nodes=1, gpus_per_node=2)
COUNT_GPUS = """
import ray
ray.init()
print(sorted((node["NodeName"], node["Resources"].get("GPU", 0)) for node in ray.nodes()))
print(ray.get_runtime_context().gcs_address)
"""
# A shell that starts us in the background leaves SIGINT ignored; a terminal does not.
START = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
import sys
from pathlib import Path
from cluster.local.cluster import LocalCluster
from cluster.local.run_folder import RunFolder
from cluster.local.settings import LocalSettings
print("begun", flush=True)
LocalCluster.start(LocalSettings(num_nodes=1), RunFolder(Path(sys.argv[1])), progress=lambda step: print(step, flush=True))
"""
pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def pair(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalCluster, LocalCluster]]:
    """Two clusters side by side, started by one process whose environment points at a Ray elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
        patch.setenv("http_proxy", "http://192.0.2.1:3128")
        first = LocalCluster.start(SMALL, RunFolder(tmp_path_factory.mktemp("first")))
        try:
            second = LocalCluster.start(LocalSettings(num_nodes=0), RunFolder(tmp_path_factory.mktemp("second")))
            try:
                yield first, second
            finally:
                second.stop()
        finally:
            first.stop()


def run_driver(cluster: LocalCluster, script: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", script], env=cluster.environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_drivers_reach_the_recorded_cluster_and_see_its_logical_gpus(pair: tuple[LocalCluster, LocalCluster]) -> None:
    first, second = pair
    assert run_driver(first, COUNT_GPUS) == ["[('head', 0), ('node-1', 2.0)]", first.state.gcs_address]
    assert run_driver(second, COUNT_GPUS) == ["[('head', 0)]", second.state.gcs_address]


def test_the_dashboard_and_the_gcs_refuse_callers_without_the_token(pair: tuple[LocalCluster, LocalCluster]) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError) as refused:
        opener.open(f"{pair[0].state.dashboard_url}/api/jobs/", timeout=10)
    assert refused.value.code == 401
    environment = pair[0].environment() | {"RAY_AUTH_TOKEN_PATH": str(pair[1].state.token_path)}
    script = "import ray; ray.init()"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "token" in done.stderr.lower()


def test_every_process_is_recorded_and_marked_and_workers_start_behind_those_that_serve(pair: tuple[LocalCluster, LocalCluster]) -> None:
    found = processes.members(pair[0].state)
    assert {node.raylet.pid for node in pair[0].state.nodes} <= {process.pid for process in found}
    assert not {process.pid for process in found} & {process.pid for process in processes.members(pair[1].state)}
    priorities = run_driver(pair[0], "import os, ray; ray.init()\n@ray.remote(num_cpus=0)\ndef nice(): return os.nice(0)\nprint(ray.get(nice.remote()))")
    assert priorities == [str(START_NICENESS if may_come_forward() else os.nice(0))]


def test_nothing_is_written_into_the_home_folder(pair: tuple[LocalCluster, LocalCluster], home: Path) -> None:
    assert run_driver(pair[0], "import ray; ray.init(); print('in')") == ["in"]
    assert list(home.iterdir()) == []


def test_a_second_start_in_the_same_folder_is_refused_and_harms_nothing(pair: tuple[LocalCluster, LocalCluster]) -> None:
    with pytest.raises(FleetError, match="already runs"):
        LocalCluster.start(SMALL, pair[0].folder)
    assert LocalCluster.find(pair[0].folder) is not None


def require_state(folder: RunFolder) -> LocalState:
    state = folder.read()
    assert state is not None
    return state


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_start_leaves_nothing_once_it_is_run_again_or_taken_down(
    signal_number: signal.Signals, pair: tuple[LocalCluster, LocalCluster], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    starter = subprocess.Popen([sys.executable, "-c", START, str(tmp_path)], cwd=PROJECT_ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "begun\n"
        assert starter.stdout.readline() == "head\n"
        state = require_state(folder)
        assert len(processes.members(state)) > 1
        starter.send_signal(signal_number)
        starter.wait(30)
    if signal_number is signal.SIGKILL:
        LocalCluster(folder, state).stop()
    assert processes.members(state) == []
    assert not state.temp_dir.exists()
    assert folder.read() is None
    assert all(processes.is_running(node.raylet) for node in pair[0].state.nodes)


def test_a_job_runs_on_the_cluster_that_it_was_submitted_to(pair: tuple[LocalCluster, LocalCluster]) -> None:
    ray = str(Path(sys.executable).parent / "ray")
    for cluster in pair:
        job = [ray, "job", "submit", "--", "python", "-c", "import os; print('runs on', os.environ['RAY_ADDRESS'])"]
        done = subprocess.run(job, env=cluster.environment(), capture_output=True, text=True, timeout=120, check=False)
        assert f"runs on {cluster.state.gcs_address}" in done.stdout, done.stdout + done.stderr


def test_stopping_one_cluster_ends_all_of_it_workers_and_jobs_included_and_nothing_of_the_other(
    pair: tuple[LocalCluster, LocalCluster], tmp_path: Path
) -> None:
    cluster = LocalCluster.start(LocalSettings(num_nodes=0), RunFolder(tmp_path))
    try:
        actor = "import os, ray; ray.init(namespace='t')\nclass A:\n  def pid(self): return os.getpid()\n"
        actor += "a = ray.remote(A).options(num_cpus=0, lifetime='detached', name='a').remote()\nprint(ray.get(a.pid.remote()))"
        worker = processes.record("worker", int(run_driver(cluster, actor)[0]))
        ray = str(Path(sys.executable).parent / "ray")
        submitted = [ray, "job", "submit", "--no-wait", "--", "python", "-c", "import time; time.sleep(600)"]
        subprocess.run(submitted, env=cluster.environment(), capture_output=True, timeout=60, check=True)
        wait_until(
            lambda: any("time.sleep(600)" in " ".join(_command(process)) for process in processes.members(cluster.state)), "the job runs", timeout_s=90.0
        )
        everything = [processes.record("any", process.pid) for process in processes.members(cluster.state)]
        assert worker.pid in {process.pid for process in everything}
    finally:
        cluster.stop()
    assert [process for process in everything if processes.is_running(process)] == []
    assert not cluster.state.temp_dir.exists()
    assert LocalCluster.find(cluster.folder) is None
    assert all(processes.is_running(node.raylet) for other in pair for node in other.state.nodes)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
