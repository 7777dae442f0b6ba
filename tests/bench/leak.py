"""Very many small requests, and what router and actors hold as they go: memory, descriptors, threads, requests under way must not grow.

Private bytes alone do not say why they grow. So the heaps are asked, too, when half of the requests are answered and at the end: bytes and objects in
use that grow are a leak; pages that grow around them are room that allocators keep after a peak, of which there is an end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np

from bench.heap import Heap, heaps_of
from bench.layer import random_rows
from bench.processes import ACTOR, ROUTER, Usage, pids_of, usage_of
from bench.rig import Rig
from bench.rows import Row
from bench.settings import IDLE_MODEL, LAYER, OURS
from bench.tables import Section, Table
from cluster.deploy.connection import read_token
from router_service.client import RouterClient

CALLERS, TOKENS = 16, 2
NUM_LOOKS = 40
MAX_S = 900.0
REST_S = 1.0
# What counts as steady: a thousandth of a KiB for each request would be a MiB in a million.
STEADY_BYTES_PER_REQUEST = 8.0
# One object for every fifty requests: interpreters keep some of those that were freed for the next ones.
STEADY_OBJECTS_PER_REQUEST = 0.02


@dataclass(frozen=True, slots=True)
class Look:
    """Everything after so many requests, with nobody asking: `pending_tokens` and `frames` are rows and frames that links still have under way."""

    requests: int
    usage: dict[str, Usage]
    pending_tokens: int
    frames: int
    heaps: dict[str, Heap] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one process does for each request in the second half. It holds no more: is steady. Its pages grow no more either: is flat."""

    private_bytes: float
    used_bytes: float
    objects: float
    is_steady: bool
    is_flat: bool

    @property
    def word(self) -> str:
        """For the table."""
        if not self.is_steady:
            return "NO"
        return "yes" if self.is_flat else "in use"


def run(rig: Rig) -> Section:
    """Send the requests in portions, look after each one. Ends early after MAX_S, and says how far it came."""
    row = rig.row(OURS)
    assert isinstance(row, Row)
    wanted = rig.settings.leak_requests
    portion_s, done, looks, is_half = 1.0, 0, [], False
    _compute_every_size(rig)
    begun_s = time.monotonic()
    while done < wanted and time.monotonic() - begun_s < MAX_S:
        command = {"do": "measure", "model": IDLE_MODEL, "callers": CALLERS, "tokens": TOKENS, "seconds": portion_s, "warm_up": 1}
        calls = len(row.caller.ask(command)["latencies_s"]) + CALLERS
        portion_s = min(20.0, max(0.2, portion_s * math.ceil(wanted / NUM_LOOKS) / calls))
        done += calls
        is_over = done >= wanted or time.monotonic() - begun_s >= MAX_S
        is_mark = is_over or (not is_half and max(done / wanted, (time.monotonic() - begun_s) / MAX_S) >= 1 / 2)
        is_half = is_half or is_mark
        looks.append(_look(rig, done, with_heaps=is_mark))
    return section_of(looks, time.monotonic() - begun_s)


def _compute_every_size(rig: Rig) -> None:
    """Have every expert compute every number of rows that may meet in a frame: oneDNN keeps what it compiles for each, half a MiB, up to 1,024 of them."""
    sizes = rig.settings.sizes
    with _client(rig) as client:
        for num_rows in range(1, CALLERS * TOKENS + 1):
            rows = random_rows(sizes, num_rows, num_rows)
            for expert in range(sizes.num_experts):
                ids = np.full((num_rows, sizes.top_k), -1, np.int32)
                ids[:, 0] = expert
                client.dispatch(rows, model=IDLE_MODEL, layer=LAYER, top_k=(ids, np.ones(ids.shape, np.float32)))


def _client(rig: Rig) -> RouterClient:
    connection = rig.deployment.connection
    return RouterClient(connection.router_address, token=read_token(connection.token_path))


def _look(rig: Rig, requests: int, *, with_heaps: bool) -> Look:
    time.sleep(REST_S)
    pids = [(f"router {number}", pid) for number, pid in enumerate(pids_of(rig.deployment, ROUTER))]
    pids += [(f"actor {number}", pid) for number, pid in enumerate(pids_of(rig.deployment, ACTOR))]
    with _client(rig) as client:
        links = client.status().links
    usage = {name: usage_of(pid) for name, pid in pids}
    heaps = heaps_of(rig.deployment) if with_heaps else {}
    held = {name: heaps[pid] for name, pid in pids if pid in heaps}
    return Look(requests, usage, sum(link.queued_tokens for link in links), sum(link.frames_in_flight for link in links), held)


def section_of(looks: Sequence[Look], seconds: float) -> Section:
    """The second half decides: by the first one, pools and caches have their size."""
    half = looks[len(looks) // 2 :] if len(looks) > 3 else looks
    marks = [look for look in looks if look.heaps]
    rows, data = [], {}
    for name in looks[-1].usage:
        verdict = _verdict(name, half, marks)
        data[name] = asdict(verdict)
        first, last = looks[0].usage[name], looks[-1].usage[name]
        rows.append(
            (
                name,
                f"{first.private_bytes / 2**20:.1f} -> {last.private_bytes / 2**20:.1f}",
                f"{verdict.private_bytes:+.1f}",
                " -> ".join(f"{look.heaps[name].used_bytes / 2**20:.1f}" for look in marks),
                f"{verdict.used_bytes:+.1f}",
                f"{1000 * verdict.objects:+.1f}",
                f"{first.descriptors} -> {last.descriptors}",
                f"{first.threads} -> {last.threads}",
                verdict.word,
            )
        )
    left = f"{looks[-1].pending_tokens} rows and {looks[-1].frames} frames were under way at the end"
    note = f"{looks[-1].requests:,} requests of {TOKENS} tokens by {CALLERS} callers in {seconds:.0f} s; {left}. Slopes are those of the second half. "
    note += "In use: what malloc has given out; objects: blocks of memory that Python objects are in. Steady `in use`: these do not grow, but the pages do."
    columns = (
        "process",
        "private MiB",
        "bytes for each request",
        "MiB in use",
        "bytes for each request",
        "objects for 1,000 requests",
        "descriptors",
        "threads",
        "steady",
    )
    table = Table("what very many requests leave behind", columns, rows, note)
    return Section([table], {"looks": [asdict(look) for look in looks], "verdicts": data, "seconds": seconds})


def _verdict(name: str, half: Sequence[Look], marks: Sequence[Look]) -> Verdict:
    private = slope_of([look.requests for look in half], [look.usage[name].private_bytes for look in half])
    requests = [look.requests for look in marks]
    used = slope_of(requests, [look.heaps[name].used_bytes for look in marks]) if marks else private
    objects = slope_of(requests, [look.heaps[name].objects for look in marks]) if marks else 0.0
    last = half[-1].usage[name]
    is_held = used <= STEADY_BYTES_PER_REQUEST and objects <= STEADY_OBJECTS_PER_REQUEST
    is_counted = all(getattr(last, kind) <= median(getattr(look.usage[name], kind) for look in half) + 2 for kind in ("descriptors", "threads"))
    return Verdict(private, used, objects, is_held and is_counted, private <= STEADY_BYTES_PER_REQUEST)


def slope_of(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the straight line through the points with the least squares; 0 for a single one."""
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread: Any = sum((one - x) ** 2 for one in xs)
    return float(sum((one - x) * (other - y) for one, other in zip(xs, ys, strict=True)) / spread) if spread else 0.0
