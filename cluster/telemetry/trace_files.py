"""Reading the OTLP/JSON files that `telemetry.trace_dir` collects: one file per process, one line per batch, bounded in what is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_READ_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """One finished span as it was written. Times are nanoseconds since the Unix epoch; attributes carry their full names."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    start_ns: int
    end_ns: int
    attributes: dict[str, str | int | float | bool]
    events: tuple[tuple[int, str], ...]
    links: tuple[tuple[str, str], ...]
    failed: bool
    service: str
    instance: str
    node_id: str

    @property
    def duration_ms(self) -> float:
        """Milliseconds from start to end."""
        return (self.end_ns - self.start_ns) / 1e6


def read_spans(trace_dir: Path) -> list[SpanRecord]:
    """Every span in the folder's files, newest files first, up to `MAX_READ_BYTES`; a torn last line is passed over."""
    spans: list[SpanRecord] = []
    budget = MAX_READ_BYTES
    for path in sorted(trace_dir.glob("*.jsonl*"), key=lambda entry: entry.stat().st_mtime, reverse=True):
        budget -= path.stat().st_size
        if budget < 0:
            break
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                spans.extend(_spans_of(line))
    return spans


def last_trace(spans: Iterable[SpanRecord], *, root: str | None = None) -> list[SpanRecord]:
    """The spans of the trace that ended last (of those whose root has this name, when given), with spans of merged frames that link to it."""
    by_trace: dict[str, list[SpanRecord]] = {}
    for span in spans:
        by_trace.setdefault(span.trace_id, []).append(span)
    candidates = {trace_id: group for trace_id, group in by_trace.items() if root is None or any(span.name == root and not span.parent_id for span in group)}
    if not candidates:
        return []
    chosen = max(candidates, key=lambda trace_id: max(span.end_ns for span in candidates[trace_id]))
    linked = [span for trace_id, group in by_trace.items() if trace_id != chosen for span in group if any(link[0] == chosen for link in span.links)]
    return sorted([*candidates[chosen], *linked], key=lambda span: span.start_ns)


def _spans_of(line: str) -> Iterator[SpanRecord]:
    try:
        document = json.loads(line)
    except json.JSONDecodeError:
        return
    for group in document.get("resourceSpans", ()):
        resource = _attributes(group.get("resource", {}).get("attributes", ()))
        for scope in group.get("scopeSpans", ()):
            for span in scope.get("spans", ()):
                yield _record(span, resource)


def _record(span: dict[str, Any], resource: dict[str, Any]) -> SpanRecord:
    return SpanRecord(
        trace_id=span["traceId"],
        span_id=span["spanId"],
        parent_id=span.get("parentSpanId", ""),
        name=span["name"],
        start_ns=int(span["startTimeUnixNano"]),
        end_ns=int(span["endTimeUnixNano"]),
        attributes=_attributes(span.get("attributes", ())),
        events=tuple((int(event["timeUnixNano"]), event["name"]) for event in span.get("events", ())),
        links=tuple((link["traceId"], link["spanId"]) for link in span.get("links", ())),
        failed=span.get("status", {}).get("code") in (2, "STATUS_CODE_ERROR"),
        service=str(resource.get("service.name", "")),
        instance=str(resource.get("service.instance.id", "")),
        node_id=str(resource.get("ray.node_id", "")),
    )


def _attributes(entries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for entry in entries:
        kind, value = next(iter(entry["value"].items()))
        values[entry["key"]] = int(value) if kind == "intValue" else value
    return values
