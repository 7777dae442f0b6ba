"""Very many small requests, and what router and actors hold as they go: memory, descriptors, threads, requests under way must not grow."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from bench.processes import ACTOR, ROUTER, Usage, pids_of, usage_of
from bench.rig import Rig
from bench.rows import Row
from bench.settings import IDLE_MODEL, OURS
from bench.tables import Section, Table
from cluster.deploy.connection import read_token
from router_service.client import RouterClient

CALLERS, TOKENS = 16, 2
NUM_LOOKS = 40
MAX_S = 900.0
REST_S = 1.0
# What counts as steady: a thousandth of a KiB for each request would be a MiB in a million.
STEADY_BYTES_PER_REQUEST = 8.0


@dataclass(frozen=True, slots=True)
class Look:
    """Everything after so many requests, with nobody asking: `pending_tokens` and `frames` are rows and frames that links still have under way."""

    requests: int
    usage: dict[str, Usage]
    pending_tokens: int
    frames: int


def run(rig: Rig) -> Section:
    """Send the requests in portions, look after each one. Ends early after MAX_S, and says how far it came."""
    row = rig.row(OURS)
    assert isinstance(row, Row)
    wanted = rig.settings.leak_requests
    portion_s, done, looks = 1.0, 0, []
    begun_s = time.monotonic()
    while done < wanted and time.monotonic() - begun_s < MAX_S:
        command = {"do": "measure", "model": IDLE_MODEL, "callers": CALLERS, "tokens": TOKENS, "seconds": portion_s, "warm_up": 1}
        calls = len(row.caller.ask(command)["latencies_s"]) + CALLERS
        portion_s = min(20.0, max(0.2, portion_s * math.ceil(wanted / NUM_LOOKS) / calls))
        done += calls
        looks.append(_look(rig, done))
    return section_of(looks, time.monotonic() - begun_s)


def _look(rig: Rig, requests: int) -> Look:
    time.sleep(REST_S)
    pids = [(f"router {number}", pid) for number, pid in enumerate(pids_of(rig.deployment, ROUTER))]
    pids += [(f"actor {number}", pid) for number, pid in enumerate(pids_of(rig.deployment, ACTOR))]
    connection = rig.deployment.connection
    with RouterClient(connection.router_address, token=read_token(connection.token_path)) as client:
        links = client.status().links
    usage = {name: usage_of(pid) for name, pid in pids}
    return Look(requests, usage, sum(link.queued_tokens for link in links), sum(link.frames_in_flight for link in links))


def section_of(looks: Sequence[Look], seconds: float) -> Section:
    """The second half decides: by the first one, pools and caches have their size."""
    half = looks[len(looks) // 2 :] if len(looks) > 3 else looks
    rows, data = [], {}
    for name in looks[-1].usage:
        slope = slope_of([look.requests for look in half], [look.usage[name].private_bytes for look in half])
        first, last = looks[0].usage[name], looks[-1].usage[name]
        is_steady = slope <= STEADY_BYTES_PER_REQUEST and last.descriptors <= median(look.usage[name].descriptors for look in half) + 2
        data[name] = {"bytes_per_request": slope, "is_steady": is_steady}
        rows.append(
            (
                name,
                f"{first.private_bytes / 2**20:.1f} -> {last.private_bytes / 2**20:.1f}",
                f"{slope:+.1f}",
                f"{first.descriptors} -> {last.descriptors}",
                f"{first.threads} -> {last.threads}",
                "yes" if is_steady else "NO",
            )
        )
    left = f"{looks[-1].pending_tokens} rows and {looks[-1].frames} frames were under way at the end"
    note = f"{looks[-1].requests:,} requests of {TOKENS} tokens by {CALLERS} callers in {seconds:.0f} s; {left}. The slope is that of the second half."
    table = Table("what very many requests leave behind", ("process", "private MiB", "bytes for each request", "descriptors", "threads", "steady"), rows, note)
    return Section([table], {"looks": [asdict(look) for look in looks], "verdicts": data, "seconds": seconds})


def slope_of(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the straight line through the points with the least squares; 0 for a single one."""
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread: Any = sum((one - x) ** 2 for one in xs)
    return float(sum((one - x) * (other - y) for one, other in zip(xs, ys, strict=True)) / spread) if spread else 0.0
