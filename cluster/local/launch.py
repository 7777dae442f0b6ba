"""`python -m cluster.local.launch RUN_DIR SETTINGS_JSON`: the process that starts a local cluster's nodes, then becomes its keeper.

It tells its starter of each step in a line of JSON on stdout: `{"step": "node", "name": "node-1"}`, at last `{"step": "ready"}` or
`{"step": "failed", "reason": ...}`. When nobody listens any more it ends what it started.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal

from cluster.core.errors import FleetError
from cluster.local import keeper, processes
from cluster.local.run_folder import LocalState, NodeRecord, RunFolder
from cluster.local.settings import LocalSettings

PR_SET_CHILD_SUBREAPER = 36
HTTP_TIMEOUT_S = 10.0
UNAUTHORIZED = 401


def main() -> None:
    """Start everything, write it into the state, become the keeper."""
    folder = RunFolder(Path(sys.argv[1]))
    settings = LocalSettings.model_validate_json(sys.argv[2])
    state = folder.read()
    if state is None:
        message = f"{folder.state_path}: missing; start local clusters with `moelastic up --local`"
        raise FleetError(message)
    _adopt_orphans()
    state = state.model_copy(update={"keeper": processes.record("keeper", os.getpid())})
    folder.write(state)
    try:
        _start(folder, settings, state)
    except BaseException as error:  # noqa: BLE001  # told to the starter, who ends what was started
        traceback.print_exc()
        _fail(state, f"{type(error).__name__}: {error}")
    os.execv(sys.executable, [sys.executable, "-I", "-S", keeper.__file__])  # noqa: S606  # our own file, no shell


def _start(folder: RunFolder, settings: LocalSettings, state: LocalState) -> None:
    from cluster.local.ray_nodes import LocalRay  # imports ray: 0.5 s that the first state must not wait for

    ray = LocalRay(settings, state.temp_dir)
    nodes: list[NodeRecord] = []

    def started(node: NodeRecord) -> LocalState:
        nodes.append(node)
        grown = state.model_copy(update={"gcs_address": ray.gcs_address, "nodes": tuple(nodes)})
        folder.write(grown)
        _tell("node", name=node.name)
        return grown

    started(ray.start_head())
    for node in ray.start_nodes():
        started(node)
    url = ray.dashboard_url(settings.start_timeout_s)
    _require_token(url)
    folder.write(state.model_copy(update={"gcs_address": ray.gcs_address, "nodes": tuple(nodes), "dashboard_url": url, "phase": "ready"}))
    _tell("ready")
    _let_go_of_output()


def _require_token(url: str) -> None:
    """Raise FleetError unless the dashboard refuses a caller without the token: raylets listen on every interface, so an open cluster is a remote shell."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/api/jobs/", timeout=HTTP_TIMEOUT_S) as reply:
            status = reply.status
    except urllib.error.HTTPError as error:
        status = error.code
    if status != UNAUTHORIZED:
        message = f"{url} answered {status} to a call without a token, {UNAUTHORIZED} is required; token authentication is off in this version of Ray"
        raise FleetError(message)


def _tell(step: Literal["node", "ready", "failed"], **facts: str) -> None:
    sys.stdout.write(json.dumps({"step": step} | facts) + "\n")
    sys.stdout.flush()


def _fail(state: LocalState, reason: str) -> None:
    """Tell the starter; if it is gone, end everything here."""
    try:
        _tell("failed", reason=reason)
    except OSError:
        processes.end(state)
    os._exit(1)


def _let_go_of_output() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)


def _adopt_orphans() -> None:
    """Make this process the parent of its descendants' orphans, where the system can: `members` then finds them as children."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


if __name__ == "__main__":
    main()
