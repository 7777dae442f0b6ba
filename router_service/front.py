"""The gRPC server of a router: the service behind its interceptors, health, reflection where it may be, and the limits of the transport."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from cluster.core.errors import ConfigError, MoeError
from protos.moelastic.router.v1 import router_pb2 as pb
from protos.moelastic.router.v1 import router_pb2_grpc
from router_service.accepting import Takers
from router_service.auth import Tenants
from router_service.counters import Counters
from router_service.errors import code_of
from router_service.health import SERVICE, HealthBoard
from router_service.interceptors import DISPATCH, ROUTER_PREFIX, AdmissionInterceptor, AdmissionLimits, AuthInterceptor
from router_service.servicer import RouterServicer

BACKSTOP_FACTOR: Final = 2
BACKSTOP_CALLS: Final = 160
# A connection stays with the process that took it: without an end of it a router that comes back would get no callers.
SHARED_CONNECTION_AGE_MS: Final = 60_000


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Certificate chain and private key, as PEM files."""

    cert: Path
    key: Path


class RpcFront:
    """One listening gRPC server. Without `tenants` everyone may call."""

    def __init__(
        self,
        servicer: RouterServicer,
        health: HealthBoard,
        counters: Counters,
        *,
        limits: AdmissionLimits,
        tenants: Tenants | None,
        has_reflection: bool,
        shares_address: bool = False,
    ) -> None:
        """`shares_address`: other servers that ask for the same may listen on the same port; the kernel gives each connection to one of them."""
        self.health = health
        self.admission = AdmissionInterceptor(limits, refused=self._refused)
        self._counters = counters
        interceptors = [self.admission] if tenants is None else [AuthInterceptor(tenants, refused=self._refused), self.admission]
        # The transport's own limit lies above ours, which has the better words.
        max_calls = BACKSTOP_FACTOR * limits.max_concurrent_requests + BACKSTOP_CALLS
        options = _options(limits, shares_address=shares_address)
        self._server = grpc.aio.server(interceptors=interceptors, options=options, maximum_concurrent_rpcs=max_calls)
        services = _Unregistered(self._server)
        router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, services)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(health.servicer, services)
        dispatch = grpc.unary_unary_rpc_method_handler(servicer.Dispatch, pb.DispatchRequest.FromString, pb.DispatchResponse.SerializeToString)
        self._takers = Takers(self._server, DISPATCH, dispatch, interceptors, max_calls=max_calls)
        if has_reflection:
            names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflection.aio.ReflectionServicer(names), services)

    async def start(self, host: str, port: int, tls: TlsFiles | None = None) -> int:
        """Listen; the port, chosen freely when 0 was asked for. Raises ConfigError when it cannot be had; may be called again then."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = self._server.add_insecure_port(address) if tls is None else self._server.add_secure_port(address, _credentials(tls))
        except RuntimeError as error:
            message = f"router: cannot listen on {address}; the port is taken or the address is not this machine's; set router.port to 0 for a free one"
            raise ConfigError(message) from error
        await self._server.start()
        self._takers.start()
        return int(bound)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, let those under way end within the limit, then close."""
        await self._server.stop(grace_s)
        await self._takers.ended()

    def _refused(self, method: str, error: MoeError) -> None:
        if method.startswith(ROUTER_PREFIX):
            self._counters.refused(code_of(error).name)


class _Unregistered:
    """A server as generated code sees it, which finds methods by name only: with each call grpc.aio waits anew for every method that is registered."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]) -> None:
        """They are generic handlers already."""


def may_reflect(setting: Literal["auto", "on", "off"], host: str) -> bool:
    """Whether reflection is served: `auto` means on a loopback address only."""
    if setting != "auto":
        return setting == "on"
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _options(limits: AdmissionLimits, *, shares_address: bool) -> list[tuple[str, int]]:
    sharing = [("grpc.so_reuseport", 1), ("grpc.max_connection_age_ms", SHARED_CONNECTION_AGE_MS)]
    return [
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_message_bytes),
        # Two routers must not share a port without knowing it.
        *(sharing if shares_address else [("grpc.so_reuseport", 0)]),
        # Activations hardly compress, and a compressed message would cost more than it declares.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.max_concurrent_streams", BACKSTOP_FACTOR * limits.max_concurrent_requests + BACKSTOP_CALLS),
        # Our clients ping every 10 s while a call is open.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    try:
        pair = (tls.key.read_bytes(), tls.cert.read_bytes())
    except OSError as error:
        message = f"router.tls_cert, router.tls_key: cannot read {error.filename} ({error.strerror})"
        raise ConfigError(message) from error
    return grpc.ssl_server_credentials([pair])
