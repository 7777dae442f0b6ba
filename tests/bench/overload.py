"""Three times more than the router can take: what is still answered in time, how fast the rest is refused, what it costs in memory, how soon it is over."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import psutil

from bench.layer import random_rows
from bench.processes import ROUTER, pids_of, usage_of
from bench.rig import Rig, with_bench
from bench.rows import CallerProcess, Row
from bench.settings import LAYER, MODEL, OURS, Case
from bench.tables import Section, Table
from cluster.core.errors import MoeError
from cluster.deploy.connection import read_token
from router_service.client import RouterClient

FACTOR = 3
TOKENS = 128
CALLERS_AT_PEAK = 16
DEADLINE_S = 1.0
PROBE_TOKENS = 8
# After the flood so many times its length is watched.
WATCH_SHARE = 0.6
GOODPUT_GOAL, REFUSAL_GOAL_S, RECOVERY_GOAL_S = 0.9, 0.02, 2.0


@dataclass
class Probe:
    """A small caller who goes on all the time, one request after the other."""

    rig: Rig
    seen: list[tuple[float, float, bool]] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Until it is over: (begun, took, answered) of each request."""
        connection = self.rig.deployment.connection
        rows = random_rows(self.rig.settings.sizes, PROBE_TOKENS, 5)
        with RouterClient(connection.router_address, token=read_token(connection.token_path), timeout_s=DEADLINE_S) as client:
            while not self.is_over.is_set():
                begun_s, answered = time.time(), True
                try:
                    client.dispatch(rows, model=MODEL, layer=LAYER)
                except MoeError:
                    answered = False
                self.seen.append((begun_s, time.time() - begun_s, answered))
                self.is_over.wait(0.02)

    def recovery_s(self, ended_s: float, usual_s: float) -> float | None:
        """How long after the end the first of three usual answers in a row began; None when there were none."""
        after = [(begun_s, took_s <= 2 * usual_s and answered) for begun_s, took_s, answered in self.seen if begun_s >= ended_s]
        for place in range(len(after) - 2):
            if all(usual for _, usual in after[place : place + 3]):
                return after[place][0] - ended_s
        return None


@dataclass
class Memory:
    """The router's memory while it is looked at."""

    pids: list[int]
    peak_bytes: int = 0

    def look(self) -> int:
        """Resident bytes now."""
        now = sum(psutil.Process(pid).memory_info().rss for pid in self.pids)
        self.peak_bytes = max(self.peak_bytes, now)
        return now


def run(rig: Rig) -> Section:
    """Find the peak with callers who wait for their answers, then send FACTOR times as much without waiting."""
    with _load(rig) as row:
        return _measured(rig, row)


@contextmanager
def _load(rig: Rig) -> Iterator[Row]:
    """A process of load whose threads wait for their turn no longer than a router's do: what it is late by would be counted as the router's."""
    connection = rig.deployment.connection
    options = {"address": connection.router_address, "token_file": str(connection.token_path), "short_slices": "yes"}
    caller = CallerProcess(OURS, {}, rig.settings, options, with_bench(dict(os.environ)))
    try:
        caller.wait_until_ready()
        yield Row(OURS, caller)
    finally:
        caller.close()


def _measured(rig: Rig, row: Row) -> Section:
    settings = rig.settings
    case = Case(CALLERS_AT_PEAK, TOKENS)
    peak = median(row.measure(case, settings.seconds * 2, settings.warm_up_calls).tokens_per_s for _ in range(3))
    memory = Memory(pids_of(rig.deployment, ROUTER))
    before_bytes = memory.look()
    probe = Probe(rig)
    probing = threading.Thread(target=probe.run, daemon=True)
    probing.start()
    time.sleep(1.0)
    usual_s = median(took_s for _, took_s, _ in probe.seen)
    found = _flood(row, memory, FACTOR * peak / TOKENS, settings.overload_seconds)
    time.sleep(max(1.0, WATCH_SHARE * settings.overload_seconds))
    probe.is_over.set()
    probing.join(DEADLINE_S * 2)
    after = usage_of(memory.pids[0])
    found |= {"peak_tokens_per_s": peak, "usual_probe_s": usual_s, "recovery_s": probe.recovery_s(found["ended_s"], usual_s)}
    found |= {"router_bytes_before": before_bytes, "router_bytes_peak": memory.peak_bytes, "router_bytes_after": after.rss_bytes}
    return Section([_table(found)], found)


def _flood(row: Row, memory: Memory, rate_per_s: float, seconds: float) -> dict[str, Any]:
    """What became of the requests; the memory is looked at meanwhile."""
    answers: list[dict[str, Any]] = []
    command = {"do": "flood", "model": MODEL, "tokens": TOKENS, "rate_per_s": rate_per_s, "seconds": seconds, "timeout_s": DEADLINE_S}
    asking = threading.Thread(target=lambda: answers.append(row.caller.ask(command)), daemon=True)
    asking.start()
    while asking.is_alive():
        memory.look()
        asking.join(0.05)
    answer = answers[0]
    refused = answer["refused_s"]
    return {
        "offered_tokens_per_s": answer["num_sent"] * TOKENS / seconds,
        "goodput_tokens_per_s": len(answer["answered_s"]) * TOKENS / seconds,
        "num_sent": answer["num_sent"],
        "num_answered": len(answer["answered_s"]),
        "num_refused": len(refused),
        "num_late": answer["num_late"],
        "num_failed_otherwise": answer["num_failed"],
        "refusal_s_p50": median(refused) if refused else None,
        "refusal_s_p99": quantiles(refused, n=100)[-1] if len(refused) > 1 else None,
        "ended_s": answer["ended_s"],
        "load_late_s_p99": quantiles(answer["loop_late_s"], n=100)[-1],
    }


def _table(found: dict[str, Any]) -> Table:
    share = found["goodput_tokens_per_s"] / found["peak_tokens_per_s"]
    p99_s, recovery_s = found["refusal_s_p99"], found["recovery_s"]
    grown = (found["router_bytes_peak"] - found["router_bytes_before"]) / (1 << 20)
    rows = [
        ("peak, callers who wait", f"{found['peak_tokens_per_s']:,.0f} tokens/s", ""),
        ("offered", f"{found['offered_tokens_per_s']:,.0f} tokens/s", f"{FACTOR} x the peak"),
        ("answered in time", f"{found['goodput_tokens_per_s']:,.0f} tokens/s, {share:.0%} of the peak", f"at least {GOODPUT_GOAL:.0%}"),
        ("requests", f"{found['num_answered']} answered, {found['num_refused']} refused, {found['num_late']} late, {found['num_failed_otherwise']} failed", ""),
        ("refusals, p99", "none" if p99_s is None else f"{1e3 * p99_s:.1f} ms", f"at most {1e3 * REFUSAL_GOAL_S:.0f} ms"),
        ("router's memory, grown at most", f"{grown:.0f} MiB", "bounded by router.max_inflight_bytes and max_dispatch_bytes"),
        ("usual again after", "never while watched" if recovery_s is None else f"{recovery_s:.2f} s", f"at most {RECOVERY_GOAL_S:.0f} s"),
    ]
    note = (
        f"Requests of {TOKENS} tokens at even intervals, {DEADLINE_S:.0f} s each, no retries; the load is made on the same cores, by a process with "
        f"short slices that was late by {1e3 * found['load_late_s_p99']:.1f} ms itself (p99)."
    )
    return Table(f"{FACTOR} times overload", ("", "measured", "goal"), rows, note)
