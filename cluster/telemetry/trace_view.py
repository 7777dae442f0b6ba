"""A trace for people: a waterfall on the terminal, and Chrome JSON that opens in Perfetto."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from cluster.telemetry.trace_files import SpanRecord

BAR_WIDTH = 40
_NOTES = (
    ("moe.layer", "layer {}"),
    ("moe.tokens", "{} tokens"),
    ("moe.bytes_sent", "{} B out"),
    ("moe.bytes_received", "{} B in"),
    ("moe.queue_s", "queue {:.2f} ms"),
    ("moe.transfer_s", "transfer {:.2f} ms"),
    ("moe.compute_s", "compute {:.2f} ms"),
    ("moe.merged_requests", "merged {}"),
    ("moe.role", "{}"),
    ("moe.attempt", "attempt {}"),
    ("rpc.response.status_code", "{}"),
    ("error.type", "{}"),
)


def waterfall(spans: Sequence[SpanRecord]) -> Table:
    """One row a span, children below their parents, bars on one time axis; where it ran, and where its time went."""
    begin = min(span.start_ns for span in spans)
    total = max(1, max(span.end_ns for span in spans) - begin)
    table = Table(title=f"trace {spans[0].trace_id}   {total / 1e6:.2f} ms", title_justify="left", box=None, pad_edge=False)
    for column in ("span", "where", "ms", "", "what"):
        table.add_column(column, justify="right" if column == "ms" else "left", no_wrap=True)
    for depth, span in _tree(spans):
        style = "red" if span.failed else "cyan" if span.name.startswith("expert.") else ""
        table.add_row(
            Text("  " * depth + span.name, style=style),
            _where(span),
            f"{span.duration_ms:.2f}",
            Text(_bar(span, begin, total), style=style or "green"),
            ", ".join(_what(span)),
        )
    return table


def _where(span: SpanRecord) -> str:
    node = f"@{span.node_id[:8]}" if span.node_id else ""
    return f"{span.instance}{node}"


def _what(span: SpanRecord) -> list[str]:
    notes = []
    for key, form in _NOTES:
        value = span.attributes.get(key)
        if value is None or (key == "moe.attempt" and value == 0):
            continue
        notes.append(form.format(float(value) * 1e3 if key.endswith("_s") else value))
    notes.extend(name for _, name in span.events)
    return notes


def _bar(span: SpanRecord, begin: int, total: int) -> str:
    left = int((span.start_ns - begin) / total * BAR_WIDTH)
    width = max(1, round((span.end_ns - span.start_ns) / total * BAR_WIDTH))
    return (" " * left + "█" * width)[:BAR_WIDTH]


def _tree(spans: Sequence[SpanRecord]) -> list[tuple[int, SpanRecord]]:
    known = {span.span_id for span in spans}
    children: dict[str, list[SpanRecord]] = {}
    for span in spans:
        anchor = span.parent_id if span.parent_id in known else next((link[1] for link in span.links if link[1] in known), "")
        children.setdefault(anchor, []).append(span)
    rows: list[tuple[int, SpanRecord]] = []
    stack = [(0, span) for span in sorted(children.get("", []), key=lambda entry: -entry.start_ns)]
    seen: set[str] = set()
    while stack:
        depth, span = stack.pop()
        if span.span_id in seen:
            continue
        seen.add(span.span_id)
        rows.append((depth, span))
        stack.extend((depth + 1, child) for child in sorted(children.get(span.span_id, []), key=lambda entry: -entry.start_ns))
    return rows


def write_perfetto(spans: Sequence[SpanRecord], path: Path) -> None:
    """Chrome trace JSON: a row group a node, rows for each actor split into lanes so that events nest, arrows from a dispatch to its forward."""
    nodes = {node: number for number, node in enumerate(sorted({span.node_id for span in spans}), start=1)}
    lanes = _lanes(spans)
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": number, "args": {"name": f"node {node[:8] or 'client'}"}} for node, number in nodes.items()
    ]
    lane_ids = {key: number for number, key in enumerate(sorted(set(lanes.values())), start=1)}
    events.extend(
        {"ph": "M", "name": "thread_name", "pid": nodes[node], "tid": number, "args": {"name": f"{instance} {lane}".strip()}}
        for (node, instance, lane), number in lane_ids.items()
    )
    by_id = {span.span_id: span for span in spans}
    for span in spans:
        place = {"pid": nodes[span.node_id], "tid": lane_ids[lanes[span.span_id]]}
        start_us, length_us = span.start_ns / 1e3, (span.end_ns - span.start_ns) / 1e3
        events.append({"ph": "X", "name": span.name, "cat": "moe", "ts": start_us, "dur": length_us, "args": span.attributes, **place})
        sources = [span.parent_id] if span.parent_id else []
        for source in (by_id[key] for key in [*sources, *(link[1] for link in span.links)] if key in by_id):
            if source.instance != span.instance:
                flow = {"name": "link", "cat": "moe", "id": f"{source.span_id}{span.span_id}"}
                events.append({"ph": "s", "ts": source.start_ns / 1e3, "pid": nodes[source.node_id], "tid": lane_ids[lanes[source.span_id]], **flow})
                events.append({"ph": "f", "bp": "e", "ts": start_us, **place, **flow})
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _lanes(spans: Sequence[SpanRecord]) -> dict[str, tuple[str, str, int]]:
    """The row of each span: the first lane of its process in which it overlaps nothing, or lies wholly inside what is open there."""
    open_ends: dict[tuple[str, str], list[list[int]]] = {}
    chosen: dict[str, tuple[str, str, int]] = {}
    for span in sorted(spans, key=lambda entry: (entry.start_ns, -entry.end_ns)):
        process = open_ends.setdefault((span.node_id, span.instance), [])
        for lane, stack in enumerate([*process, []]):
            while stack and stack[-1] <= span.start_ns:
                stack.pop()
            if not stack or span.end_ns <= stack[-1]:
                if lane == len(process):
                    process.append(stack)
                stack.append(span.end_ns)
                chosen[span.span_id] = (span.node_id, span.instance, lane)
                break
    return chosen
