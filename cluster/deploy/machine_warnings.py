"""What slows expert actors down on the machines that they run on, said once when a deployment serves: niceness, and more compute threads than cores."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import psutil

from cluster.scheduling import may_come_forward

ACTOR_TITLE = "ExpertActor"


def machine_warnings(actors: Sequence[Mapping[str, Any]], nodes: Sequence[Mapping[str, Any]], niceness: int) -> list[str]:
    """Lines for people.

    Args:
        actors: of the controller's status; those on CPUs compute with one thread each.
        nodes: of `ray.nodes()`; several on one host share its cores.
        niceness: of Ray's workers, where it is known; 0 is the normal priority.
    """
    warnings = []
    if niceness > 0:
        warnings.append(
            f"warning: expert actors run at niceness {niceness} and starve beside any other load; start Ray's nodes with RAY_worker_niceness=0, or with"
            " CAP_SYS_NICE, with which they come forward by themselves"
        )
    for host, (threads, cores) in _busy_hosts(actors, nodes).items():
        if threads > cores:
            warnings.append(
                f"warning: {threads} expert actors compute on the {cores:.0f} cores of {host}; fewer (actors.count) answer sooner than many that share"
            )
    return warnings


def _busy_hosts(actors: Iterable[Mapping[str, Any]], nodes: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, float]]:
    """Compute threads and cores of every host with an actor on its CPUs. Nodes of one host may each claim all of its cores."""
    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in nodes if node["Alive"]}
    cores: dict[str, float] = {}
    for node in nodes:
        host = node["NodeManagerHostname"]
        cores[host] = max(cores.get(host, 0.0), node["Resources"].get("CPU", 0.0))
    threads = Counter(hosts[actor["node_id"]] for actor in actors if actor["node_id"] in hosts and str(actor.get("device") or "cpu").startswith("cpu"))
    return {host: (count, cores[host]) for host, count in threads.items()}


def worker_niceness(pids: Iterable[int], asked: int = 0) -> int:
    """The highest niceness of these expert actors, as far as they run on this machine, and of those elsewhere, as far as this process can tell.

    As a job it has that of Ray's workers, and where it may come forward to what is asked for, so may they.
    """
    own = os.getpriority(os.PRIO_PROCESS, 0)
    found = [own if own <= asked or not may_come_forward(asked) else asked]
    for pid in pids:
        try:
            process = psutil.Process(pid)
            if any(ACTOR_TITLE in part for part in process.cmdline()[:1]):
                found.append(process.nice())
        except psutil.Error:
            continue
    return max(found)
