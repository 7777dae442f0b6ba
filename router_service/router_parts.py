"""What a router is made of, joined once: lanes, models, pipeline, service, table feed, telemetry. Nothing here decides anything."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from cluster.core.actor_config import RouterConfig, TelemetryConfig
from cluster.core.descriptors import ModelDescriptor
from cluster.core.errors import ConfigError
from cluster.core.link_limits import LinkLimits
from cluster.core.routing_table import RoutingTable
from cluster.core.spec import ClusterSpec, LivenessSpec
from cluster.telemetry.metrics import RouterMetrics
from cluster.telemetry.tracing import Tracing
from router_service.actor_health import ActorHealth
from router_service.auth import Tenants, operators_of
from router_service.core.dispatch_limits import DispatchLimits
from router_service.core.hedging import HedgeBudget, Lateness
from router_service.core.liveness import Liveness
from router_service.core.trust import Trust
from router_service.core.verdicts import LivenessLimits, State
from router_service.core.wave import WaveLimits
from router_service.counted_lanes import CountedLanes
from router_service.counters import Counters
from router_service.dispatcher import Hedging
from router_service.front import RpcFront, TlsFiles, may_reflect
from router_service.health import HealthBoard
from router_service.interceptors import AdmissionLimits
from router_service.lanes import Lanes, LinkState
from router_service.link_client import LinkPhase
from router_service.models import GateStore
from router_service.pipeline import Pipeline
from router_service.served_models import ServedModels
from router_service.servicer import RouterServicer, ServiceLimits
from router_service.table_feed import Adopt, TableFeed
from router_service.wire_views import LinkView, RouterFacts

FLUSH_S: Final = 2.0
_STATES: Final = {LinkPhase.CONNECTING: "connecting", LinkPhase.READY: "ready", LinkPhase.DRAINING: "closed", LinkPhase.CLOSED: "closed"}


@dataclass(frozen=True, slots=True)
class RouterSecrets:
    """What must not be in a config: handed over at construction, never printed. Tenants' tokens are read from the files that `auth.tokens` names."""

    link_secret: bytes = field(repr=False)
    control_token: bytes = field(repr=False)


class RouterParts:
    """The parts of one router. `table` is the one in use; it changes in one step together with the models' gates."""

    def __init__(self, config: RouterConfig, secrets: RouterSecrets, store: GateStore, *, node_id: str, adopt: Adopt) -> None:
        """Opens nothing; belongs to the running event loop. Raises ConfigError for tokens that cannot be used."""
        spec = config.spec
        rng = random.Random()  # noqa: S311  (balance and jitter)
        self.table: RoutingTable | None = None
        self.is_draining = False
        self.tracing = Tracing(service="router", instance=config.router_id, config=_telemetry(spec), node_id=node_id)
        self.metrics = RouterMetrics(version=config.code_digest[:12])
        self.counters = Counters(time.monotonic, self.metrics)
        self.models = ServedModels(store)
        self.trust = Trust()
        self.actor_health = ActorHealth(Liveness(liveness_limits(spec.liveness)), self.trust, self.metrics)
        self.lanes = _lanes(config, secrets, self.actor_health)
        self.counted = CountedLanes(self.lanes, self.metrics, expert_series=spec.telemetry.expert_load_series)
        limit = spec.router.max_tokens_per_request
        self._window_rows = spec.actors.frames_in_flight * spec.actors.max_tokens_per_frame
        self.pipeline = Pipeline(
            self.counted,
            self.models.current,
            lambda: self.table,
            rng,
            tracing=self.tracing,
            trust=self.trust,
            hedging=_hedging(spec, self.actor_health),
            shadows=self.actor_health,
            max_tokens=limit,
            limits=_dispatch_limits(spec),
            waves=WaveLimits(max_calls=spec.router.max_wave_calls),
            metrics=self.metrics,
        )
        self.actor_health.on_pulse = self.pipeline.dispatcher.pulse
        self.feed = TableFeed(config.control_address, secrets.control_token, router_id=config.router_id, adopt=adopt, rng=rng)
        self.health = HealthBoard()
        self.servicer = RouterServicer(
            self.pipeline,
            models=self.descriptors,
            facts=self.facts,
            is_draining=lambda: self.is_draining,
            counters=self.counters,
            limits=_service_limits(spec),
            tracing=self.tracing,
            trusted_trace_tenants=spec.auth.trusted_trace_tenants,
            operators=operators_of(spec.auth),
        )
        tenants = Tenants.from_files(spec.auth.tokens) if spec.auth.enabled else None
        if tenants is not None and not spec.auth.tokens:
            message = "auth.tokens: no tenant has a token; `moelastic up` makes one for tenant `default`, or set auth.enabled: false"
            raise ConfigError(message)
        reflects = may_reflect(spec.router.reflection, spec.router.host)
        self.front = RpcFront(
            self.servicer,
            self.health,
            self.counters,
            limits=_admission_limits(spec),
            tenants=tenants,
            has_reflection=reflects,
            shares_address=spec.router.shares_address,
        )

    def adopt(self, table: RoutingTable) -> None:
        """Use a table, whose models and links are ready."""
        self.table = table
        self.actor_health.adopt(table)
        hedging = self.pipeline.dispatcher.hedging
        if hedging is not None:
            windows = 2 * self._window_rows * max(1, len(table.actors))
            hedging.budget.set_burst(windows)
        self.measure_table(table)

    def links(self) -> list[LinkState]:
        """Every link of the table, with what is thought of its actor."""
        health = self.actor_health
        return [replace(link, standing=health.state(name), evidence=health.evidence.get(name, "")) for name, link in self._named_links()]

    def _named_links(self) -> Iterable[tuple[str, LinkState]]:
        return ((str(link.endpoint.incarnation), link) for link in self.lanes.status())

    def descriptors(self) -> dict[str, ModelDescriptor]:
        """Every model whose gates are loaded."""
        return {name: model.manifest.model for name, model in self.models.current.items()}

    def complete_models(self) -> set[str]:
        """Models of the table that can be answered for: every expert has a copy, and the gates are here."""
        table = self.table
        return set() if table is None else {name for name in table.models if name in self.models.current and table.is_complete(name)}

    def facts(self) -> RouterFacts:
        """The router as it is now."""
        links = tuple(_view(link) for link in self.links())
        feed = self.feed
        return RouterFacts(self.table, feed.table_age_s, feed.router_generation, feed.is_connected, self.is_draining, links)

    def measure_table(self, table: RoutingTable) -> None:
        """Show a table in the metrics."""
        replicas: Counter[str] = Counter(dict.fromkeys(table.models, 0))
        for expert, copies in table.copies.items():
            replicas[expert.model] += len(copies)
        missing = {name: entry.num_missing for name, entry in table.models.items()}
        self.metrics.table(epoch=table.epoch, replicas=replicas, missing=missing)

    def measure_links(self, links: Iterable[LinkState]) -> None:
        """Show queues and what is admitted in the metrics."""
        states = list(links)
        oldest_s = max((state.oldest_age_s for state in states), default=0.0)
        ready = sum(state.phase is LinkPhase.READY for state in states)
        self.metrics.queues(oldest_age_s=oldest_s, tokens=sum(state.queued_tokens for state in states), links_ready=ready)
        self.metrics.requests_in_flight(self.servicer.num_in_flight, self.front.admission.budget.held_bytes)

    async def close(self, timeout_s: float) -> None:
        """Let go of everything but the listening server."""
        self.actor_health.close()
        await self.feed.close()
        await self.lanes.close(timeout_s)
        self.metrics.close()
        self.tracing.shutdown(FLUSH_S)


