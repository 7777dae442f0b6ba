"""What a traced request leaves behind: one trace from client to actors with the right parents, and nothing that tells a payload, a secret or an expert.

Shape legend: T rows, D model width, K choices per row.
"""

import base64
import struct
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cluster.core.actor_config import TelemetryConfig
from cluster.telemetry.trace_files import SpanRecord, read_spans
from cluster.telemetry.tracing import Tracing
from kit.in_process import CONTROL_TOKEN, LINK_SECRET, TOKEN, in_process_cluster
from kit.models import HIDDEN, save_tiny

T, NAME = 12, "traced"
CANARY = 1234.5
# Times and sizes of things that have nothing to do with who computes; all else of a span may be compared.
VARYING = {"moe.queue_s", "moe.compute_s", "moe.transfer_s"}
EXPERTS_A, EXPERTS_B = (0, 1), (6, 3)


@dataclass
class Left:
    """What was left behind: spans, and every text that anybody could read."""

    spans: list[SpanRecord]
    traces: dict[str, list[SpanRecord]]
    texts: dict[str, str]
    metrics: dict[str, str]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Left:
    """Two requests alike in all but the experts that were chosen, one on each actor; the cluster is down, so all files are whole."""
    root = tmp_path_factory.mktemp("traced")
    folder, trace_dir = save_tiny("mixtral", root / "model", torch.bfloat16), root / "traces"
    tracing = Tracing(service="client", instance="test", config=TelemetryConfig(sampling_ratio=1.0, trace_dir=trace_dir), strict=True)
    rows_TD = torch.full((T, HIDDEN), CANARY, dtype=torch.bfloat16)
    traceparents, metrics = {}, {}
    cluster_of_two = in_process_cluster({NAME: folder}, root / "cluster", num_actors=2, trace_dir=trace_dir, actor_spans=True)
    with cluster_of_two as cluster, cluster.client(tracing=tracing) as client:
        for label, experts in (("a", EXPERTS_A), ("b", EXPERTS_B)):
            ids_TK = torch.tensor([experts] * T, dtype=torch.int32)
            with tracing.span("moe.layer", attributes={"layer": 0}) as span:
                client.dispatch(rows_TD, model=NAME, layer=0, top_k=(ids_TK, torch.ones(T, 2)), report="plan")
            traceparents[label] = span.traceparent
            with urllib.request.urlopen(f"http://127.0.0.1:{cluster.metrics_port}/metrics", timeout=10) as page:
                metrics[label] = page.read().decode()
    tracing.shutdown(5)
    spans = read_spans(trace_dir)
    traces = {label: [span for span in spans if span.trace_id == traceparent.split("-")[1]] for label, traceparent in traceparents.items()}
    texts = {path.name: path.read_text() for path in trace_dir.iterdir()} | {f"metrics {label}": text for label, text in metrics.items()}
    return Left(spans, traces, texts, metrics)


def test_one_trace_leads_from_the_client_over_the_router_to_the_actor(left: Left) -> None:
    for trace in left.traces.values():
        by_id = {span.span_id: span for span in trace}
        parents = {(span.name, by_id[span.parent_id].name if span.parent_id else "") for span in trace}
        assert parents == {
            ("moe.layer", ""),
            ("moe.client", "moe.layer"),
            ("moe.request", "moe.client"),
            ("moe.plan", "moe.request"),
            ("moe.dispatch", "moe.request"),
            ("moe.combine", "moe.request"),
            ("expert.forward", "moe.dispatch"),
        }
        assert [span.service for span in sorted(trace, key=lambda span: span.start_ns)][:3] == ["client", "client", "router"]
    assert {span.trace_id for span in left.spans if span.name != "moe.client"} == {trace[0].trace_id for trace in left.traces.values()}


