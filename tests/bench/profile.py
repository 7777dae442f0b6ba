"""Where the time of one request goes: the caller's clock around the client, the router's and the actors' spans below it.

Requests are traced one at a time; the parts of each are disjoint and what no span covers is named as such, so they add up to what the caller saw.
Of several actors that work at once the one that is last counts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from secrets import token_hex
from statistics import median

import numpy as np

from bench.layer import random_rows
from bench.rig import Rig
from bench.rows import Row
from bench.settings import ECHO, LAYER, WIDE_MODEL, Case
from bench.tables import Section, Table
from cluster.deploy.connection import read_token
from cluster.telemetry.trace_files import SpanRecord, read_spans
from kit.waiting import wait_until
from protos.moelastic.router.v1 import router_pb2 as pb
from router_service.client import RouterClient
from router_service.client_request import DispatchMessages

PARTS = ("client", "gRPC", "router: check, account", "gate", "sort", "dispatch: tasks", "send, receive", "queue", "compute", "combine")
ECHO_AT_ONCE, ECHO_AT_THIS_PACE = "a gRPC echo, call after call", "a gRPC echo, at this pace"
FLUSH_S = 20.0


def profile(rig: Rig) -> Section:
    """The median of each part for each case of one caller."""
    found: dict[str, dict[str, float]] = {}
    for case in (case for case in rig.settings.cases if case.callers == 1 and case.model != WIDE_MODEL):
        traced = _call(rig, case)
        wait_until(lambda known=traced: set(known) <= _ended(rig.trace_dir), "the traces are written", timeout_s=FLUSH_S)
        spans: dict[str, list[SpanRecord]] = {}
        for span in read_spans(rig.trace_dir):
            spans.setdefault(span.trace_id, []).append(span)
        client_s = _client_s(rig, case)
        parts = [parts_of(total_s, client_s, spans[trace_id]) for trace_id, total_s in traced.items()]
        total_s = median(traced.values())
        found[case.name] = {name: median(part[name] for part in parts) for name in PARTS} | {"total": total_s}
        found[case.name] |= {ECHO_AT_ONCE: _echo_s(rig, case, 0.0), ECHO_AT_THIS_PACE: _echo_s(rig, case, total_s)}
    return Section([_table(found)], {"seconds": found})


def _call(rig: Rig, case: Case) -> dict[str, float]:
    """Seconds of each request, by the trace that it asked for; warm-up first."""
    token = read_token(rig.deployment.connection.token_path)
    rows = random_rows(rig.settings.sizes, case.tokens, 0)
    seconds: dict[str, float] = {}
    with RouterClient(rig.deployment.connection.router_address, token=token, timeout_s=30.0) as client:
        for _ in range(rig.settings.profile_calls // 4):
            client.dispatch(rows, model=case.model, layer=LAYER)
        for _ in range(rig.settings.profile_calls):
            trace_id = token_hex(16)
            messages = DispatchMessages(rows, {"model": case.model, "layer": LAYER})
            begun_s = time.perf_counter()
            client._send_whole(messages, 30.0, f"00-{trace_id}-{token_hex(8)}-01")
            seconds[trace_id] = time.perf_counter() - begun_s
    client_s = _client_s(rig, case)
    return {trace_id: total_s + client_s for trace_id, total_s in seconds.items()}


def _echo_s(rig: Rig, case: Case, pause_s: float) -> float:
    """What a Python gRPC echo of as many bytes takes, with a pause between two: cores that slept and caches that others used are part of every request."""
    row = rig.row(ECHO)
    assert isinstance(row, Row)
    seconds = rig.settings.seconds * 2
    command = {"do": "measure", "model": case.model, "callers": 1, "tokens": case.tokens, "seconds": seconds, "warm_up": 3, "pause_s": pause_s}
    return median(row.caller.ask(command)["latencies_s"])


def _client_s(rig: Rig, case: Case) -> float:
    """Making the request message and reading the reply's, without the wire."""
    rows = random_rows(rig.settings.sizes, case.tokens, 0)
    reply = pb.DispatchResponse()
    reply.hidden_states.CopyFrom(DispatchMessages(rows, {"layer": LAYER}).request.hidden_states)
    reply.hidden_states.data = rows.view(np.uint8).tobytes()
    times = []
    for _ in range(rig.settings.profile_calls):
        begun_s = time.perf_counter()
        messages = DispatchMessages(rows, {"model": case.model, "layer": LAYER})
        _ = messages.whole
        messages.reply_of(reply)
        times.append(time.perf_counter() - begun_s)
    return median(times)


def _ended(trace_dir: Path) -> set[str]:
    """Traces of which the root is written; what lies below it was written before, or is of an actor, which flushes as often."""
    names: dict[str, set[str]] = {}
    for span in read_spans(trace_dir):
        names.setdefault(span.trace_id, set()).add(span.name)
    return {trace_id for trace_id, found in names.items() if "moe.request" in found}


def parts_of(total_s: float, client_s: float, spans: Sequence[SpanRecord]) -> dict[str, float]:
    """The disjoint parts of one request, in seconds; they sum to its total."""
    by_name = {name: [span for span in spans if span.name == name] for name in ("moe.request", "moe.gate", "moe.plan", "moe.dispatch", "moe.combine")}
    request = _seconds(by_name["moe.request"])
    gate, sort, combine = (_seconds(by_name[name]) for name in ("moe.gate", "moe.plan", "moe.combine"))
    last = max(by_name["moe.dispatch"], key=lambda span: span.end_ns)
    dispatch = (max(span.end_ns for span in by_name["moe.dispatch"]) - min(span.start_ns for span in by_name["moe.dispatch"])) / 1e9
    queue, compute, transfer = (float(last.attributes[f"moe.{name}"]) for name in ("queue_s", "compute_s", "transfer_s"))
    values = (
        client_s,
        total_s - client_s - request,
        request - gate - sort - dispatch - combine,
        gate,
        sort,
        dispatch - queue - compute - transfer,
        transfer,
        queue,
        compute,
        combine,
    )
    return dict(zip(PARTS, values, strict=True))


def _seconds(spans: Sequence[SpanRecord]) -> float:
    return sum(span.end_ns - span.start_ns for span in spans) / 1e9


def _table(found: dict[str, dict[str, float]]) -> Table:
    rows = [(name, *(f"{1e6 * parts[name]:,.0f}" for parts in found.values())) for name in PARTS]
    rows.append(("sum of the medians", *(f"{1e6 * sum(parts[name] for name in PARTS):,.0f}" for parts in found.values())))
    rows.append(("as the caller saw it", *(f"{1e6 * parts['total']:,.0f}" for parts in found.values())))
    rows += [(name, *(f"{1e6 * parts[name]:,.0f}" for parts in found.values())) for name in (ECHO_AT_ONCE, ECHO_AT_THIS_PACE)]
    note = "Medians; traced, which costs a little itself. The echoes are no parts: they say how much of `gRPC` is gRPC, hot and at the pace of these requests."
    return Table("where the time of one request goes, microseconds", ("part", *found), rows, note)
