"""`moelastic doctor`: what is missing or left over on this machine, each with what to do about it. Changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import socket
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.text import Text

from cluster.cli.endpoints import run_folder
from cluster.core.errors import MoeError
from cluster.core.spec import RouterSpec
from cluster.deploy.code_digest import PROJECT_ROOT
from cluster.deploy.connection import FILE_NAME, Connection
from cluster.local import processes
from cluster.local.cluster import MARKER_FILE, MAX_TEMP_DIR_CHARS
from cluster.local.run_folder import LocalState, RunFolder
from cluster.local.settings import RUN_DIR_VARIABLE

VERSIONED = ("ray", "torch", "grpcio", "protobuf", "numpy", "pydantic", "transformers")
MIN_PYTHON = (3, 11)
MIN_SHARED_BYTES = 512 << 20
CONNECT_TIMEOUT_S = 0.5
OWNER_ONLY = 0o077
STYLES = {"ok": "green", "note": "cyan", "fix": "red"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `fix` needs doing, `note` is worth knowing."""

    level: Literal["ok", "note", "fix"]
    what: str
    remedy: str = ""


def examine(run_dir: Path | None) -> list[Finding]:
    """Look at everything."""
    folder = run_folder(run_dir)
    findings = [*_versions(), *_gpus(), *_machine(), *_environment()]
    try:
        state = folder.read()
    except MoeError as error:
        findings.append(Finding("fix", str(error)))
        state = None
    findings += [*_local_cluster(folder, state), *_deployment(folder), *_leftovers()]
    return findings


def show(findings: list[Finding], console: Console | None = None) -> bool:
    """Print them; returns whether nothing needs fixing."""
    console = console or Console(highlight=False, soft_wrap=True)
    for finding in findings:
        line = Text(f"{finding.level:<5}", style=STYLES[finding.level])
        line.append(finding.what, style="default")
        if finding.remedy:
            line.append(f"\n     -> {finding.remedy}", style="bold")
        console.print(line)
    wrong = sum(finding.level == "fix" for finding in findings)
    console.print("nothing to fix" if not wrong else f"{wrong} to fix", style="green" if not wrong else "red")
    return not wrong


def _versions() -> Iterator[Finding]:
    if sys.version_info < MIN_PYTHON:
        yield Finding("fix", f"Python {sys.version.split()[0]}", "use Python 3.11 or newer: make clean, then make install PYTHON=...")
    wanted = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", _constraints(), flags=re.MULTILINE))
    differing = []
    for name in VERSIONED:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "transformers":
                differing.append(f"{name} is missing")
            continue
        if name in wanted and found.partition("+")[0] != wanted[name]:
            differing.append(f"{name} {found} instead of {wanted[name]}")
    if differing:
        yield Finding("fix", f"packages differ from constraints.txt: {', '.join(differing)}", "make install; nodes of one cluster need equal versions")
    else:
        yield Finding("ok", f"Python {sys.version.split()[0]}, packages as in constraints.txt")


def _constraints() -> str:
    path = PROJECT_ROOT / "constraints.txt"
    return path.read_text() if path.is_file() else ""


def _gpus() -> Iterator[Finding]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        import pynvml

        pynvml.nvmlInit()
        num_gpus = int(pynvml.nvmlDeviceGetCount())
        pynvml.nvmlShutdown()
    except Exception:  # noqa: BLE001  # no driver, no library, no permission: to us there is no GPU
        num_gpus = 0
    build = importlib.metadata.version("torch").partition("+")[2]
    if num_gpus and build == "cpu":
        yield Finding("fix", f"{num_gpus} GPUs, but torch is its CPU build", "install a CUDA build of the same torch version into .venv (see README)")
    elif num_gpus and visible == "":
        yield Finding("note", f"{num_gpus} GPUs, hidden by an empty CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES to use them")
    elif num_gpus:
        yield Finding("ok", f"{num_gpus} GPUs" + (f", CUDA_VISIBLE_DEVICES={visible}" if visible is not None else ""))
    else:
        yield Finding("ok", "no GPU: `device: auto` serves on the CPU, local clusters have logical GPUs")


