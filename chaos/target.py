"""A deployment on this machine's local cluster, as chaos sees it. It strikes only what the cluster's own status names, and only if the spec allows it."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import psutil

from chaos.core.targets import ActorView, Inventory, NodeView, Process
from chaos.dead_man import DeadMan
from chaos.fault_link import FaultPort
from cluster.core.errors import ConfigError, FleetError
from cluster.core.ids import ExpertId, Incarnation
from cluster.core.spec import ClusterSpec
from cluster.deploy.connection import Connection, read_token
from cluster.local import processes
from cluster.local.cluster import LocalCluster
from cluster.local.run_folder import RunFolder
from protos.moelastic.control.v1 import control_pb2 as pb

STATUS_PATH = "/moelastic.control.v1.ControlService/GetClusterStatus"
ASK_LIMIT_S = 2.0
SAME_START_S = 0.05
HEAD = "head"


class LocalTarget:
    """The one implementation of `ClusterPort` that touches processes."""

    def __init__(self, folder: RunFolder, connection: Connection) -> None:
        """Raises ConfigError when no local cluster runs there, or its recorded spec does not say `chaos: allowed`."""
        cluster = LocalCluster.find(folder)
        if cluster is None or not cluster.is_usable:
            message = f"no local cluster runs in {folder.path}: chaos strikes processes of a local cluster only; start one with `moelastic up --local CONFIG`"
            raise ConfigError(message)
        self.cluster, self.connection = cluster, connection
        self.spec = recorded_spec(connection)
        if self.spec.chaos != "allowed":
            message = f"{self.spec.name}: its spec says `chaos: {self.spec.chaos}`; set `chaos: allowed` in its config and deploy it again with --replace"
            raise ConfigError(message)
        self._token = read_token(connection.control_token_path)
        self._channel = grpc.insecure_channel(connection.control_address, options=(("grpc.enable_http_proxy", 0), ("grpc.max_reconnect_backoff_ms", 500)))
        self._method = self._channel.unary_unary(STATUS_PATH, pb.GetClusterStatusRequest.SerializeToString, pb.GetClusterStatusResponse.FromString)
        self._is_ours = False  # known once a controller answered; from then on one may be gone for a while, killed on purpose
        self._members: dict[int, psutil.Process] = {}
        self._controller: Process | None = None
        self._named: set[Process] = set()
        self._stopped: set[Process] = set()
        self._dead_man = DeadMan()

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self.spec.name

    @property
    def store_dirs(self) -> list[Path]:
        """The expert stores of the logical nodes, all on this machine."""
        temp_dir = self.cluster.state.temp_dir
        found = {path.resolve() for pattern in ("session_*", "n*/session_*") for path in temp_dir.glob(f"{pattern}/moelastic/store")}
        return sorted(found | ({self.spec.store.dir} if self.spec.store.dir is not None else set()))

    def close(self) -> None:
        """Heal what is still stopped, close the channel."""
        for process in list(self._stopped):
            self.resume(process)
        self._dead_man.close()
        self._channel.close()

    def status(self, *, limit_s: float = ASK_LIMIT_S) -> pb.GetClusterStatusResponse:
        """The controller's view. Raises FleetError when it does not answer within the limit."""
        metadata = (("authorization", f"Bearer {self._token}"),) if self._token else ()
        try:
            return self._method(pb.GetClusterStatusRequest(), timeout=limit_s, metadata=metadata, wait_for_ready=True)
        except grpc.RpcError as error:
            message = f"the controller at {self.connection.control_address} does not answer within {limit_s:g} s ({error.code().name})"
            raise FleetError(message) from error

    def inventory(self) -> Inventory:
        """What the cluster says it consists of; each process is checked to be one of this local cluster's own.

        Raises ConfigError when who answers as the controller is none of them: the connection then points to another cluster.
        """
        status = self.status()
        ready = [actor for actor in status.actors if actor.state == "ready"]
        routed = {router.node_id for router in status.routers if router.pid}
        members = self._found({actor.pid for actor in ready} | {router.pid for router in status.routers if router.pid})
        if self._controller is None and not self._is_ours:
            message = (
                f"the controller at {self.connection.control_address} is no process of the local cluster in {self.cluster.folder.path}: the connection "
                "points to another cluster, and chaos strikes no other; give the --run-dir of the cluster that is meant"
            )
            raise ConfigError(message)
        self._is_ours = True
        found = Inventory(
            actors=tuple(_actor(actor, process) for actor in ready if (process := _process(actor.actor_id, actor.pid, members)) is not None),
            nodes=tuple(NodeView(node.node_id, node.name, node.name != HEAD and node.node_id not in routed) for node in status.nodes if node.alive),
            routers=tuple(process for router in status.routers if router.pid and (process := _process("router", router.pid, members)) is not None),
            controller=self._controller,
            rates={ExpertId(rate.model, rate.layer, rate.index): rate.tokens_per_s for rate in status.rates},
        )
        self._named |= found.processes
        return found

    def kill(self, process: Process) -> None:
        """SIGKILL a process that the status named."""
        self._signal(process, signal.SIGKILL)

    def stop(self, process: Process) -> None:
        """SIGSTOP it. Should this process die first, another one resumes it: one that may be stopped at all, so that no stranger is ever resumed."""
        self._check(process)
        self._stopped.add(process)
        self._dead_man.guard(process)
        self._signal(process, signal.SIGSTOP)

    def resume(self, process: Process) -> None:
        """SIGCONT it."""
        if self.is_alive(process):
            self._signal(process, signal.SIGCONT)
        self._stopped.discard(process)

    def is_running(self, process: Process) -> bool:
        """Whether it is alive and not stopped."""
        return self._status_of(process) not in {None, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD, psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP}

    def is_alive(self, process: Process) -> bool:
        """Whether it is alive, stopped or not."""
        return self._status_of(process) not in {None, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}

    def kill_node(self, node: NodeView) -> float:
        """SIGKILL the node's raylet and all that it hosts. The workers go first, at once: looking for them takes longer than killing them."""
        cluster, name = self._reread(), self._local_name(node)
        known = next((found for found in cluster.state.nodes[1:] if found.name == name), None)
        if known is None or not processes.is_running(known.raylet):
            message = f"node {node.name}: not a running node beside the head of the local cluster in {cluster.folder.path}"
            raise FleetError(message)
        raylet = psutil.Process(known.raylet.pid)
        raylet.suspend()
        hosted = raylet.children(recursive=True)
        at_s = time.monotonic()
        for process in hosted:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        cluster.kill_node(name)
        return at_s

    def start_node(self, node: NodeView) -> None:
        """Start a node of the same name again, under a new id."""
        from cluster.local.rejoin import start_again

        start_again(self._reread(), self._local_name(node))

    async def ask(self, actor: ActorView, fault: str, settings: dict[str, Any]) -> str:
        """Send a fault frame to an actor."""
        return await FaultPort(actor.incarnation, actor.address, self._link_secret()).ask(fault, settings)

    def _found(self, pids: set[int]) -> dict[int, psutil.Process]:
        """The local cluster's own processes, looked for again only when one of these is not among them or the controller is gone.

        A recovery asks four times a second, and looking through all processes would take the cores that it is to be measured on.
        """
        if not all(pid in self._members and self._members[pid].is_running() for pid in pids):
            self._members = {process.pid: process for process in processes.members(self._state())}
        if self._controller is None or not self.is_alive(self._controller):
            self._controller = _listener(self.connection.control_address, self._members)
            if self._controller is None:  # a new one may have started since
                self._members = {process.pid: process for process in processes.members(self._state())}
                self._controller = _listener(self.connection.control_address, self._members)
        return self._members

    def _signal(self, process: Process, number: signal.Signals) -> None:
        self._check(process)
        os.kill(process.pid, number)

    def _check(self, process: Process) -> None:
        """Raise ConfigError for a process that the status did not name, FleetError for one that is gone."""
        if process not in self._named:
            message = f"process {process.pid} was not named by the status of {self.name}: chaos touches nothing else"
            raise ConfigError(message)
        if not self.is_alive(process):
            message = f"{process.what}: process {process.pid} is gone; look again with `moelastic status`"
            raise FleetError(message)

    def _status_of(self, process: Process) -> str | None:
        try:
            found = psutil.Process(process.pid)
            return str(found.status()) if abs(found.create_time() - process.start_s) <= SAME_START_S else None
        except psutil.Error:
            return None

    def _reread(self) -> LocalCluster:
        """The local cluster as its state says now: nodes come and go."""
        found = LocalCluster.find(self.cluster.folder)
        if found is None:
            message = f"the local cluster of {self.cluster.folder.path} is gone"
            raise FleetError(message)
        self.cluster = found
        return found

    def _state(self) -> Any:  # noqa: ANN401  # LocalState; kept in one place
        return self._reread().state

    def _local_name(self, node: NodeView) -> str:
        """The node's name in the local cluster's own state, by its id."""
        name = next((known.name for known in self.cluster.state.nodes if node.node_id == known.node_id or node.name == known.name), None)
        if name is None:
            message = f"node {node.name} is not one of the local cluster in {self.cluster.folder.path}"
            raise ConfigError(message)
        return name

    def _link_secret(self) -> bytes:
        path = _state_dir(self.connection) / "link_secret"
        try:
            return bytes.fromhex(path.read_text().strip())
        except (OSError, ValueError) as error:
            message = f"{path}: the deployment's link secret cannot be read ({type(error).__name__}): actor faults need it; run on the controller's node"
            raise ConfigError(message) from error


