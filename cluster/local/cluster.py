"""A Ray cluster of several logical nodes on one machine: start it, find it, end exactly what was started."""

from __future__ import annotations

import json
import queue
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Self

from cluster.core.errors import FleetError
from cluster.local import processes
from cluster.local.run_folder import LocalState, ProcessRecord, RunFolder, boot_id
from cluster.local.settings import LocalSettings, client_environment, server_environment

MARKER_FILE = "moelastic-marker"
# Ray puts sockets below it, 60 characters deeper, and a socket's path ends at 107 bytes.
MAX_TEMP_DIR_CHARS = 40
LOG_TAIL_LINES = 15


class LocalCluster:
    """A running local cluster, known by its run folder."""

    def __init__(self, folder: RunFolder, state: LocalState) -> None:
        self.folder = folder
        self.state = state

    @classmethod
    def start(cls, settings: LocalSettings, folder: RunFolder, *, progress: Callable[[str], None] | None = None) -> Self:
        """Start a cluster and return when all nodes are alive. What a killed start left in this folder is ended first.

        Raises ConfigError when one runs already, FleetError when it does not start within `settings.start_timeout_s`. On every way out but the
        good one, interrupts included, all that was started is ended.
        """
        with folder.locked():
            _require_none_running(folder)
            end_leftovers(folder)
            state = _prepare(settings, folder)
            try:
                _launch(settings, folder, state, progress or (lambda _: None))
            except BaseException:
                end_leftovers(folder)
                raise
            return cls(folder, _require_state(folder))

    @classmethod
    def find(cls, folder: RunFolder) -> Self | None:
        """The cluster of this folder, or None when none is recorded or nothing of it runs."""
        state = folder.read()
        return cls(folder, state) if state is not None and processes.members(state) else None

    @property
    def is_usable(self) -> bool:
        """Whether it came up and its head still runs; other nodes may be lost."""
        return _is_usable(self.state)

    def environment(self) -> dict[str, str]:
        """The environment for a process that talks to this cluster."""
        return client_environment(gcs_address=self.state.gcs_address, dashboard_url=self.state.dashboard_url, token_path=self.state.token_path)

    def kill_node(self, name: str) -> list[ProcessRecord]:
        """SIGKILL a node's raylet with everything that it hosts, as a power cut would; returns what was killed, all of it gone. For chaos and demos.

        Raises FleetError for the head, for an unknown node, and for one that does not run.
        """
        node = next((node for node in self.state.nodes[1:] if node.name == name), None)
        if node is None or not processes.is_running(node.raylet):
            message = f"{name}: not a running node beside the head; there are {', '.join(node.name for node in self.state.nodes[1:]) or 'none'}"
            raise FleetError(message)
        return processes.kill_tree(node.raylet)

    def stop(self) -> None:
        """End every process of it, and remove its temp dir; raises FleetError when one could not be ended."""
        with self.folder.locked():
            end_leftovers(self.folder)


def end_leftovers(folder: RunFolder) -> int:
    """End whatever the state of this folder names, remove its temp dir, forget it. Returns how many processes ran."""
    state = folder.read()
    if state is None:
        return 0
    num_running = len(processes.members(state))
    if remaining := processes.end(state):
        message = f"processes {remaining} of {folder.path} could not be ended; end them by hand (kill -9), then run `moelastic down --local` again"
        raise FleetError(message)
    _remove_temp_dir(state)
    folder.forget()
    return num_running


def _require_none_running(folder: RunFolder) -> None:
    state = folder.read()
    if state is not None and _is_usable(state):
        message = f"a local cluster already runs in {folder.path}; end it with `moelastic down --local`, or choose another --run-dir"
        raise FleetError(message)


def _is_usable(state: LocalState) -> bool:
    return state.phase == "ready" and processes.is_running(state.nodes[0].raylet)


def _prepare(settings: LocalSettings, folder: RunFolder) -> LocalState:
    marker = secrets.token_hex(16)
    temp_dir = _make_temp_dir()
    (temp_dir / MARKER_FILE).write_text(marker)
    state = LocalState(
        name=settings.name,
        phase="starting",
        marker=marker,
        boot_id=boot_id(),
        created_unix_s=time.time(),
        temp_dir=temp_dir,
        token_path=folder.make_token(),
    )
    folder.write(state)
    return state


def _make_temp_dir() -> Path:
    base = tempfile.gettempdir()
    if len(base) + len("/mo-xxxxxxxx") > MAX_TEMP_DIR_CHARS:
        base = "/tmp"  # noqa: S108  # made by mkdtemp, readable by its owner only
    return Path(tempfile.mkdtemp(prefix="mo-", dir=base))


def _remove_temp_dir(state: LocalState) -> None:
    """Remove the temp dir, if it bears the cluster's own marker."""
    marker = state.temp_dir / MARKER_FILE
    if marker.is_file() and marker.read_text() == state.marker:
        shutil.rmtree(state.temp_dir, ignore_errors=True)


def _launch(settings: LocalSettings, folder: RunFolder, state: LocalState, progress: Callable[[str], None]) -> None:
    environment = server_environment(settings, marker=state.marker, run_dir=folder.path, token_path=state.token_path, temp_dir=state.temp_dir)
    command = [sys.executable, "-m", "cluster.local.launch", str(folder.path), settings.model_dump_json()]
    with folder.launch_log.open("wb") as log:
        # A session of its own: Ctrl-C in the starter's terminal reaches the starter only, which then ends this in order.
        launcher = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True)  # noqa: S603
    try:
        _follow(launcher, folder, progress, limit_s=settings.start_timeout_s)
    finally:
        if launcher.stdout is not None:
            launcher.stdout.close()


def _follow(launcher: subprocess.Popen[bytes], folder: RunFolder, progress: Callable[[str], None], *, limit_s: float) -> None:
    """Pass the launcher's steps on until it is ready; raises FleetError."""
    deadline_s = time.monotonic() + limit_s
    lines: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read_lines, args=(launcher.stdout, lines), daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Empty:
            message = (
                f"the local cluster was not ready within {limit_s:.0f} s, and what had started was ended; if this machine is busy, try again when it is"
                f" not, or with fewer nodes (--nodes); log: {folder.launch_log}"
            )
            raise FleetError(message) from None
        if not line:
            message = f"the launcher ended early; the end of {folder.launch_log}:\n{_tail(folder.launch_log)}"
            raise FleetError(message)
        step = json.loads(line)
        match step["step"]:
            case "ready":
                return
            case "failed":
                message = f"the local cluster did not start: {step['reason']}; log: {folder.launch_log}"
                raise FleetError(message)
            case _:
                progress(str(step.get("name", "")))


def _read_lines(stream: IO[bytes] | None, lines: queue.Queue[bytes]) -> None:
    """Hand over each line of JSON, then an empty one; Ray's own prints are left out."""
    try:
        for line in stream or ():
            if line.startswith(b"{"):
                lines.put(line)
    except ValueError:
        pass  # the reader was closed while waiting
    lines.put(b"")


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])


def _require_state(folder: RunFolder) -> LocalState:
    state = folder.read()
    if state is None:
        message = f"{folder.state_path} vanished while the cluster started; start it again"
        raise FleetError(message)
    return state
