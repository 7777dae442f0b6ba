"""A router in this process: a real grpc.aio server on a free port, over a pipeline that a test chooses. By default the real pipeline on fake lanes.

async with router() as rig:
    async with rig.client() as client:
        reply = await client.dispatch(rig.rows(), model=rig.model, layer=3)
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
import numpy as np

from cluster.core.descriptors import ModelDescriptor
from cluster.core.routing_table import RoutingTable
from cluster.telemetry.metrics import RouterMetrics
from cluster.telemetry.tracing import Tracing
from kit.pipelines import NAME, D, Setup, setup
from router_service.auth import Tenants
from router_service.client import AsyncRouterClient, RouterClient
from router_service.core.layer_call import LayerCall, LayerReply
from router_service.core.outcomes import Report
from router_service.counters import Counters
from router_service.front import RpcFront
from router_service.health import HealthBoard
from router_service.interceptors import AdmissionLimits
from router_service.servicer import LayerRunner, RouterServicer, ServiceLimits
from router_service.wire_views import LinkView, RouterFacts

MIB = 1 << 20
TOKEN = "a-token-of-the-tests-0123456789"  # noqa: S105  (opens nothing)
LAYER = 3


class Ended(Exception):
    """A call in this process ended with a status."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing_metadata: tuple[tuple[str, str | bytes], ...]) -> None:
        super().__init__(code, details)
        self.code, self.details, self.trailing_metadata = code, details, trailing_metadata


@dataclass
class InProcess:
    """A servicer context without a server."""

    remaining_s: float | None = 20.0
    metadata: tuple[tuple[str, str], ...] = ()
    ended_with: grpc.StatusCode | None = None

    def time_remaining(self) -> float | None:
        return self.remaining_s

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self.metadata

    async def send_initial_metadata(self, metadata: tuple[()]) -> None:
        assert metadata == ()

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: tuple[tuple[str, str | bytes], ...] = ()) -> NoReturn:
        self.ended_with = code
        raise Ended(code, details, tuple(trailing_metadata))

    def code(self) -> grpc.StatusCode | None:
        return self.ended_with


@dataclass
class EchoPipeline:
    """A pipeline that gives every row back, or raises what it is told to. Every call is in `calls`."""

    error: BaseException | None = None
    calls: list[LayerCall] = field(default_factory=list)

    async def run(self, call: LayerCall) -> LayerReply:
        self.calls.append(call)
        if self.error is not None:
            raise self.error
        return LayerReply(call.hidden_states, Report(exact=call.hidden_states.shape[0], epoch=7))


@dataclass
class RouterRig:
    """A running router and everything a test may look at or change."""

    servicer: RouterServicer
    front: RpcFront
    health: HealthBoard
    counters: Counters
    metrics: RouterMetrics
    setup: Setup
    address: str = ""
    token: str | None = None
    is_draining: bool = False
    model: str = NAME
    links: tuple[LinkView, ...] = ()

    def facts(self) -> RouterFacts:
        return RouterFacts(self.setup.table, 0.0, 5, is_connected=True, is_draining=self.is_draining, links=self.links)

    async def show(self, table: RoutingTable | None) -> None:
        """Use another table, and let health say so."""
        self.setup.table = table
        models = {} if table is None else table.models
        await self.health.update(models, {name for name in models if table.is_complete(name)})

    def client(self, **settings: Any) -> AsyncRouterClient:
        return AsyncRouterClient(self.address, **{"token": self.token, "timeout_s": 20.0, **settings})

    def blocking_client(self, **settings: Any) -> RouterClient:
        return RouterClient(self.address, **{"token": self.token, "timeout_s": 20.0, **settings})

    @staticmethod
    def rows(num_tokens: int = 5, seed: int = 0) -> np.ndarray:
        """Random fp32 hidden states [T, D]."""
        return np.random.default_rng(seed).standard_normal((num_tokens, D)).astype(np.float32)


@asynccontextmanager
async def router(
    pipeline: LayerRunner | None = None,
    *,
    tokens: Mapping[str, str] | None = None,
    max_message_bytes: int = 4 * MIB,
    max_inflight_bytes: int = 64 * MIB,
    max_concurrent_requests: int = 64,
    default_timeout_s: float = 20.0,
    max_timeout_s: float = 60.0,
    has_reflection: bool = False,
    tracing: Tracing | None = None,
    trusted: frozenset[str] = frozenset(),
    operators: frozenset[str] = frozenset({"default"}),
    models: Mapping[str, ModelDescriptor] | None = None,
    port: int = 0,
    **admission: float,
) -> AsyncIterator[RouterRig]:
    """A router that serves until the block ends. `tokens`: tenant to token, one tenant `default` unless given; `admission`: further AdmissionLimits."""
    made = setup(tracing=tracing)
    metrics = RouterMetrics()
    counters = Counters(time.monotonic, metrics)
    known = {NAME: made.model.manifest.model} if models is None else models
    tokens = {"default": TOKEN} if tokens is None else tokens
    servicer = RouterServicer(
        pipeline or made.pipeline,
        models=lambda: known,
        is_draining=lambda: rig.facts().is_draining,
        facts=lambda: rig.facts(),  # noqa: PLW0108  (the rig is made below)
        counters=counters,
        limits=ServiceLimits(max_message_bytes, 65_536, default_timeout_s, max_timeout_s),
        tracing=tracing or Tracing.disabled(),
        trusted_trace_tenants=trusted,
        operators=operators,
    )
    health = HealthBoard()
    limits = AdmissionLimits(max_message_bytes, max_inflight_bytes, max_concurrent_requests, **admission)
    tenants = Tenants({tenant: token.encode() for tenant, token in tokens.items()}) if tokens else None
    front = RpcFront(servicer, health, counters, limits=limits, tenants=tenants, has_reflection=has_reflection)
    rig = RouterRig(servicer, front, health, counters, metrics, made, token=next(iter(tokens.values()), None))
    rig.address = f"127.0.0.1:{await front.start('127.0.0.1', port)}"
    await rig.show(made.table)
    try:
        yield rig
    finally:
        await front.stop(0)
