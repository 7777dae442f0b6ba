"""What the blocking and the async client share: settings, channel options, metadata, spans, the limit that was learned."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
from collections.abc import Iterator
from typing import Any, Final, Literal, Protocol, TypedDict

import grpc

from cluster.core.errors import ConfigError, MessageTooLarge
from router_service.client_attempts import Attempts
from router_service.wire import SIZE_KEY

DEFAULT_MESSAGE_BYTES: Final = 64 << 20
DEFAULT_TIMEOUT_S: Final = 30.0
MAX_CONNECTIONS: Final = 256


class TracingPort(Protocol):
    """What the client needs of `cluster.telemetry.tracing.Tracing`, so that its calls are spans."""

    def span(self, name: str, *, kind: Literal["client"]) -> contextlib.AbstractContextManager[Any]:
        """Open a span."""
        ...


class Settings(TypedDict, total=False):
    """A client's settings.

    `token`: sent as a bearer token. `timeout_s` (30): bounds calls that name no other limit, retries included. `max_message_bytes` (64 MiB): larger
    requests and replies travel in chunks. `credentials`: make the channel TLS. `tracing`: makes every dispatch a span; without it the caller's own
    OpenTelemetry context is passed on when there is one. `connections` (1): calls take turns over so many; where several routers share the address
    (`router.count`) a connection stays with the one that the kernel chose for it, so a few for each router make it likely that all are used.
    """

    token: str | None
    timeout_s: float
    max_message_bytes: int
    credentials: grpc.ChannelCredentials | None
    tracing: TracingPort | None
    connections: int


class ClientCore:
    """Settings, and what follows from them; it does no I/O."""

    def __init__(self, address: str, settings: Settings) -> None:
        self.address = address
        self.credentials = settings.get("credentials")
        self._token = settings.get("token")
        self._timeout_s = settings.get("timeout_s", DEFAULT_TIMEOUT_S)
        self._max_message_bytes = settings.get("max_message_bytes", DEFAULT_MESSAGE_BYTES)
        self.num_connections = settings.get("connections", 1)
        self._tracing = settings.get("tracing")
        if self._timeout_s <= 0 or self._max_message_bytes <= 0:
            message = "timeout_s and max_message_bytes must be above 0"
            raise ConfigError(message)
        if not 0 < self.num_connections <= MAX_CONNECTIONS:
            message = f"connections must be between 1 and {MAX_CONNECTIONS}"
            raise ConfigError(message)
        self.limit_bytes = self._max_message_bytes
        self._pid = os.getpid()
        self._rng = random.Random()  # noqa: S311  (jitter)

    def options(self) -> list[tuple[str, int]]:
        """Options of the channel. Keepalive finds a router that is gone without a word; the server allows for it."""
        return [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", self._max_message_bytes),
            ("grpc.max_metadata_size", 64 << 10),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            # Retries are ours: every attempt is seen, counted and bounded by one deadline.
            ("grpc.enable_retries", 0),
            # Channels that are alike share a connection, unless each has a pool of its own.
            ("grpc.use_local_subchannel_pool", int(self.num_connections > 1)),
        ]

    def attempts(self, timeout_s: float | None) -> Attempts:
        """The attempts of one call that starts now."""
        if os.getpid() != self._pid:
            message = "this client was made before a fork and its channel is dead here; make one in the process that uses it"
            raise ConfigError(message)
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        if limit_s <= 0:
            message = "timeout_s must be above 0"
            raise ConfigError(message)
        return Attempts(deadline_s=time.monotonic() + limit_s, rng=self._rng)

    def metadata(self, num_bytes: int, traceparent: str = "") -> tuple[tuple[str, str], ...]:
        """Metadata of one attempt: the size, so that the router admits no more than is needed, the token, the trace."""
        metadata = [(SIZE_KEY, str(num_bytes))]
        if self._token is not None:
            metadata.append(("authorization", f"Bearer {self._token}"))
        traceparent = traceparent or _current_traceparent()
        if traceparent:
            metadata.append(("traceparent", traceparent))
        return tuple(metadata)

    @contextlib.contextmanager
    def span(self) -> Iterator[str]:
        """The client's span around one dispatch; yields what the router shall continue."""
        if self._tracing is None:
            yield ""
            return
        with self._tracing.span("moe.client", kind="client") as span:
            yield span.traceparent

    def learn_limit(self, error: MessageTooLarge) -> None:
        """Remember a router's message limit where it is smaller than ours, so that later requests stream at once."""
        if error.limit_bytes:
            self.limit_bytes = min(self.limit_bytes, error.limit_bytes)


def _current_traceparent() -> str:
    """The W3C context of the caller's OpenTelemetry span, if the caller uses OpenTelemetry at all."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return ""
    context = trace.get_current_span().get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}" if context.is_valid else ""
