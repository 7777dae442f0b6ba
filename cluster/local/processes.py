"""Which processes belong to a local cluster, and how exactly those are ended.

A process belongs when the cluster's marker is in its environment, when it is in the session that the cluster's keeper leads, or when it descends
from one that does. Three ways, because Ray's workers overwrite their environment with a title and jobs start sessions of their own.
Nothing is ever chosen by name.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable

import psutil

from cluster.core.errors import FleetError
from cluster.local.run_folder import LocalState, ProcessRecord, boot_id

MARKER_VARIABLE = "MOELASTIC_LOCAL_MARKER"
START_TOLERANCE_S = 2.0
POLL_S = 0.05


def record(kind: str, pid: int) -> ProcessRecord:
    """The identity of a running process; raises psutil.NoSuchProcess."""
    return ProcessRecord(kind=kind, pid=pid, start_s=psutil.Process(pid).create_time())


def is_running(process: ProcessRecord) -> bool:
    """Whether this very process runs; a zombie, or another process under the same id, does not count."""
    try:
        found = psutil.Process(process.pid)
        same = abs(found.create_time() - process.start_s) < START_TOLERANCE_S
        return same and found.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def members(state: LocalState) -> list[psutil.Process]:
    """Every running process of a local cluster, its keeper last."""
    if state.boot_id != boot_id():
        return []
    children: dict[int, list[psutil.Process]] = defaultdict(list)
    found: dict[int, psutil.Process] = {}
    session = _session(state)
    for process in psutil.process_iter(["ppid", "status"]):
        if process.pid == os.getpid() or process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        children[process.info["ppid"]].append(process)
        if _has_marker(process, state.marker) or _is_in_session(process, session, state.created_unix_s):
            found[process.pid] = process
    _add_descendants(found, children)
    keeper = state.keeper.pid if state.keeper else -1
    return sorted(found.values(), key=lambda process: process.pid == keeper)


def end(state: LocalState, *, timeout_s: float = 20.0) -> list[int]:
    """End every process of a local cluster; returns the ids of those that could not be ended within the limit."""
    deadline_s = time.monotonic() + timeout_s
    while running := members(state):
        if time.monotonic() > deadline_s:
            return [process.pid for process in running]
        keeper = state.keeper.pid if state.keeper else -1
        # The keeper goes last: as long as it lives, whatever its processes leave behind becomes its child and is found.
        _kill(process for process in running if process.pid != keeper or len(running) == 1)
        psutil.wait_procs(running[:-1] or running, timeout=POLL_S)
    return []


def kill_tree(root: ProcessRecord, *, timeout_s: float = 10.0) -> list[ProcessRecord]:
    """SIGKILL a process and all of its descendants; returns them once none runs. Raises FleetError when one does not go within the limit.

    The root is stopped first, so that it neither starts a process that is missed nor ends one in good order.
    """
    parent = psutil.Process(root.pid)
    parent.suspend()
    try:
        tree = [parent, *parent.children(recursive=True)]
        victims = [found for process in tree if (found := _recorded(process)) is not None]
        _kill(reversed(tree))
    finally:
        _kill([parent])  # whatever went wrong: a root that stays stopped would never end
    deadline_s = time.monotonic() + timeout_s
    while running := [victim for victim in victims if is_running(victim)]:
        if time.monotonic() > deadline_s:
            message = f"processes {[victim.pid for victim in running]} did not end within {timeout_s:.0f} s of SIGKILL"
            raise FleetError(message)
        time.sleep(POLL_S)
    return victims


def _recorded(process: psutil.Process) -> ProcessRecord | None:
    """Its identity, unless it has ended meanwhile."""
    try:
        return ProcessRecord(kind=process.name(), pid=process.pid, start_s=process.create_time())
    except psutil.NoSuchProcess:
        return None


def _session(state: LocalState) -> int | None:
    """The cluster's session, unless its number has passed to another running process."""
    if state.keeper is None or (_runs(state.keeper.pid) and not is_running(state.keeper)):
        return None
    return state.keeper.pid


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _has_marker(process: psutil.Process, marker: str) -> bool:
    try:
        return process.environ().get(MARKER_VARIABLE) == marker
    except (psutil.Error, OSError):
        return False


def _is_in_session(process: psutil.Process, session: int | None, created_unix_s: float) -> bool:
    if session is None:
        return False
    try:
        return os.getsid(process.pid) == session and process.create_time() > created_unix_s - START_TOLERANCE_S
    except (psutil.Error, OSError):
        return False


def _add_descendants(found: dict[int, psutil.Process], children: dict[int, list[psutil.Process]]) -> None:
    waiting = list(found)
    while waiting:
        for child in children[waiting.pop()]:
            if child.pid not in found:
                found[child.pid] = child
                waiting.append(child.pid)


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