def test_spans_say_where_and_how_much_and_children_lie_within_their_parents(left: Left) -> None:
    for trace in left.traces.values():
        by_id = {span.span_id: span for span in trace}
        forwards = [span for span in trace if span.name == "expert.forward"]
        assert {(span.service, span.instance, span.node_id) for span in forwards} == {("expert", f"actor-{n}/g{n + 1}", f"node-of-actor-{n}") for n in (0, 1)}
        for forward in forwards:
            dispatch = by_id[forward.parent_id]
            assert dispatch.attributes["moe.actor_id"] == forward.attributes["moe.actor_id"] == forward.instance.partition("/")[0]
            assert dispatch.attributes["moe.tokens"] == forward.attributes["moe.tokens"] == T
            assert dispatch.attributes["moe.bytes_sent"] == forward.attributes["moe.bytes_received"] == T * HIDDEN * 2
        for span in trace:
            parent = by_id.get(span.parent_id)
            assert parent is None or (parent.start_ns <= span.start_ns and span.end_ns <= parent.end_ns)


def test_no_secret_and_no_payload_occurs_in_traces_or_metrics(left: Left) -> None:
    row = torch.full((HIDDEN,), CANARY, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    fp32 = struct.pack("<f", CANARY) * 4
    secrets = [secret for value in (LINK_SECRET, CONTROL_TOKEN) for secret in (value.decode(), value.hex(), base64.b64encode(value).decode())]
    canaries = [TOKEN, *secrets, "1234.5", row[:8].hex(), base64.b64encode(row[:9]).decode(), fp32.hex(), "Bearer"]
    assert len(left.texts) == 6
    for name, text in left.texts.items():
        assert text
        for canary in canaries:
            assert canary.lower() not in text.lower(), name


def test_traces_are_the_same_whichever_experts_were_chosen(left: Left) -> None:
    """The two requests differ in their experts alone: what is left of them, times aside, does not."""
    facts = {
        label: Counter((span.name, tuple(sorted((key, value) for key, value in span.attributes.items() if key not in VARYING))) for span in trace)
        for label, trace in left.traces.items()
    }
    assert facts["a"] == facts["b"]
    assert facts["a"].total() == 9


def _without_times_and_ids(span: SpanRecord) -> tuple[object, ...]:
    attributes = tuple(sorted((key, value) for key, value in span.attributes.items() if key not in VARYING | {"moe.node_id"}))
    return span.name, attributes, tuple(name for _, name in span.events), len(span.links), span.failed, span.service, span.instance


def test_where_each_actor_holds_one_expert_a_trace_tells_no_more_of_the_choice_than_the_node(tmp_path: Path) -> None:
    """Two requests that differ only in their experts leave equal spans, times and ids left out; no file or attribute names an actor."""
    folder, trace_dir = save_tiny("mixtral", tmp_path / "model", torch.bfloat16), tmp_path / "traces"
    tracing = Tracing(service="client", instance="test", config=TelemetryConfig(sampling_ratio=1.0, trace_dir=trace_dir), strict=True)
    traces = []
    one_actor_per_expert = in_process_cluster({NAME: folder}, tmp_path / "cluster", num_actors=8, trace_dir=trace_dir)
    with one_actor_per_expert as cluster, cluster.client(tracing=tracing) as client:
        for experts in (EXPERTS_A, EXPERTS_B):
            with tracing.span("moe.layer", attributes={"layer": 0}) as span:
                client.dispatch(
                    torch.ones(1, HIDDEN, dtype=torch.bfloat16), model=NAME, layer=0, top_k=(torch.tensor([experts], dtype=torch.int32), torch.ones(1, 2))
                )
            traces.append(span.traceparent.split("-")[1])
    tracing.shutdown(5)
    spans = read_spans(trace_dir)
    first, second = ([_without_times_and_ids(span) for span in spans if span.trace_id == trace_id] for trace_id in traces)
    assert Counter(first) == Counter(second)
    assert Counter(name for name, *_ in first)["moe.dispatch"] == len(EXPERTS_A)
    assert {span.service for span in spans} == {"client", "router"}
    for path in trace_dir.iterdir():
        assert "actor-" not in path.name + path.read_text().replace("node-of-actor-", "")


def test_metrics_name_no_expert(left: Left) -> None:
    series = {label: {line.partition(" ")[0] for line in text.splitlines() if line and not line.startswith("#")} for label, text in left.metrics.items()}
    assert any(name.startswith("moe_requests_total") for name in series["a"])
    assert series["a"] == series["b"]
    assert not [name for name in series["a"] if "expert=" in name]
