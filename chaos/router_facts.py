"""What a router says of itself beside its status: its Prometheus counters, and how long its threads waited for a core."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path

LIMIT_S = 1.0
_LINE = re.compile(r"^(moe\w*)(\{[^}]*\})? (\S+)$", re.MULTILINE)


def read_counters(address: str) -> dict[str, float]:
    """Every `moe*` series of a scrape port, by name and labels; empty when it does not answer, or has no address."""
    if not address:
        return {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}/metrics", timeout=LIMIT_S) as reply:
            text = reply.read().decode()
    except (OSError, urllib.error.URLError, ValueError):
        return {}
    return {name + labels: float(value) for name, labels, value in _LINE.findall(text)}


def grown(before: Mapping[str, float], after: Mapping[str, float], name: str) -> float | None:
    """By how much the series that begin with this name grew together; None when there is none, or the router was started anew between."""
    found = [key for key in after if key.startswith(name)]
    growth = sum(after[key] - before.get(key, 0.0) for key in found)
    return growth if found and before and growth >= 0 else None


def read_waits_s(pids: Iterable[int]) -> float:
    """Seconds that all threads of these processes have waited on a run queue so far (`/proc/PID/task/*/schedstat`, second number)."""
    total_ns = 0
    for pid in pids:
        for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            try:
                total_ns += int(path.read_text().split()[1])
            except (OSError, IndexError, ValueError):
                continue  # a thread that has ended meanwhile
    return total_ns / 1e9
