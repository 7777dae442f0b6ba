"""The processes behind a row, and what they use: CPU seconds, private and proportional memory, descriptors, threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.local import processes
from cluster.local.cluster import LocalCluster
from kit.deployments import Deployment, cmdline_of

ROUTER, ACTOR, CONTROLLER = "RouterHost", "ExpertActor", "ControllerActor"


def pids_of(deployment: Deployment, name: str) -> list[int]:
    """The Ray workers of this deployment's cluster that run an actor of this class."""
    return pids_on(deployment.cluster, name)


def pids_on(cluster: LocalCluster, name: str) -> list[int]:
    """The Ray workers of a cluster that run an actor of this class, whoever deployed them."""
    return sorted(process.pid for process in processes.members(cluster.state) if name in " ".join(cmdline_of(process.pid)[:1]))


def below(pid: int) -> list[int]:
    """A process and everything it has started."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds of processes so far, in the program and in the kernel."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
    return total


@dataclass(frozen=True, slots=True)
class Usage:
    """What one process holds now."""

    rss_bytes: int
    private_bytes: int
    pss_bytes: int
    descriptors: int
    threads: int


def usage_of(pid: int) -> Usage:
    """From /proc: private is what ends with the process, proportional shares each page among those that map it."""
    sizes = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        if value.endswith("kB"):
            sizes[name] = int(value.split()[0]) << 10
    process = psutil.Process(pid)
    private = sizes["Private_Clean"] + sizes["Private_Dirty"]
    return Usage(sizes["Rss"], private, sizes["Pss"], process.num_fds(), process.num_threads())


def idle_cores(pids: Sequence[int], seconds: float) -> float:
    """Cores that processes burn while nobody asks them anything."""
    with contextlib.suppress(psutil.Error):
        before_s = cpu_s(pids)
        psutil.cpu_percent(interval=seconds)
        return (cpu_s(pids) - before_s) / seconds
    return 0.0
