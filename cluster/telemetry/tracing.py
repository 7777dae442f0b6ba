"""Spans of one process: W3C context in and out, ratio sampling, bounded files and export. Tracing never blocks serving, nor keeps a process from starting.

An unsampled request costs one decision at its root: below it every span is the same silent object.

No span names an expert actor, and actors record none, unless `actor_spans` is on: an actor that holds one expert of a layer is that expert, and even a
number that stands for it is a cipher of the token's experts. What a router records of a dispatch is the node, and the times that the actor told.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Final, Literal, Self, cast

from opentelemetry.exporter.otlp.json.file.trace_exporter import FileSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Span as SdkSpan
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.core.actor_config import TelemetryConfig
from cluster.telemetry.attributes import AttributeValue, permitted

logger = logging.getLogger(__name__)

Kind = Literal["internal", "server", "client", "consumer"]
_KINDS: Final = {"internal": SpanKind.INTERNAL, "server": SpanKind.SERVER, "client": SpanKind.CLIENT, "consumer": SpanKind.CONSUMER}
_PROPAGATOR: Final = TraceContextTextMapPropagator()
MAX_LINKS: Final = 16
MAX_QUEUED_SPANS: Final = 4096
MAX_FILE_BYTES: Final = 64 << 20


class Span:
    """One span; the base class is the silent one."""

    is_recording = False
    traceparent = ""

    def set(self, **attributes: AttributeValue) -> None:
        """Set allow-listed attributes."""

    def event(self, name: str, **attributes: AttributeValue) -> None:
        """Note that something happened now."""

    def fail(self, error: BaseException) -> None:
        """Mark the span failed, by the error's type only: messages may quote a caller."""

    def end(self) -> None:
        """End a span that `Tracing.open` gave."""


_SILENT: Final = Span()
_NOTHING: Final = contextlib.nullcontext(_SILENT)
_current: ContextVar[Span] = ContextVar("moelastic_span", default=_SILENT)
_in_trace: ContextVar[bool] = ContextVar("moelastic_in_trace", default=False)


class _Recorded(Span):
    is_recording = True

    def __init__(self, inner: SdkSpan, *, strict: bool, with_actors: bool) -> None:
        self._inner = inner
        self._rules = {"strict": strict, "with_actors": with_actors}
        context = inner.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"

    def set(self, **attributes: AttributeValue) -> None:
        self._inner.set_attributes(permitted(attributes, **self._rules))

    def event(self, name: str, **attributes: AttributeValue) -> None:
        self._inner.add_event(name, permitted(attributes, **self._rules))

    def fail(self, error: BaseException) -> None:
        self.set(error_type=type(error).__name__)
        self._inner.set_status(Status(StatusCode.ERROR))

    def end(self) -> None:
        self._inner.end()


class Tracing:
    """The tracer of one process; make it in the process that uses it, never before a fork."""

    def __init__(
        self,
        *,
        service: str,
        instance: str,
        config: TelemetryConfig,
        node_id: str = "",
        strict: bool = False,
        exporters: Sequence[SpanExporter] = (),
    ) -> None:
        """`strict` makes a forbidden attribute raise; `exporters` are added to those of the config. One that cannot be had is warned about and left out."""
        self.names_actors = config.actor_spans
        self._ratio = config.sampling_ratio
        self._strict = strict
        self._rng = random.Random(os.urandom(8))  # noqa: S311  (a sampling decision, not a secret)
        used = [*exporters, *_exporters(config, service, instance)]
        self._provider: TracerProvider | None = None
        if used:
            resource = Resource({"service.name": service, "service.instance.id": instance, "ray.node_id": node_id, "process.pid": os.getpid()})
            self._provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, span_limits=SpanLimits(max_links=MAX_LINKS), shutdown_on_exit=False)
            for exporter in used:
                self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=MAX_QUEUED_SPANS, schedule_delay_millis=500))
            self._tracer = self._provider.get_tracer("moelastic")

    @classmethod
    def disabled(cls) -> Self:
        """A tracer that records nothing."""
        return cls(service="", instance="", config=TelemetryConfig(sampling_ratio=0.0))

    @property
    def is_on(self) -> bool:
        """Whether anything is ever recorded."""
        return self._provider is not None

    def span(
        self,
        name: str,
        *,
        kind: Kind = "internal",
        parent: str | None = None,
        links: Sequence[str] = (),
        attributes: Mapping[str, AttributeValue] | None = None,
    ) -> contextlib.AbstractContextManager[Span]:
        """Open a span: below `parent` (a traceparent) when given, else below the current one, else as a new root if the sampler says so.

        A given parent decides for its children: one that is not sampled silences them. An error that leaves the block marks the span failed.
        """
        if self._provider is None or (not parent and _in_trace.get() and not _current.get().is_recording):
            return _NOTHING
        return self._entered(name, kind, parent, links, attributes or {})

    @contextlib.contextmanager
    def _entered(self, name: str, kind: Kind, parent: str | None, links: Sequence[str], attributes: Mapping[str, AttributeValue]) -> Iterator[Span]:
        span = self._start(name, kind, parent, links, attributes)
        inside, current = _in_trace.set(True), _current.set(span)
        try:
            yield span
        except BaseException as error:
            span.fail(error)
            raise
        finally:
            _current.reset(current)
            _in_trace.reset(inside)
            span.end()

    def open(self, name: str, *, kind: Kind = "internal", parent: str, attributes: Mapping[str, AttributeValue] | None = None) -> Span:
        """A span below `parent` that is nobody's current one, for work that callbacks end; its owner calls `end`. Silent where the parent is."""
        return self._start(name, kind, parent, (), attributes or {}) if parent else _SILENT

    def _start(self, name: str, kind: Kind, parent: str | None, links: Sequence[str], attributes: Mapping[str, AttributeValue]) -> Span:
        if self._provider is None:
            return _SILENT
        parent_context = _context_of(parent) if parent else _own_context()
        if parent_context is None:
            if not parent and (_in_trace.get() or self._rng.random() >= self._ratio):
                return _SILENT
        elif not parent_context.trace_flags.sampled:
            return _SILENT
        context = None if parent_context is None else set_span_in_context(NonRecordingSpan(parent_context))
        linked = [Link(found) for found in (_context_of(link) for link in links[:MAX_LINKS]) if found is not None]
        allowed = permitted(attributes, strict=self._strict, with_actors=self.names_actors)
        inner = self._tracer.start_span(name, context=context, kind=_KINDS[kind], links=linked, attributes=allowed)
        return _Recorded(inner, strict=self._strict, with_actors=self.names_actors) if isinstance(inner, SdkSpan) else _SILENT

    def flush(self, timeout_s: float) -> None:
        """Hand over what is queued, within the limit."""
        if self._provider is not None:
            self._provider.force_flush(int(timeout_s * 1000))

    def shutdown(self, timeout_s: float) -> None:
        """Flush within the limit, then stop."""
        self.flush(timeout_s)
        if self._provider is not None:
            self._provider.shutdown()


