"""`python -m cluster.local.rejoin RUN_DIR NODE`: starts a node of a local cluster again after it was lost, under its old name and a new id.

A process of its own, which ends once the node runs: Ray's node class keeps global state. The node's processes bear the cluster's marker, so they are
found and ended with it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cluster.core.errors import FleetError
from cluster.local import processes
from cluster.local.cluster import LocalCluster
from cluster.local.run_folder import NodeRecord, RunFolder
from cluster.local.settings import LocalSettings, server_environment
from cluster.scheduling import START_NICENESS, come_forward, give_way, may_come_forward

LIMIT_S = 120.0


def start_again(cluster: LocalCluster, name: str, *, limit_s: float = LIMIT_S) -> None:
    """Start it and return when Ray counts it as alive. Raises FleetError for one that is unknown or runs, and when it does not come up in time."""
    state = cluster.state
    known = _find(cluster, name)
    settings = _settings(cluster, known)
    environment = server_environment(settings, marker=state.marker, run_dir=cluster.folder.path, token_path=state.token_path, temp_dir=state.temp_dir)
    command = [sys.executable, "-m", "cluster.local.rejoin", str(cluster.folder.path), name]
    log = cluster.folder.launch_log
    try:
        with log.open("ab") as output:
            done = subprocess.run(  # noqa: S603  # our own command line, no shell
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, timeout=limit_s, check=False
            )
    except subprocess.TimeoutExpired as error:
        message = f"{name} did not come up within {limit_s:.0f} s; log: {log}"
        raise FleetError(message) from error
    if done.returncode != 0:
        message = f"{name} did not come up (exit code {done.returncode}); log: {log}"
        raise FleetError(message)


def _find(cluster: LocalCluster, name: str) -> NodeRecord:
    known = next((node for node in cluster.state.nodes[1:] if node.name == name), None)
    if known is None or processes.is_running(known.raylet):
        message = f"{name}: {'it runs already' if known is not None else 'no such node beside the head'}; only a lost node is started again"
        raise FleetError(message)
    return known


def _settings(cluster: LocalCluster, node: NodeRecord) -> LocalSettings:
    return LocalSettings(name=cluster.state.name, num_nodes=len(cluster.state.nodes) - 1, gpus_per_node=node.num_gpus, start_timeout_s=LIMIT_S)


def main() -> None:
    """Start the node, write its new identity into the state."""
    folder, name = RunFolder(Path(sys.argv[1])), sys.argv[2]
    cluster = LocalCluster.find(folder)
    if cluster is None:
        message = f"no local cluster runs in {folder.path}"
        raise FleetError(message)
    from cluster.local.ray_nodes import LocalRay

    if may_come_forward():  # until it runs: a node's agents import for seconds beside nodes that answer
        give_way(START_NICENESS)
    ray = LocalRay(_settings(cluster, _find(cluster, name)), cluster.state.temp_dir, gcs_address=cluster.state.gcs_address)
    started = ray.start_node(name)
    come_forward(0, started.raylet.pid)
    with folder.locked():
        state = folder.read()
        if state is None:
            message = f"{folder.state_path} vanished while {name} started"
            raise FleetError(message)
        nodes = tuple(started if node.name == name else node for node in state.nodes)
        folder.write(state.model_copy(update={"nodes": nodes}))


if __name__ == "__main__":
    main()
