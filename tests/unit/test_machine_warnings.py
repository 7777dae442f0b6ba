"""What `up` says about the machines: niceness and too many compute threads, once each, and nothing where all is well."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from cluster.deploy.machine_warnings import machine_warnings, worker_niceness


def node(name: str, *, host: str = "h1", cores: float = 2.0, alive: bool = True) -> dict[str, Any]:
    return {"NodeID": name, "NodeManagerHostname": host, "Alive": alive, "Resources": {"CPU": cores}}


def actor(node_id: str, device: str = "cpu") -> dict[str, Any]:
    return {"node_id": node_id, "device": device, "pid": 1}


def test_nothing_is_said_where_all_is_well() -> None:
    assert machine_warnings([actor("a"), actor("a")], [node("a")], 0) == []


def test_niceness_is_named_with_its_remedy() -> None:
    (line,) = machine_warnings([], [], 15)
    assert "niceness 15" in line
    assert "RAY_worker_niceness=0" in line


def test_more_compute_threads_than_cores_are_counted_over_the_nodes_of_a_host() -> None:
    nodes = [node("a"), node("b"), node("c", host="h2", cores=8.0)]
    (line,) = machine_warnings([actor("a"), actor("a"), actor("b"), *[actor("c")] * 8], nodes, 0)
    assert "3 expert actors compute on the 2 cores of h1" in line


def test_actors_on_gpus_and_on_nodes_that_are_gone_do_not_count() -> None:
    actors = [*[actor("a", "cuda:0")] * 8, *[actor("gone")] * 8, *[actor("b")] * 8]
    assert machine_warnings(actors, [node("a"), node("b", alive=False)], 0) == []


def test_niceness_is_that_of_expert_actors_and_of_nobody_else() -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    script = "import os, sys; os.nice(3); print('up', flush=True); sys.stdin.read()"
    for title, expected in (("ray::ExpertActor", own + 3), ("other", own)):
        with subprocess.Popen([title, "-c", script], executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.readline() == "up\n"
            assert worker_niceness([process.pid]) == expected
            process.stdin.close()
    assert worker_niceness([2**22 + 1]) == own