def _machine() -> Iterator[Finding]:
    base = tempfile.gettempdir()
    if len(base) + len("/mo-xxxxxxxx") > MAX_TEMP_DIR_CHARS:
        yield Finding("note", f"{base} is too long for Ray's sockets; local clusters use /tmp instead")
    shared = Path("/dev/shm")  # noqa: S108  # looked at, not written
    if shared.is_dir() and shutil.disk_usage(shared).free < MIN_SHARED_BYTES:
        free = shutil.disk_usage(shared).free >> 20
        yield Finding("fix", f"{shared} has {free} MiB free; five local nodes want 400", "enlarge it (docker run --shm-size=1g), or start fewer nodes")
    port = RouterSpec.model_fields["port"].default
    if _listens("127.0.0.1", port):
        yield Finding("note", f"port {port}, the default of `router.port`, is in use", "another router, or set router.port (0 picks a free one)")


def _environment() -> Iterator[Finding]:
    if os.environ.get("RAY_ADDRESS"):
        yield Finding("note", "RAY_ADDRESS is set; `up --local` ignores it")
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        yield Finding("fix", "RAY_AUTH_MODE is not `token`: whoever reaches such a cluster runs code on it", "export RAY_AUTH_MODE=token on every node")


def _local_cluster(folder: RunFolder, state: LocalState | None) -> Iterator[Finding]:
    if state is None:
        yield Finding("ok", f"no local cluster in {folder.path}")
        return
    running = processes.members(state)
    dead = [node.name for node in state.nodes if not processes.is_running(node.raylet)]
    if not running:
        yield Finding("fix", f"the local cluster of {folder.path} is gone, its records are not", f"moelastic down --local --run-dir {folder.path}")
    elif state.phase != "ready":
        yield Finding("fix", f"a start in {folder.path} was cut off; {len(running)} processes are left", f"moelastic down --local --run-dir {folder.path}")
    else:
        yield Finding("ok", f"local cluster of {len(state.nodes)} nodes, {len(running)} processes, {folder.path}")
        if dead:
            yield Finding("note", f"dead nodes: {', '.join(dead)}", "moelastic down --local, then up --local, brings them back")
        for what, address in (("GCS", state.gcs_address), ("job server", state.dashboard_url.removeprefix("http://"))):
            host, _, port = address.rpartition(":")
            if not _listens(host, int(port or 0)):
                yield Finding("fix", f"{what} of the local cluster does not listen on {address}", "moelastic down --local, then up --local")
    if state.token_path.is_file() and state.token_path.stat().st_mode & OWNER_ONLY:
        yield Finding("fix", f"{state.token_path} can be read by others", f"chmod 600 {state.token_path}")


def _deployment(folder: RunFolder) -> Iterator[Finding]:
    try:
        connection = Connection.read(folder.path / FILE_NAME)
    except MoeError as error:
        yield Finding("fix", str(error))
        return
    if connection is None:
        return
    from cluster.cli.status_facts import gather
    from cluster.cli.status_view import gpu_troubles

    facts = gather(connection)
    for kind, source in (("router", facts.router_source), ("controller", facts.control_source)):
        if not source.is_answering:
            yield Finding(
                "fix", f"the {kind} of {connection.name} at {source.address or 'no known address'}: {source.problem}", "moelastic up again reconciles"
            )
    for place, said, is_out in gpu_troubles(facts.control):
        yield Finding("fix" if is_out else "note", f"GPU {place}: {said}", "look at it with nvidia-smi; `moelastic gpu release` ends a quarantine")
    if facts.router_source.is_answering:
        yield Finding("ok", f"{connection.name} is {facts.state} on {connection.router_address}")


def _leftovers() -> Iterator[Finding]:
    """Processes and temp dirs of local clusters that no run folder knows any more."""
    by_marker: dict[tuple[str, str], list[int]] = defaultdict(list)
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            continue
        if marker := environment.get(processes.MARKER_VARIABLE):
            by_marker[marker, environment.get(RUN_DIR_VARIABLE, "")].append(process.pid)
    for (marker, path), pids in by_marker.items():
        if not _knows(path, marker):
            yield Finding(
                "fix",
                f"{len(pids)} processes of a local cluster whose run folder ({path or 'none'}) does not know it",
                f"kill -9 {' '.join(map(str, sorted(pids)))}",
            )
    alive = {marker for marker, _ in by_marker}
    for file in sorted(Path(tempfile.gettempdir()).glob(f"mo-*/{MARKER_FILE}")):
        try:
            if file.read_text() not in alive:
                yield Finding("fix", f"{file.parent} belongs to a local cluster that is gone", f"rm -r {file.parent}")
        except OSError:
            continue


def _knows(path: str, marker: str) -> bool:
    try:
        state = RunFolder(Path(path)).read() if path else None
    except MoeError:
        return False
    return state is not None and state.marker == marker


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False