def current_traceparent() -> str:
    """The W3C context of the current span; empty when nothing is recorded."""
    return _current.get().traceparent


def current_span() -> Span:
    """The span in whose block the caller stands; a silent one outside of any."""
    return _current.get()


def _own_context() -> SpanContext | None:
    traceparent = _current.get().traceparent
    return _context_of(traceparent) if traceparent else None


def _context_of(traceparent: str) -> SpanContext | None:
    from opentelemetry.trace import get_current_span

    context = get_current_span(_PROPAGATOR.extract({"traceparent": traceparent})).get_span_context()
    return context if context.is_valid else None


def is_sampled(traceparent: str) -> bool:
    """Whether a traceparent asks for recording. Flags are bits: SDKs send 03 as well as 01."""
    context = _context_of(traceparent) if traceparent else None
    return context is not None and bool(context.trace_flags & TraceFlags.SAMPLED)


def _exporters(config: TelemetryConfig, service: str, instance: str) -> Iterator[SpanExporter]:
    if config.trace_dir is not None:
        name = f"{service}-{instance}-{os.getpid()}".replace("/", "-")
        try:
            config.trace_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            stream = _RollingFile(config.trace_dir / f"{name}.jsonl", MAX_FILE_BYTES)
        except OSError as error:
            logger.warning("telemetry.trace_dir: no spans are written to %s (%s)", config.trace_dir, error.strerror)
        else:
            yield FileSpanExporter(stream=cast("IO[str]", stream))
    if config.otlp_endpoint is not None:
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

            logging.getLogger(_OTLP_LOGGER).addFilter(_FIRST_ONLY)
            yield OTLPSpanExporter(endpoint=config.otlp_endpoint, insecure=not config.otlp_endpoint.startswith("https"), timeout=5)
        except Exception as error:  # noqa: BLE001  (whatever is wrong with an exporter, requests are served)
            logger.warning("telemetry.otlp_endpoint: no spans are exported to %s (%s)", config.otlp_endpoint, type(error).__name__)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class _FirstOnly(logging.Filter):
    """Lets one record pass: a collector that is away says so with every batch."""

    has_passed = False

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002  (every record is alike)
        is_first, self.has_passed = not self.has_passed, True
        return is_first


_OTLP_LOGGER: Final = "opentelemetry.exporter.otlp.proto.grpc.exporter"
_FIRST_ONLY: Final = _FirstOnly()


class _RollingFile(io.TextIOBase):
    """A text file that keeps its last `max_bytes`, twice over: beyond them the file becomes `NAME.1` and a new one begins."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._has_failed = False
        self._file = self._opened()

    def write(self, text: str, /) -> int:
        try:
            if self._file.tell() + len(text) > self._max_bytes:
                self._path.replace(self._path.with_suffix(".jsonl.1"))
                former, self._file = self._file, self._opened()
                former.close()
            self._file.write(text)
        except (OSError, ValueError) as error:
            self._warn(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._file.flush()
        except (OSError, ValueError) as error:
            self._warn(error)

    def _opened(self) -> IO[str]:
        """For its owner alone: times and sizes of requests are nobody else's business."""
        return open(self._path, "a", encoding="utf-8", opener=_private)

    def _warn(self, error: Exception) -> None:
        """A disk that is full or gone costs spans and one warning."""
        if not self._has_failed:
            logger.warning("telemetry.trace_dir: spans to %s are lost from now on (%s)", self._path, error)
        self._has_failed = True

    def close(self) -> None:
        self._file.close()

    @property
    def closed(self) -> bool:
        return self._file.closed
