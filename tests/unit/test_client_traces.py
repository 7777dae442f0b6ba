from __future__ import annotations

from typing import Any

import grpc
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import use_span

from cluster.core.actor_config import TelemetryConfig
from cluster.telemetry.tracing import Tracing
from kit.router import LAYER, TOKEN, router
from protos.moelastic.router.v1 import router_pb2 as pb
from router_service.wire import tensor_message


def recording() -> tuple[Tracing, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    return Tracing(service="t", instance="0", config=TelemetryConfig(sampling_ratio=1.0), strict=True, exporters=[exporter]), exporter


def span_named(tracing: Tracing, exporter: InMemorySpanExporter, name: str) -> Any:
    tracing.flush(5)
    return next(span for span in exporter.get_finished_spans() if span.name == name)


@pytest.mark.parametrize("trusted", [frozenset({"default"}), frozenset()], ids=["trusted", "untrusted"])
async def test_a_callers_trace_is_joined_for_a_trusted_tenant_and_linked_for_another(trusted: frozenset[str]) -> None:
    tracing, exporter = recording()
    own, own_exporter = recording()
    async with router(tracing=tracing, trusted=trusted) as rig, rig.client(tracing=own) as client:
        await client.dispatch(rig.rows(), layer=LAYER)
    server, caller = span_named(tracing, exporter, "moe.request"), span_named(own, own_exporter, "moe.client")
    linked = [link.context.span_id for link in server.links]
    if trusted:
        assert server.parent.span_id == caller.context.span_id
        assert server.context.trace_id == caller.context.trace_id
    else:
        assert linked == [caller.context.span_id]
        assert server.context.trace_id != caller.context.trace_id
    assert server.attributes["moe.tokens"] == 5
    assert span_named(tracing, exporter, "moe.combine").context.trace_id == server.context.trace_id


async def test_the_callers_own_opentelemetry_context_is_passed_on() -> None:
    tracing, exporter = recording()
    span = TracerProvider().get_tracer("caller").start_span("work")
    async with router(tracing=tracing, trusted=frozenset({"default"})) as rig, rig.client() as client:
        with use_span(span):
            await client.dispatch(rig.rows(), layer=LAYER)
    assert span_named(tracing, exporter, "moe.request").parent.span_id == span.get_span_context().span_id


async def test_a_trace_context_that_is_none_is_ignored() -> None:
    tracing, exporter = recording()
    metadata = (("authorization", f"Bearer {TOKEN}"), ("traceparent", "00-zz-1-01"))
    async with router(tracing=tracing, trusted=frozenset({"default"})) as rig, grpc.aio.insecure_channel(rig.address) as channel:
        message = pb.DispatchRequest(model="tiny", layer=LAYER, hidden_states=tensor_message(rig.rows())).SerializeToString()
        await channel.unary_unary("/moelastic.router.v1.RouterService/Dispatch")(message, metadata=metadata, timeout=10)
    span = span_named(tracing, exporter, "moe.request")
    assert span.parent is None
    assert not span.links
