"""Spans: one tree, honest sampling, only permitted attributes, bounded files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cluster.core.actor_config import TelemetryConfig
from cluster.telemetry.attributes import ALLOWED, ForbiddenAttribute
from cluster.telemetry.trace_files import last_trace, read_spans
from cluster.telemetry.trace_view import waterfall, write_perfetto
from cluster.telemetry.tracing import Tracing, current_traceparent, is_sampled


def tracing(exporter: InMemorySpanExporter, ratio: float = 1.0) -> Tracing:
    return Tracing(service="router", instance="r0", config=TelemetryConfig(sampling_ratio=ratio), exporters=[exporter], strict=True)


def test_children_join_the_span_around_them() -> None:
    exporter = InMemorySpanExporter()
    tracer = tracing(exporter)
    with tracer.span("outer"), tracer.span("inner"):
        assert current_traceparent()
    tracer.shutdown(5)
    inner, outer = exporter.get_finished_spans()
    assert inner.parent is not None
    assert inner.parent.span_id == outer.context.span_id
    assert inner.context.trace_id == outer.context.trace_id


def test_an_unsampled_root_silences_its_children() -> None:
    exporter = InMemorySpanExporter()
    tracer = tracing(exporter, ratio=0.0)
    for _ in range(100):
        with tracer.span("outer") as outer, tracer.span("inner"):
            assert not outer.is_recording
    tracer.shutdown(5)
    assert exporter.get_finished_spans() == ()


def test_ratio_sampling_keeps_about_its_share_of_whole_traces() -> None:
    exporter = InMemorySpanExporter()
    tracer = tracing(exporter, ratio=0.25)
    for _ in range(2000):
        with tracer.span("outer"), tracer.span("inner"):
            pass
    tracer.shutdown(5)
    spans = exporter.get_finished_spans()
    outer = sum(span.name == "outer" for span in spans)
    assert 300 < outer < 700
    assert len(spans) == 2 * outer


@pytest.mark.parametrize(("flags", "recorded"), [("01", True), ("03", True), ("00", False)])
def test_a_given_parent_decides(flags: str, *, recorded: bool) -> None:
    exporter = InMemorySpanExporter()
    tracer = tracing(exporter, ratio=0.0)
    parent = f"00-{'ab' * 16}-{'cd' * 8}-{flags}"
    assert is_sampled(parent) is recorded
    with tracer.span("server", kind="server", parent=parent):
        pass
    tracer.shutdown(5)
    assert len(exporter.get_finished_spans()) == int(recorded)


def test_a_malformed_parent_starts_no_trace_of_another() -> None:
    exporter = InMemorySpanExporter()
    tracer = tracing(exporter)
    with tracer.span("server", parent="not a traceparent"):
        pass
    tracer.shutdown(5)
    (span,) = exporter.get_finished_spans()
    assert span.parent is None


def test_links_point_at_every_merged_request() -> None:
    exporter = InMemorySpanExporter()
    tracer = tracing(exporter)
    others = [f"00-{number:032x}-{number:016x}-01" for number in range(1, 6)]
    with tracer.span("expert.forward", parent=others[0], links=others[1:]):
        pass
    tracer.shutdown(5)
    (span,) = exporter.get_finished_spans()
    assert [link.context.trace_id for link in span.links] == [2, 3, 4, 5]
    assert span.context.trace_id == 1


@pytest.mark.parametrize("name", ["expert_ids", "tenant", "token", "prompt", "weights"])
def test_what_is_not_on_the_list_raises_in_tests_and_is_dropped_in_production(name: str) -> None:
    assert name not in ALLOWED
    exporter = InMemorySpanExporter()
    strict = tracing(exporter)
    with pytest.raises(ForbiddenAttribute), strict.span("x", attributes={name: 1}):
        pass
    loose = Tracing(service="s", instance="i", config=TelemetryConfig(sampling_ratio=1.0), exporters=[exporter])
    with loose.span("y", attributes={name: 1, "layer": 2}):
        pass
    loose.shutdown(5)
    span = exporter.get_finished_spans()[-1]
    assert dict(span.attributes or {}) == {"moe.layer": 2}


def test_an_error_marks_the_span_by_type_and_never_by_message() -> None:
    exporter = InMemorySpanExporter()
    tracer = tracing(exporter)
    with pytest.raises(ValueError, match="secret"), tracer.span("x"):
        int("secret payload")
    tracer.shutdown(5)
    (span,) = exporter.get_finished_spans()
    assert not span.status.is_ok
    assert "secret" not in span.to_json()


def test_files_read_back_as_one_tree_and_open_as_perfetto(tmp_path: Path) -> None:
    router = Tracing(service="router", instance="r0", config=TelemetryConfig(sampling_ratio=1.0, trace_dir=tmp_path), node_id="n1")
    actor = Tracing(service="expert", instance="e0", config=TelemetryConfig(sampling_ratio=0.0, trace_dir=tmp_path), node_id="n2")
    with router.span("Dispatch", kind="server", attributes={"tokens": 8}), router.span("moe.dispatch", kind="client") as dispatch:
        dispatch.event("failover", reason="reset")
        with actor.span("expert.forward", kind="server", parent=dispatch.traceparent, attributes={"compute_s": 0.002}):
            pass
    router.shutdown(5)
    actor.shutdown(5)
    trace = last_trace(read_spans(tmp_path))
    assert [span.name for span in trace] == ["Dispatch", "moe.dispatch", "expert.forward"]
    assert [span.node_id for span in trace] == ["n1", "n1", "n2"]
    assert trace[1].events[0][1] == "failover"
    table = waterfall(trace)
    assert table.row_count == 3
    write_perfetto(trace, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == 3
    assert sorted(event["ph"] for event in events if event["ph"] in "sf") == ["f", "s"]


def test_a_merged_forward_is_shown_in_each_linked_trace(tmp_path: Path) -> None:
    tracer = Tracing(service="router", instance="r0", config=TelemetryConfig(sampling_ratio=1.0, trace_dir=tmp_path))
    with tracer.span("one") as one:
        pass
    with tracer.span("two") as two:
        pass
    with tracer.span("expert.forward", parent=one.traceparent, links=[two.traceparent]):
        pass
    tracer.shutdown(5)
    names = {span.name for span in last_trace(read_spans(tmp_path), root="two")}
    assert names == {"two", "expert.forward"}


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    tracer = Tracing(service="router", instance="r0", config=TelemetryConfig(sampling_ratio=1.0, trace_dir=tmp_path))
    with tracer.span("one"):
        pass
    tracer.shutdown(5)
    (file,) = tmp_path.glob("*.jsonl")
    file.write_text(file.read_text() + '{"resourceSpans":[{"resou')
    assert [span.name for span in read_spans(tmp_path)] == ["one"]


def test_trace_files_keep_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.telemetry.tracing.MAX_FILE_BYTES", 4096)
    tracer = Tracing(service="router", instance="r0", config=TelemetryConfig(sampling_ratio=1.0, trace_dir=tmp_path))
    for _ in range(40):
        with tracer.span("one"):
            pass
        tracer.flush(5)
    tracer.shutdown(5)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * 4096
    assert len(list(tmp_path.iterdir())) == 2


def test_trace_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    tracer = Tracing(service="router", instance="r0", config=TelemetryConfig(sampling_ratio=1.0, trace_dir=folder))
    tracer.shutdown(5)
    (file,) = folder.iterdir()
    assert [path.stat().st_mode & 0o777 for path in (folder, file)] == [0o700, 0o600]


def test_a_trace_folder_that_cannot_be_made_costs_a_warning_and_no_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    config = TelemetryConfig(sampling_ratio=1.0, trace_dir=tmp_path / "file" / "traces")
    tracer = Tracing(service="router", instance="r0", config=config)
    with tracer.span("one") as span:
        assert not span.is_recording
    tracer.shutdown(5)
    assert [record.message.split(":")[0] for record in caplog.records] == ["telemetry.trace_dir"]


def test_a_disk_that_takes_no_more_spans_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.telemetry.tracing.MAX_FILE_BYTES", 16)
    folder = tmp_path / "traces"
    tracer = Tracing(service="router", instance="r0", config=TelemetryConfig(sampling_ratio=1.0, trace_dir=folder))
    (folder / next(folder.iterdir()).name).unlink()
    folder.rmdir()
    for _ in range(3):
        with tracer.span("one"):
            pass
        tracer.flush(5)
    tracer.shutdown(5)
    assert [record.message.split(":")[0] for record in caplog.records] == ["telemetry.trace_dir"]


def test_an_exporter_that_cannot_be_made_costs_a_warning_and_no_start(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    Tracing(service="router", instance="r0", config=TelemetryConfig(otlp_endpoint="http://127.0.0.1:1")).shutdown(5)
    assert [record.message.split(":")[0] for record in caplog.records] == ["telemetry.otlp_endpoint"]


@pytest.mark.parametrize("named", [True, False])
def test_an_actor_is_named_only_where_the_config_says_so(*, named: bool) -> None:
    exporter = InMemorySpanExporter()
    config = TelemetryConfig(sampling_ratio=1.0, actor_spans=named)
    tracer = Tracing(service="router", instance="r0", config=config, exporters=[exporter], strict=True)
    with tracer.span("moe.dispatch", attributes={"actor_id": "actor-3", "layer": 1}) as span:
        span.set(generation=7)
        span.event("failover", actor_id="actor-3")
    tracer.shutdown(5)
    (kept,) = exporter.get_finished_spans()
    names = {"moe.actor_id", "moe.generation"} if named else set()
    assert set(kept.attributes) == {"moe.layer", *names}
    assert bool(kept.events[0].attributes) is named


def test_a_collector_that_is_away_costs_one_warning_and_neither_start_nor_stop(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.telemetry.tracing._FIRST_ONLY.has_passed", False)
    tracer = Tracing(service="router", instance="r0", config=TelemetryConfig(sampling_ratio=1.0, otlp_endpoint="http://127.0.0.1:1"))
    with tracer.span("one") as span:
        assert span.is_recording
    tracer.shutdown(1)
    assert len([record for record in caplog.records if record.name.startswith("opentelemetry.exporter.otlp")]) == 1
