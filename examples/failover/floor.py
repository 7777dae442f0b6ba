"""`python -m examples.failover.floor`: how long after a SIGKILL a peer can know of it at best, on this machine; writes `docs/failover/floor.md`.

A process of so many MB of its own memory and so many threads is killed; three of its sockets end here. One is ended by the kernel, once the memory is
freed; one by the process's sentinel; one with the thread that alone holds it, as a link's tether is held. A pidfd, which a parent or a node's agent could
hold, is watched beside them.
"""

from __future__ import annotations

import argparse
import os
import platform
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from chaos.busy import neighbours
from cluster.local.settings import PROJECT_ROOT

OUT: Final = PROJECT_ROOT / "docs" / "failover" / "floor.md"
PRIVATE_MB: Final = (10, 200, 500, 1000)
THREADS: Final = (1, 40)
LIMIT_S: Final = 60.0
SETTLE_S: Final = 0.5
WAYS: Final = ("sentinel", "tether", "kernel", "pidfd")
NAMES: Final = {b"g": "sentinel", b"t": "tether", b"k": "kernel"}
VICTIM: Final = """
import mmap, socket, sys, threading
from actors.sentinel import Sentinel
from actors.tether import hold
port, num_bytes, num_threads = int(sys.argv[1]), int(sys.argv[2]) << 20, int(sys.argv[3])
memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for place in range(0, num_bytes, mmap.PAGESIZE):
    memory[place] = 1
for _ in range(num_threads - 1):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
sentinel = Sentinel.start()
links = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
sentinel.guard(links[0])
for link, name in zip(links, b"gkt"):
    link.sendall(bytes([name]))
assert hold(links[2])
links.pop().close()
threading.Event().wait()
"""


class Row(NamedTuple):
    """One size of process: milliseconds from the kill to each sign of it, all repetitions."""

    num_busy: int
    private_mb: int
    num_threads: int
    took_ms: dict[str, list[float]]


def measure(private_mb: int, num_threads: int) -> dict[str, float]:
    """Kill one process; milliseconds to each sign."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LIMIT_S)
        command = [sys.executable, "-c", VICTIM, str(listener.getsockname()[1]), str(private_mb), str(num_threads)]
        with subprocess.Popen(command, cwd=PROJECT_ROOT) as victim, selectors.DefaultSelector() as selector:  # noqa: S603  (our own words)
            links = [listener.accept()[0] for _ in NAMES]
            for link in links:
                link.settimeout(LIMIT_S)
                selector.register(link, selectors.EVENT_READ, NAMES[link.recv(1)])
            pidfd = os.pidfd_open(victim.pid)
            selector.register(pidfd, selectors.EVENT_READ, "pidfd")
            time.sleep(SETTLE_S)  # until its threads are at rest and its sentinel has the link
            killed_s = time.monotonic()
            victim.send_signal(signal.SIGKILL)
            took_ms = _signs_ms(selector, killed_s)
            for link in links:
                link.close()
            os.close(pidfd)
    return took_ms


def _signs_ms(selector: selectors.BaseSelector, killed_s: float) -> dict[str, float]:
    took_ms: dict[str, float] = {}
    while selector.get_map():
        found = selector.select(LIMIT_S)
        if not found:
            message = f"no sign of a death within {LIMIT_S:g} s"
            raise TimeoutError(message)
        for key, _ in found:
            took_ms[key.data] = 1e3 * (time.monotonic() - killed_s)
            selector.unregister(key.fileobj)
    return took_ms


def page(rows: Sequence[Row], repetitions: int, load: float) -> str:
    """The table, in Markdown; `load` is the machine's load average before, which is what others made of it."""
    lines = [
        "# How early a death can be known",
        "",
        f"Milliseconds from SIGKILL to each sign of it, median (largest) of {repetitions}, on {os.cpu_count()} cores ({platform.system()}",
        f"{platform.machine()}) with a load average of {load:.1f} before. Made by `python -m examples.failover.floor`.",
        "",
        "`kernel`: the process's own socket ends, which is once its memory is freed. `pidfd`: the process can be waited for, which comes later still.",
        "`sentinel`: a socket that the sentinel of an expert actor guards ends. `tether`: one that a thread of the process holds in a table of its own ends,",
        "whoever else is killed. `busy` processes burn a core each meanwhile.",
        "",
        "| busy | private MB | threads | " + " | ".join(WAYS) + " |",
        "|" + "---|" * (3 + len(WAYS)),
    ]
    for row in rows:
        cells = (f"{statistics.median(row.took_ms[way]):.1f} ({max(row.took_ms[way]):.1f})" for way in WAYS)
        lines.append(f"| {row.num_busy} | {row.private_mb} | {row.num_threads} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every size, idle and with every core busy."""
    parser = argparse.ArgumentParser(prog="python -m examples.failover.floor", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9, help="of each size")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows, load = [], os.getloadavg()[0]
    for num_busy in (0, os.cpu_count() or 1):
        with neighbours(num_busy):
            for private_mb in PRIVATE_MB:
                for num_threads in THREADS:
                    runs = [measure(private_mb, num_threads) for _ in range(options.repetitions)]
                    rows.append(Row(num_busy, private_mb, num_threads, {way: [run[way] for run in runs] for way in WAYS}))
    options.out.write_text(page(rows, options.repetitions, load))
    sys.stdout.write(f"wrote {options.out}\n")


if __name__ == "__main__":
    main()
