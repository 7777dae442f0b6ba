"""Start Ray's processes for several logical nodes on this machine. Runs in the launcher's process only: Ray's node class keeps global state."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray._private import services
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.utils import write_ray_address

from cluster.core.errors import FleetError
from cluster.local.processes import record
from cluster.local.run_folder import NodeRecord
from cluster.local.settings import LocalSettings

HOST = "127.0.0.1"
# Below Linux' ephemeral ports and above Ray's default worker ports, so that nothing takes them by chance.
PORTS = range(20_000, 32_000)
PORT_ATTEMPTS = 64
NODE_POLL_S = 0.1
DASHBOARD_MODULES = "JobHead,NodeHead"


class LocalRay:
    """A head and its nodes. Every process is left running: ending them is `processes.end`'s work."""

    def __init__(self, settings: LocalSettings, temp_dir: Path, *, gcs_address: str = "") -> None:
        """`gcs_address`: of a head that runs already, for nodes that join later."""
        self._settings = settings
        self._temp_dir = temp_dir
        self._gcs_address = gcs_address
        self._head: _Head | None = None
        services.start_ray_process = _with_job_modules_only(services.start_ray_process)
        services.get_node = _with_patience(services.get_node, settings.start_timeout_s)

    @property
    def gcs_address(self) -> str:
        """Where drivers connect."""
        return self._gcs_address or str(self._started_head().gcs_address)

    def start_head(self) -> NodeRecord:
        """Start the GCS, the head's raylet and, beside them, the dashboard."""
        parameters = RayParams(
            num_cpus=self._settings.cpus_per_node,
            num_gpus=0,
            gcs_server_port=free_port(),
            include_dashboard=True,
            dashboard_host=HOST,
            dashboard_port=free_port(),
            no_monitor=True,
            **self._common("head", self._temp_dir),
        )
        self._head = _Head(parameters, head=True, shutdown_at_exit=False, spawn_reaper=False)
        # A job's supervisor looks here for its own cluster; without the file it takes any GCS that runs on this machine.
        write_ray_address(self.gcs_address, str(self._temp_dir))
        return _recorded("head", self._head, num_gpus=0)

    def start_nodes(self) -> Iterator[NodeRecord]:
        """Start the other nodes, a few at a time; yields each as soon as Ray counts it as alive, in order."""
        with ThreadPoolExecutor(self._settings.nodes_at_a_time) as pool:
            yield from pool.map(self.start_node, [f"node-{number}" for number in range(1, self._settings.num_nodes + 1)])

    def dashboard_url(self, timeout_s: float) -> str:
        """Where jobs are submitted, once the dashboard answers there; raises FleetError."""
        return f"http://{self._started_head().dashboard_address(timeout_s)}"

    def start_node(self, name: str) -> NodeRecord:
        """Start one node and wait until Ray counts it as alive; one that was lost may come again under its name."""
        temp_dir = self._temp_dir / name.replace("node-", "n")
        parameters = RayParams(
            gcs_address=self.gcs_address,
            num_cpus=self._settings.cpus_per_node,
            num_gpus=self._settings.gpus_per_node,
            **self._common(name, temp_dir),
        )
        node = Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
        write_ray_address(self.gcs_address, str(temp_dir))
        return _recorded(name, node, num_gpus=self._settings.gpus_per_node)

    def _common(self, name: str, temp_dir: Path) -> dict[str, Any]:
        return {
            "node_ip_address": HOST,
            "node_name": name,
            "object_store_memory": self._settings.object_store_bytes,
            "temp_dir": str(temp_dir),
            "include_log_monitor": False,
            "min_worker_port": 0,
            "max_worker_port": 0,
            "dashboard_agent_listen_port": 0,
        }

    def _started_head(self) -> _Head:
        if self._head is None:
            message = "the head has not been started"
            raise FleetError(message)
        return self._head


class _Head(Node):  # type: ignore[misc]  # ray ships no types
    """A head that does not wait for its dashboard before its raylet starts: their imports are most of the start."""

    _dashboard: threading.Thread | None = None
    _dashboard_error: Exception | None = None

    def start_api_server(self, **options: Any) -> None:  # noqa: ANN401  # Ray's own signature, passed on
        self._dashboard = threading.Thread(target=self._start_dashboard, kwargs=options, daemon=True)
        self._dashboard.start()

    def _start_dashboard(self, **options: Any) -> None:  # noqa: ANN401
        try:
            super().start_api_server(**options)
        except Exception as error:  # noqa: BLE001  # handed to whoever asks for the address
            self._dashboard_error = error

    def dashboard_address(self, timeout_s: float) -> str:
        if self._dashboard is not None:
            self._dashboard.join(timeout_s)
        if self._dashboard_error is not None or not self.webui_url:
            message = (
                f"Ray's dashboard did not start within {timeout_s:.0f} s: {self._dashboard_error or 'no answer'}; its log is in {self.get_logs_dir_path()}"
            )
            raise FleetError(message)
        return str(self.webui_url)


def _with_job_modules_only(start: Callable[..., Any]) -> Callable[..., Any]:
    """Ray has no public switch for the dashboard's modules; all nine would cost 800 MB, jobs need two."""

    def start_ray_process(command: list[str], process_type: str, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        if process_type == "dashboard":
            command = [*command, f"--modules-to-load={DASHBOARD_MODULES}"]
        return start(command, process_type, *args, **options)

    return start_ray_process


def _with_patience(look: Callable[..., Any], limit_s: float) -> Callable[..., Any]:
    """Ray gives a node 30 s to register, fixed; a raylet and its agents on a machine that is busy with other work need longer."""

    def look_until_found(*args: Any, **options: Any) -> Any:  # noqa: ANN401
        deadline_s = time.monotonic() + limit_s
        while True:
            try:
                return look(*args, **options)
            except RuntimeError:
                if time.monotonic() > deadline_s:
                    raise
            time.sleep(NODE_POLL_S)

    return look_until_found


def _recorded(name: str, node: Node, *, num_gpus: int) -> NodeRecord:
    raylet = node.all_processes["raylet"][0].process
    return NodeRecord(name=name, node_id=node.node_id, num_gpus=num_gpus, raylet=record("raylet", raylet.pid))


def free_port() -> int:
    """A port of `PORTS` that nobody listens on."""
    for _ in range(PORT_ATTEMPTS):
        port = secrets.choice(PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    message = f"no free port in {PORTS.start}-{PORTS.stop - 1} after {PORT_ATTEMPTS} attempts; free some, then start again"
    raise FleetError(message)
