"""Series: frozen names, bounded labels, a loopback port."""

from __future__ import annotations

import urllib.request

from cluster.core.errors import Overloaded
from cluster.telemetry.metrics import OUTCOMES, RouterMetrics
from router_service.counters import Counters
from router_service.errors import code_of

NAMES = {
    "moe_requests_total",
    "moe_request_duration_seconds_count",
    "moe_wave_calls_count",
    "moe_wave_wait_seconds_count",
    "moe_choices_total",
    "moe_tokens_total",
    "moe_ejections_total",
    "moe_link_bytes_total",
    "moe_redispatches_total",
    "moe_queue_age_seconds",
    "moe_queued_tokens",
    "moe_requests_in_flight",
    "moe_admitted_bytes",
    "moe_expert_replicas",
    "moe_experts_missing",
    "moe_table_epoch",
    "moe_links_ready",
    "moe_build_info",
}


def test_names_are_frozen_and_served_on_loopback() -> None:
    metrics = RouterMetrics(version="1")
    metrics.request_finished("m", 0, "OK", 0.01, dict.fromkeys(OUTCOMES, 2), tokens=8)
    metrics.wave_departed([0.0, 0.003])
    metrics.link_bytes("sent", 100)
    metrics.redispatched("reset")
    metrics.queues(oldest_age_s=0.1, tokens=3, links_ready=2)
    metrics.requests_in_flight(1, 10)
    metrics.table(epoch=4, replicas={"m": 8}, missing={"m": 0})
    port = metrics.serve("127.0.0.1", 0)
    try:
        body = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    finally:
        metrics.close()
    served = {line.split("{")[0].split(" ")[0] for line in body.splitlines() if not line.startswith("#")}
    assert served >= NAMES
    assert 'moe_choices_total{model="m",outcome="exact"} 2.0' in body
    assert "moe_expert_tokens_total{" not in body, "per-expert load is off unless asked for"


def test_a_model_that_left_the_table_has_no_series_any_more() -> None:
    metrics = RouterMetrics()
    metrics.table(epoch=1, replicas={"a": 8, "b": 4}, missing={"a": 0, "b": 2})
    metrics.table(epoch=2, replicas={"a": 0}, missing={"a": 8})
    values = {name: metrics.registry.get_sample_value("moe_expert_replicas", {"model": name}) for name in ("a", "b")}
    assert values == {"a": 0.0, "b": None}
    assert metrics.registry.get_sample_value("moe_experts_missing", {"model": "b"}) is None


def test_the_first_loss_of_several_is_kept_beside_the_last() -> None:
    metrics = RouterMetrics()
    for why, now_s in (("lost", 10.0), ("lost", 10.3), ("ejected", 10.5), ("lost", 11.2)):
        metrics.distrusted(why, now_s)
    read = metrics.registry.get_sample_value
    assert read("moe_first_distrust_seconds") == 10.0
    assert (read("moe_last_distrust_seconds", {"why": "lost"}), read("moe_last_distrust_seconds", {"why": "ejected"})) == (11.2, 10.5)
    metrics.distrusted("ejected", 12.2)
    assert read("moe_first_distrust_seconds") == 12.2


def test_a_refused_call_is_counted_and_has_no_duration() -> None:
    metrics = RouterMetrics()
    counters = Counters(lambda: 0.0, metrics)
    counters.refused(code_of(Overloaded("full", retry_after_s=1.0)).name)
    assert metrics.registry.get_sample_value("moe_requests_total", {"model": "", "layer": "-1", "code": "RESOURCE_EXHAUSTED"}) == 1.0
    assert metrics.registry.get_sample_value("moe_request_duration_seconds_count", {"model": "", "layer": "-1"}) is None
    assert (counters.requests_total, counters.requests_failed) == (1, 1)