def recorded_spec(connection: Connection) -> ClusterSpec:
    """The spec that the controller recorded as its goal: what runs, whatever a config file says meanwhile. Raises ConfigError."""
    path = _state_dir(connection) / "control.sqlite"
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=ASK_LIMIT_S)) as database:
            row = database.execute("SELECT value FROM facts WHERE key = 'spec'").fetchone()
    except sqlite3.Error as error:
        message = f"{path}: the controller's records cannot be read ({error}); chaos runs on the machine of a local cluster's controller"
        raise ConfigError(message) from error
    if row is None or not row[0]:
        message = f"{path}: no spec is recorded; deploy first: `moelastic up --local CONFIG`"
        raise ConfigError(message)
    return ClusterSpec.model_validate_json(bytes(row[0]))


def _state_dir(connection: Connection) -> Path:
    if connection.control_token_path is None:
        message = f"{connection.name}: the path of its control token is not known; deploy with `moelastic up --local`, and give no --endpoint"
        raise ConfigError(message)
    return connection.control_token_path.parent


def _process(what: str, pid: int | None, members: Mapping[int, psutil.Process]) -> Process | None:
    """A process of the status by id and start time; None for one that is not of this local cluster."""
    found = None if pid is None else members.get(pid)
    try:
        return None if found is None else Process(what, found.pid, found.create_time())
    except psutil.Error:
        return None


def _listener(address: str, members: Mapping[int, psutil.Process]) -> Process | None:
    """The process that listens on the control service's own address: the controller."""
    port = int(address.rpartition(":")[2] or 0)
    for found in psutil.net_connections("tcp"):
        if found.status == psutil.CONN_LISTEN and found.laddr and found.laddr.port == port and found.pid in members:
            return _process("controller", found.pid, members)
    return None


def _actor(actor: pb.ActorStatus, process: Process) -> ActorView:
    ready = [slot for slot in actor.slots if slot.state == "ready"]
    held = {role: frozenset(ExpertId(slot.model, slot.layer, slot.index) for slot in ready if slot.role == role) for role in (pb.ROLE_REPLICA, pb.ROLE_SHADOW)}
    return ActorView(
        incarnation=Incarnation(actor.actor_id, actor.generation),
        node_id=actor.node_id,
        device=actor.device,
        address=actor.address,
        process=process,
        replicas=held[pb.ROLE_REPLICA],
        shadows=held[pb.ROLE_SHADOW],
    )
