"""The router's RPCs: deadline, checks, one call into the pipeline, an honest account of how it ended. Thin on purpose; the data path is `pipeline`."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Final, Protocol

from cluster.core.descriptors import LayerDescriptor, ModelDescriptor
from cluster.core.errors import DeadlineExceeded, NotFound, NotReady
from cluster.telemetry.tracing import Span, Tracing
from protos.moelastic.router.v1 import router_pb2 as pb
from protos.moelastic.router.v1 import router_pb2_grpc
from router_service.caller import tenant_of_call
from router_service.core.dispatch_limits import DispatchLimits
from router_service.core.layer_call import THREAD_BYTES, LayerCall, LayerReply
from router_service.counters import Account, Counters
from router_service.errors import abort, code_of
from router_service.interceptors import admitted_bytes
from router_service.wire import CHUNK_BYTES, Buffer, refuse
from router_service.wire_dispatch import MAX_MODEL_NAME_CHARACTERS, Part, bodies_of, call_of, chunks_of, parts_of, response_of, start_parts_of, streamed_bytes
from router_service.wire_views import RouterFacts, model_message, status_message, table_message

_TRACEPARENT: Final = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class LayerRunner(Protocol):
    """The pipeline, as the servicer calls it."""

    async def run(self, call: LayerCall) -> LayerReply:
        """Run one MoE layer; raises errors of the one tree."""
        ...


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """What one request may ask for."""

    max_message_bytes: int
    max_tokens_per_request: int
    default_timeout_s: float
    max_timeout_s: float
    dispatch: DispatchLimits = field(default_factory=DispatchLimits)


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """Serves RouterService. `models` are those whose gates are loaded; `facts` looks at the router as it is now."""

    def __init__(
        self,
        pipeline: LayerRunner,
        *,
        models: Callable[[], Mapping[str, ModelDescriptor]],
        facts: Callable[[], RouterFacts],
        is_draining: Callable[[], bool],
        counters: Counters,
        limits: ServiceLimits,
        tracing: Tracing,
        trusted_trace_tenants: frozenset[str] = frozenset(),
        operators: frozenset[str] = frozenset(),
    ) -> None:
        self._pipeline = pipeline
        self._models = models
        self._facts = facts
        self._is_draining = is_draining
        self._counters = counters
        self._limits = limits
        self._tracing = tracing
        self._trusted_trace_tenants = trusted_trace_tenants
        self._operators = operators
        self.num_in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_until_idle(self, timeout_s: float) -> bool:
        """Wait until no request is under way; False when the time was too short."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return self._idle.is_set()

    async def Dispatch(self, request: pb.DispatchRequest, context: Any) -> pb.DispatchResponse:  # noqa: N802, ANN401  (named by the proto; grpc's context)
        """One MoE layer over T tokens, in one message each way."""
        async with self._accounted(context, request) as account:
            parts = parts_of(request, max_bytes=self._limits.max_message_bytes)
            reply = await self._run(request, parts, bodies_of(parts), account)
            limit = self._limits.max_message_bytes
            if reply.hidden_states.nbytes < THREAD_BYTES:
                return response_of(reply, max_bytes=limit)
            return await asyncio.to_thread(response_of, reply, max_bytes=limit)

    async def DispatchStream(  # noqa: N802
        self,
        request_iterator: AsyncIterator[pb.DispatchStreamRequest],
        context: Any,  # noqa: ANN401
    ) -> AsyncIterator[pb.DispatchStreamResponse]:
        """The same in chunks, for requests or replies over the message limit."""
        async with self._accounted(context) as account:
            async with asyncio.timeout_at(account.deadline_s):
                start = await _start_of(request_iterator)
                account.request_id = start.request_id
                parts = start_parts_of(start, max_bytes=admitted_bytes.get() or self._limits.max_message_bytes)
                self._place(start, account)
                # Tells the caller to go on: what can be refused by the start alone is refused by now.
                await context.send_initial_metadata(())
                data = await _collected(request_iterator, streamed_bytes(parts))
            reply = await self._run(start, parts, bodies_of(parts, data), account)
            yield pb.DispatchStreamResponse(start=response_of(reply, max_bytes=self._limits.max_message_bytes, with_data=False))
            for chunk in chunks_of(reply, min(CHUNK_BYTES, self._limits.max_message_bytes // 2)):
                yield pb.DispatchStreamResponse(chunk=chunk)

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802, ANN401
        """What to send, for one model."""
        async with _ending(context):
            descriptor, table = self._model_of(request.model), self._facts().table
            entry = None if table is None else table.models.get(descriptor.name)
            limits = pb.Limits(
                max_message_bytes=self._limits.max_message_bytes,
                max_tokens_per_request=self._limits.max_tokens_per_request,
                max_timeout_s=self._limits.max_timeout_s,
                max_choices_per_request=self._limits.dispatch.choices_per_request(max(map(_row_bytes, descriptor.layers))),
            )
            return model_message(descriptor, manifest="" if entry is None else entry.manifest, models=self._models(), limits=limits)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:  # noqa: N802, ANN401, ARG002
        """How well the router can serve, and how old its knowledge is. Queues of single actors tell whom others talk to: they are for operators only."""
        async with _ending(context):
            facts = self._facts()
            return status_message(facts if tenant_of_call.get() in self._operators else replace(facts, links=()), self._counters)

    async def GetRoutingTable(self, request: pb.GetRoutingTableRequest, context: Any) -> pb.GetRoutingTableResponse:  # noqa: N802, ANN401, ARG002
        """The table in use."""
        async with _ending(context):
            table = self._facts().table
            if table is None:
                message = "this router has no routing table yet; retry in a moment"
                raise NotReady(message)
            return table_message(table)

    def _accounted(self, context: Any, request: pb.DispatchRequest | None = None) -> _Accounted:  # noqa: ANN401
        """Count the request of this block, trace it, and end its call with the status of whatever goes wrong in it."""
        return _Accounted(self, context, "" if request is None else request.request_id)

    def begin(self, context: Any, account: _Account) -> contextlib.AbstractContextManager[Span]:  # noqa: ANN401
        """A request begins, in this span."""
        self.num_in_flight += 1
        self._idle.clear()
        span = self._span(context)
        account.span = span.__enter__()
        return span

    async def end(self, context: Any, account: _Account, error: BaseException | None, took_s: float) -> None:  # noqa: ANN401
        """A request ended: count it, and give its call the status of what went wrong."""
        try:
            if error is None:
                self._counters.succeeded(account, took_s)
            elif isinstance(error, asyncio.CancelledError | GeneratorExit):
                self._counters.failed(account, "CANCELLED", took_s)
            elif isinstance(error, Exception):
                self._counters.failed(account, code_of(error).name, took_s)
                await abort(context, error, request_id=account.request_id)
        finally:
            self.num_in_flight -= 1
            if not self.num_in_flight:
                self._idle.set()

    def _span(self, context: Any) -> contextlib.AbstractContextManager[Span]:  # noqa: ANN401
        """The request's span: below the caller's for a trusted tenant, else a trace of its own that links to it."""
        if not self._tracing.is_on:  # the call's metadata is copied each time it is asked for
            return self._tracing.span("moe.request")
        found = next((str(value) for key, value in context.invocation_metadata() or () if key == "traceparent"), "")
        sent = found if _TRACEPARENT.fullmatch(found) else ""
        is_trusted = tenant_of_call.get() in self._trusted_trace_tenants
        parent, links = (sent or None, ()) if is_trusted else (None, (sent,) if sent else ())
        return self._tracing.span("moe.request", kind="server", parent=parent, links=links, attributes={"rpc_system": "grpc"})

    def deadline_s(self, context: Any) -> float:  # noqa: ANN401
        """When a request must be answered, in the loop's clock. Raises NotReady while draining, DeadlineExceeded."""
        if self._is_draining():
            message = "this router is draining and takes no new requests; retry, another one or its successor will answer"
            raise NotReady(message)
        remaining_s = context.time_remaining()
        timeout_s = self._limits.default_timeout_s if remaining_s is None else min(remaining_s, self._limits.max_timeout_s)
        if timeout_s <= 0:
            message = "the deadline had passed when the request arrived; allow more time"
            raise DeadlineExceeded(message)
        return asyncio.get_running_loop().time() + timeout_s

    async def _run(self, request: pb.DispatchRequest, parts: Sequence[Part], bodies: Mapping[str, Buffer], account: _Account) -> LayerReply:
        self._place(request, account)
        call = call_of(request, parts, bodies, model=account.model, deadline_s=account.deadline_s)
        account.tokens = call.hidden_states.shape[0]
        account.span.set(model=account.model, layer=account.layer, tokens=account.tokens)
        reply = await self._pipeline.run(call)  # which keeps the deadline
        account.report = reply.report
        account.span.set(epoch=reply.report.epoch, degraded_tokens=reply.report.degraded_tokens)
        return reply

    def _place(self, request: pb.DispatchRequest, account: _Account) -> None:
        """Find the model and the layer. Raises as `_model_of`, and NotFound for a layer that has no experts."""
        descriptor = self._model_of(request.model)
        account.model = descriptor.name
        if descriptor.layer(request.layer) is None:
            layers = ", ".join(str(entry.layer) for entry in descriptor.layers)
            message = f"layer {request.layer} of model {descriptor.name} is not an MoE layer; those are {layers}"
            raise NotFound(message, resource="layer", name=f"{descriptor.name}/{request.layer}")
        account.layer = request.layer

    def _model_of(self, name: str) -> ModelDescriptor:
        """The model of a name; an empty one means the only model there is. Raises InvalidRequest, NotFound, or NotReady while its gates load."""
        loaded = self._models()
        if name in loaded:
            return loaded[name]
        table = self._facts().table
        expected = set(loaded) if table is None else set(loaded) | set(table.models)
        served = ", ".join(sorted(expected)) or "none yet"
        if not name and len(loaded) == len(expected) == 1:
            return next(iter(loaded.values()))
        if not name and len(expected) > 1:
            refuse("model", f"model is empty and several are served: {served}; name one")
        if table is None or not name or name in expected:
            message = f"this router is still loading what it serves ({served}); retry in a moment"
            raise NotReady(message)
        message = f"model {name[:MAX_MODEL_NAME_CHARACTERS]!r} is not served here; served: {served}"
        raise NotFound(message, resource="model", name=name)


@dataclass(slots=True)
class _Account(Account):
    """A request's account, with what its handler shares: its deadline (the loop's clock) and its span."""

    deadline_s: float = 0.0
    span: Span = field(default_factory=Span)


class _Accounted:
    """A request, counted and traced for a block. Written out, since a generator for each request costs more than all that it does."""

    __slots__ = ("_account", "_context", "_servicer", "_span", "_started_s")

    def __init__(self, servicer: RouterServicer, context: Any, request_id: str) -> None:  # noqa: ANN401  (grpc's)
        self._servicer = servicer
        self._context = context
        self._account = _Account(request_id=request_id)
        self._started_s = 0.0
        self._span: contextlib.AbstractContextManager[Span] | None = None

    async def __aenter__(self) -> _Account:
        self._started_s = time.monotonic()
        try:
            self._span = self._servicer.begin(self._context, self._account)
            self._account.deadline_s = self._servicer.deadline_s(self._context)
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self._account

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self._span is not None:
                self._span.__exit__(kind, error, trace)
        finally:
            await self._servicer.end(self._context, self._account, error, time.monotonic() - self._started_s)


@contextlib.asynccontextmanager
async def _ending(context: Any) -> AsyncIterator[None]:  # noqa: ANN401
    try:
        yield
    except Exception as error:  # noqa: BLE001  (every error ends in a status)
        await abort(context, error)


def _row_bytes(entry: LayerDescriptor) -> int:
    return entry.expert.hidden_size * entry.expert.dtype.itemsize


async def _start_of(messages: AsyncIterator[pb.DispatchStreamRequest]) -> pb.DispatchRequest:
    first = await anext(messages, None)
    if first is None or first.WhichOneof("part") != "start":
        refuse("start", "the stream's first message must be `start`: the request without its data")
    return first.start


async def _collected(messages: AsyncIterator[pb.DispatchStreamRequest], num_bytes: int) -> memoryview:
    """The bytes of a stream's chunks, exactly as many as its start declared; they were admitted before a byte is allocated. Raises InvalidRequest."""
    data = bytearray(num_bytes)
    filled = 0
    while filled < num_bytes:
        message = await anext(messages, None)
        if message is None:
            refuse("chunk", f"the stream ended after {filled} of {num_bytes} declared bytes")
        chunk = message.chunk
        if not chunk:
            refuse("chunk", "every message after the first must be a `chunk` with at least one byte")
        if filled + len(chunk) > num_bytes:
            refuse("chunk", f"the chunks bring more than the {num_bytes} bytes that the start declared")
        data[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    return memoryview(data)