def tls_of(spec: ClusterSpec) -> TlsFiles | None:
    """The TLS files of a spec. Raises ConfigError when only one of the two is named."""
    cert, key = spec.router.tls_cert, spec.router.tls_key
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        message = "router.tls_cert and router.tls_key belong together; name both or neither"
        raise ConfigError(message)
    return TlsFiles(cert, key)


def liveness_limits(spec: LivenessSpec) -> LivenessLimits:
    """The section of the spec, as liveness takes it."""
    return LivenessLimits(**spec.model_dump())


def _hedging(spec: ClusterSpec, health: ActorHealth) -> Hedging | None:
    wanted = spec.hedging
    if not wanted.enabled:
        return None
    burst_rows = 2 * spec.actors.frames_in_flight * spec.actors.max_tokens_per_frame
    lateness, budget = Lateness(wanted.quantile, wanted.min_delay_s), HedgeBudget(wanted.budget_fraction, burst_rows)
    return Hedging(lateness, budget, wanted.min_shadow_delay_s, health.standstill_s)


def _lanes(config: RouterConfig, secrets: RouterSecrets, watch: ActorHealth) -> Lanes:
    link, actors = config.spec.link, config.spec.actors
    limits = LinkLimits(
        max_frame_bytes=link.max_frame_bytes,
        max_tokens_per_frame=actors.max_tokens_per_frame,
        frames_in_flight=actors.frames_in_flight,
        min_overlapping_tokens=actors.min_overlapping_tokens,
        connect_timeout_s=link.connect_timeout_s,
        heartbeat_s=link.heartbeat_s,
        tether_grace_s=link.tether_grace_s,
    )
    return Lanes(
        router_id=config.router_id,
        link_secret=secrets.link_secret,
        limits=limits,
        max_queued_tokens=config.spec.router.max_queued_tokens,
        drain_timeout_s=config.spec.router.drain_timeout_s,
        watch=watch,
    )


def _service_limits(spec: ClusterSpec) -> ServiceLimits:
    router = spec.router
    timeouts_s = (router.default_timeout_s, router.max_timeout_s)
    return ServiceLimits(router.max_message_bytes, router.max_tokens_per_request, *timeouts_s, _dispatch_limits(spec))


def _dispatch_limits(spec: ClusterSpec) -> DispatchLimits:
    return DispatchLimits(spec.router.max_queued_tokens, spec.router.max_dispatch_bytes)


def _admission_limits(spec: ClusterSpec) -> AdmissionLimits:
    return AdmissionLimits(spec.router.max_message_bytes, spec.router.max_inflight_bytes, spec.router.max_concurrent_requests)


def _telemetry(spec: ClusterSpec) -> TelemetryConfig:
    wanted = spec.telemetry
    return TelemetryConfig(sampling_ratio=wanted.sampling_ratio, trace_dir=wanted.trace_dir, otlp_endpoint=wanted.otlp_endpoint, actor_spans=wanted.actor_spans)


def _view(link: LinkState) -> LinkView:
    endpoint = link.endpoint
    return LinkView(
        actor_id=endpoint.incarnation.actor_id,
        generation=endpoint.incarnation.generation,
        node_id=endpoint.node_id,
        address=f"{endpoint.host}:{endpoint.port}",
        state=_STATES[link.phase] if link.standing is State.HEALTHY else link.standing.value,
        queued_tokens=link.queued_tokens,
        frames_in_flight=link.frames_in_flight,
        last_heard_age_s=link.last_heard_age_s,
    )
