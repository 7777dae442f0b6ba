"""What a router counts, as Prometheus series. One place for every instrument: name, unit, labels, why. Labels are bounded: models, layers, codes, outcomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

NO_LAYER: Final = "-1"
OUTCOMES: Final = ("exact", "shadow", "omitted", "generalist", "dense", "dropped", "unused")
_LATENCY_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_BURST_S: Final = 1.0  # actors of one GPU or node are lost one after the other
_WAVE_BUCKETS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class RouterMetrics:
    """The series of one router process, in a registry of its own."""

    def __init__(self, *, version: str = "") -> None:
        self.registry = CollectorRegistry()
        self._shown: dict[str, set[str]] = {}
        registry = self.registry
        self._requests = Counter("moe_requests", "Requests ended, by gRPC status code", ["model", "layer", "code"], registry=registry)
        self._ended: dict[tuple[str, int, str], tuple[Counter, Histogram]] = {}
        self._duration = Histogram("moe_request_duration_seconds", "From admission to reply", ["model", "layer"], registry=registry, buckets=_LATENCY_BUCKETS_S)
        self._wave_calls = Histogram("moe_wave_calls", "Calls that shared a dispatch", registry=registry, buckets=_WAVE_BUCKETS)
        self._wave_wait = Histogram(
            "moe_wave_wait_seconds", "How long a call waited for its dispatch to depart", registry=registry, buckets=(0.0, *_LATENCY_BUCKETS_S[:8])
        )
        self._choices = Counter("moe_choices", "(token, choice) pairs by how they ended", ["model", "outcome"], registry=registry)
        self._choice_series: dict[tuple[str, ...], Counter] = {}
        self._token_series: dict[tuple[str, ...], Counter] = {}
        self._tokens = Counter("moe_tokens", "Tokens of requests that succeeded", ["model"], registry=registry)
        self._bytes = Counter("moe_link_bytes", "Row bytes over expert links, those of every try", ["direction"], registry=registry)
        self._bytes_by_direction = {direction: self._bytes.labels(direction) for direction in ("sent", "received")}  # looked up once, counted often
        self._retries = Counter("moe_redispatches", "Segments sent again to another copy", ["reason"], registry=registry)
        self._ejections = Counter("moe_ejections", "Expert actors that get no rows because they were lost or made no progress", registry=registry)
        self._distrusted = Gauge(
            "moe_last_distrust_seconds", "When an actor was last lost or ejected, on the machine's monotonic clock", ["why"], registry=registry
        )
        self._first_distrusted = Gauge(
            "moe_first_distrust_seconds", "When the first actor of the last such losses or ejections was, a second or more after any other", registry=registry
        )
        self._last_distrust_s = float("-inf")
        self._queue_age = Gauge("moe_queue_age_seconds", "Age of the oldest row that waits for a frame", registry=registry)
        self._queued = Gauge("moe_queued_tokens", "Rows that wait for a frame", registry=registry)
        self._inflight = Gauge("moe_requests_in_flight", "Requests admitted and not yet ended", registry=registry)
        self._inflight_bytes = Gauge("moe_admitted_bytes", "Bytes of request messages held", registry=registry)
        self._replicas = Gauge("moe_expert_replicas", "Published copies, all experts of a model together", ["model"], registry=registry)
        self._missing = Gauge("moe_experts_missing", "Experts of a model without a copy", ["model"], registry=registry)
        self._epoch = Gauge("moe_table_epoch", "Epoch of the routing table in use", registry=registry)
        self._links = Gauge("moe_links_ready", "Expert links that are ready", registry=registry)
        self._load = Counter("moe_expert_tokens", "Rows by expert; for operators, off by default", ["model", "layer", "expert"], registry=registry)
        Gauge("moe_build_info", "Always 1", ["version"], registry=registry).labels(version).set(1)

    def ejected(self) -> None:
        """Count one ejection."""
        self._ejections.inc()

    def distrusted(self, why: str, now_s: float) -> None:
        """Note when an actor was `lost` or `ejected`; `now_s` is monotonic."""
        self._distrusted.labels(why).set(now_s)
        if now_s - self._last_distrust_s >= _BURST_S:
            self._first_distrusted.set(now_s)
        self._last_distrust_s = now_s

    def request_refused(self, code: str) -> None:
        """Count one call that was refused before its handler: it has no model, and no duration that says anything."""
        self._requests.labels("", NO_LAYER, code).inc()

    def _look_up(self, model: str, layer: int, code: str) -> tuple[Counter, Histogram]:
        """Looked up once, counted often; as many as there are series."""
        found = (self._requests.labels(model, str(layer), code), self._duration.labels(model, str(layer)))
        self._ended[model, layer, code] = found
        return found

    def request_finished(self, model: str, layer: int, code: str, duration_s: float, outcomes: Mapping[str, int], *, tokens: int = 0) -> None:
        """Count one request that ended. `model` must be one that is served, or empty: labels are bounded by what we serve, not by what is asked."""
        ended, duration = self._ended.get((model, layer, code)) or self._look_up(model, layer, code)
        ended.inc()
        duration.observe(duration_s)
        for outcome, count in outcomes.items():
            if count:
                _child(self._choice_series, self._choices, model, outcome).inc(count)
        if tokens:
            _child(self._token_series, self._tokens, model).inc(tokens)

    def wave_departed(self, waits_s: Sequence[float]) -> None:
        """Count one dispatch by how long each of its calls waited for it."""
        self._wave_calls.observe(len(waits_s))
        for wait_s in waits_s:
            self._wave_wait.observe(wait_s)

    def link_bytes(self, direction: str, num_bytes: int) -> None:
        """Count row bytes; `direction` is `sent` or `received`."""
        self._bytes_by_direction[direction].inc(num_bytes)

    def redispatched(self, reason: str) -> None:
        """Count a segment that went to another copy."""
        self._retries.labels(reason).inc()

    def expert_tokens(self, model: str, layer: int, counts: Mapping[int, int]) -> None:
        """Count rows by expert; call it only when `telemetry.expert_load_series` says so."""
        for expert, count in counts.items():
            self._load.labels(model, str(layer), str(expert)).inc(count)

    def requests_in_flight(self, count: int, num_bytes: int) -> None:
        """Requests and bytes admitted now."""
        self._inflight.set(count)
        self._inflight_bytes.set(num_bytes)

    def queues(self, *, oldest_age_s: float, tokens: int, links_ready: int) -> None:
        """The lanes now."""
        self._queue_age.set(oldest_age_s)
        self._queued.set(tokens)
        self._links.set(links_ready)

    def table(self, *, epoch: int, replicas: Mapping[str, int], missing: Mapping[str, int]) -> None:
        """The routing table now; copies and missing experts by model, every model of the table in both. A model that has left it has no series any more."""
        self._epoch.set(epoch)
        self._show("replicas", self._replicas, replicas)
        self._show("missing", self._missing, missing)

    def _show(self, name: str, gauge: Gauge, values: Mapping[str, int]) -> None:
        for model in self._shown.get(name, set()) - set(values):
            gauge.remove(model)
        for model, count in values.items():
            gauge.labels(model).set(count)
        self._shown[name] = set(values)

    def serve(self, host: str, port: int) -> int:
        """Open the scrape port (0: a free one) in a daemon thread; the port that was opened."""
        server, _ = start_http_server(port, addr=host, registry=self.registry)
        self._server = server
        return int(server.server_port)

    def close(self) -> None:
        """Close the scrape port."""
        server = getattr(self, "_server", None)
        if server is not None:
            server.shutdown()
            server.server_close()


def _child(known: dict[tuple[str, ...], Counter], counter: Counter, *labels: str) -> Counter:
    """The series of these labels: looked up once, counted often; as many as there are series."""
    found = known.get(labels)
    if found is None:
        found = known[labels] = counter.labels(*labels)
    return found
