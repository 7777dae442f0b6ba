"""What processes hold on their heaps, as the allocators count it: what is in use is somebody's, what is free came from a peak and serves the next one.

The processes are Ray's, so it is asked through Ray, by a process of its own: `python -m bench.heap NAMESPACE` prints JSON, by process id.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from cluster.local.settings import PROJECT_ROOT
from kit.deployments import Deployment

ASK_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Heap:
    """One process, garbage collected: bytes that malloc has given out and holds free, and blocks of memory that Python objects are in."""

    used_bytes: int
    free_bytes: int
    objects: int


def heaps_of(deployment: Deployment) -> dict[int, Heap]:
    """Every actor's process, by its id."""
    environment = deployment.cluster.environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(PROJECT_ROOT / "tests"), environment["PYTHONPATH"]])
    command = [sys.executable, "-m", "bench.heap", deployment.spec.name]
    done = subprocess.run(command, env=environment, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=4 * ASK_TIMEOUT_S, check=False)
    if done.returncode:
        message = f"the heaps could not be asked for:\n{done.stderr}"
        raise RuntimeError(message)
    return {int(pid): Heap(*found) for pid, found in json.loads(done.stdout.splitlines()[-1]).items()}


def heap_here() -> tuple[int, int, int]:
    """This process: used bytes, free bytes, objects. glibc alone is asked, so bytes are 0 elsewhere."""
    gc.collect()
    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    info: Any = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
    ask: Any = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return 0, 0, sys.getallocatedblocks()
    ask.restype = info
    found = ask()
    return found.uordblks + found.hblkhd, found.fordblks, sys.getallocatedblocks()


def _ask(namespace: str, look: Callable[[], tuple[int, int, int]]) -> dict[int, tuple[int, int, int]]:
    import ray

    ray.init(address=os.environ["RAY_ADDRESS"], namespace=namespace, log_to_driver=False, logging_level="error", configure_logging=False)
    names = [entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True) if entry["namespace"] == namespace]
    asked = [ray.get_actor(name).__ray_call__.remote(lambda _: (os.getpid(), look())) for name in names]
    return dict(ray.get(asked, timeout=ASK_TIMEOUT_S))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_ask(sys.argv[1], heap_here)) + "\n")
