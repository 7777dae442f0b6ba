"""The spans of a call: who was asked, how much went where, and nothing that a span may not carry."""

from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cluster.core.actor_config import TelemetryConfig
from cluster.core.errors import ReplicaUnavailable
from cluster.telemetry.tracing import Tracing
from kit.lanes import copy_on
from kit.pipelines import K, T, call, setup, version_of
from router_service import pipeline as pipeline_module


def _tracing(exporter: InMemorySpanExporter) -> Tracing:
    return Tracing(service="router", instance="r0", config=TelemetryConfig(sampling_ratio=1.0, actor_spans=True), exporters=[exporter], strict=True)


def _named(spans: Sequence[ReadableSpan], name: str) -> list[ReadableSpan]:
    return [span for span in spans if span.name == name]


async def _traced_call(tracing: Tracing, **options: object) -> None:
    made = setup(lambda _, index: [copy_on(f"a{index % 2}", version_of(index)), copy_on("spare", version_of(index))], tracing=tracing)
    made.lanes.queued["spare"] = 1
    if options.get("broken"):
        made.lanes.break_actor("a1", ReplicaUnavailable("reset"))
    with tracing.span("moe.request", kind="server"):
        await made.pipeline.run(call())


async def test_a_call_has_one_dispatch_span_for_each_actor_below_its_own_span() -> None:
    exporter = InMemorySpanExporter()
    tracing = _tracing(exporter)
    await _traced_call(tracing)
    tracing.shutdown(5)
    spans = exporter.get_finished_spans()
    root = _named(spans, "moe.request")[0]
    assert {span.name for span in spans} == {"moe.request", "moe.gate", "moe.plan", "moe.dispatch", "moe.combine"}
    assert all(span.parent.span_id == root.context.span_id for span in spans if span is not root)
    dispatches = _named(spans, "moe.dispatch")
    assert sorted(span.attributes["moe.actor_id"] for span in dispatches) == ["a0", "a1"]
    assert sum(span.attributes["moe.tokens"] for span in dispatches) == T * K
    assert {span.attributes["moe.attempt"] for span in dispatches} == {0}


async def test_a_failover_is_an_event_and_a_span_below_the_try_it_replaces() -> None:
    exporter = InMemorySpanExporter()
    tracing = _tracing(exporter)
    await _traced_call(tracing, broken=True)
    tracing.shutdown(5)
    dispatches = _named(exporter.get_finished_spans(), "moe.dispatch")
    first = next(span for span in dispatches if span.attributes["moe.actor_id"] == "a1")
    retries = [span for span in dispatches if span.attributes["moe.attempt"] == 1]
    assert {event.name for event in first.events} == {"failover"}
    assert {event.attributes["moe.reason"] for event in first.events} == {"REPLICA_UNAVAILABLE"}
    assert len(retries) == len(first.events) > 0
    assert all(span.parent.span_id == first.context.span_id for span in retries)


async def test_the_span_context_reaches_the_actor_and_survives_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_module, "THREAD_BYTES", 0)
    exporter = InMemorySpanExporter()
    tracing = _tracing(exporter)
    made = setup(tracing=tracing)
    with tracing.span("moe.request", kind="server") as root:
        await made.pipeline.run(call())
    tracing.shutdown(5)
    dispatched = {f"{span.context.span_id:016x}" for span in _named(exporter.get_finished_spans(), "moe.dispatch")}
    assert {request.traceparent.split("-")[2] for request in made.lanes.requests} == dispatched
    trace_id = root.traceparent.split("-")[1]
    assert {f"{span.context.trace_id:032x}" for span in exporter.get_finished_spans()} == {trace_id}


async def test_a_given_parent_holds_for_all_spans_of_the_call() -> None:
    exporter = InMemorySpanExporter()
    tracing = _tracing(exporter)
    made = setup(tracing=tracing)
    await made.pipeline.run(call(traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01"))
    tracing.shutdown(5)
    spans = exporter.get_finished_spans()
    assert len(spans) >= 4
    assert {f"{span.parent.span_id:016x}" for span in spans} == {"b" * 16}


async def test_without_a_recorder_segments_carry_no_context() -> None:
    made = setup()
    await made.pipeline.run(call())
    assert {request.traceparent for request in made.lanes.requests} == {None}
