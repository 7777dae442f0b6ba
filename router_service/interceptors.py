"""What every call passes before its handler: the token, then its place and its bytes in the router's budgets, and only then its message is read.

A method with one request message is served as if it were a stream of one: grpc.aio then leaves the message unread until it is asked for, so a call
that is refused or waits costs no memory, and a message that is late, missing or malformed ends in a status of ours.

gRPC takes a message of up to the message limit whole, whatever was declared. So the calls that are read at a time may lie by a bounded number of bytes
together, and who has lied is taken at no word any more.

Health is open to everyone, because probes have no token; it has small limits of its own, so that neither side can starve the other, and watchers no
probes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NoReturn

import grpc
from google.protobuf.message import DecodeError, Message

from cluster.core.errors import DeadlineExceeded, InvalidRequest, MessageTooLarge, MoeError, Unauthenticated
from router_service.admission import ByteBudget, ByteLease, Liars, RequestLimit
from router_service.auth import Tenants
from router_service.caller import tenant_of_call
from router_service.errors import abort
from router_service.turns import Turns
from router_service.wire import SIZE_KEY

HEALTH_PREFIX: Final = "/grpc.health.v1.Health/"
ROUTER_PREFIX: Final = "/moelastic.router.v1.RouterService/"
DISPATCH: Final = f"{ROUTER_PREFIX}Dispatch"
DATA_METHODS: Final = frozenset({DISPATCH, f"{ROUTER_PREFIX}DispatchStream"})
HEALTH_WATCH: Final = f"{HEALTH_PREFIX}Watch"
HEALTH_READS: Final = 8
# Whole messages that callers together may send beyond what they declared, before they are found out.
UNPROVEN_READS: Final = 16
MAX_SIZE_DIGITS: Final = 15
# A declared size below a megabyte.
SMALL_DIGITS: Final = 6
# How calls end that took a place and were served nothing.
_IN_VAIN: Final = frozenset({grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED})

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]
Refused = Callable[[str, MoeError], None]
admitted_bytes: ContextVar[int] = ContextVar("moelastic_admitted_bytes", default=0)


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Asks every call but those of health for a tenant's token; the tenant is then `tenant_of_call`. Deny by default."""

    def __init__(self, tenants: Tenants, *, refused: Refused) -> None:
        self._tenants = tenants
        self._refused = refused

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:  # noqa: ANN401
        """Pass the call on, or answer it UNAUTHENTICATED without reading a message."""
        method = str(handler_call_details.method)
        if method.startswith(HEALTH_PREFIX):
            return await continuation(handler_call_details)
        try:
            tenant_of_call.set(self._tenants.tenant_of(_metadata(handler_call_details, "authorization")))
        except Unauthenticated as error:
            self._refused(method, error)
            return _refusing(error)
        return await continuation(handler_call_details)


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """How much is let in and how long anything before the handler may take."""

    max_message_bytes: int
    max_inflight_bytes: int
    max_concurrent_requests: int
    max_wait_s: float = 1.0
    message_timeout_s: float = 30.0
    idle_timeout_s: float = 5.0
    max_health_checks: int = 64
    max_health_watches: int = 32
    max_health_bytes: int = 1024
    health_timeout_s: float = 1.0


@dataclass(frozen=True, slots=True)
class _Door:
    """What calls of one kind pass: places, bytes held, bytes that may come undeclared while messages are read, the size and the time of one message."""

    budget: ByteBudget
    unproven: ByteBudget
    max_bytes: int
    timeout_s: float
    places: RequestLimit | None = None


class AdmissionInterceptor(grpc.aio.ServerInterceptor):
    """Puts every method behind the budgets: bytes as declared in metadata, else counted as the message limit, until the call has ended."""

    def __init__(self, limits: AdmissionLimits, *, refused: Refused) -> None:
        self.limits = limits
        self.refused = refused
        self.liars = Liars()
        self.turns = Turns()
        self.budget = ByteBudget(limits.max_inflight_bytes, name="router.max_inflight_bytes")
        unproven = ByteBudget(UNPROVEN_READS * limits.max_message_bytes, name="undeclared bytes")
        message = (limits.max_message_bytes, limits.message_timeout_s)
        self._plain = _Door(self.budget, unproven, *message)
        self._data = _Door(self.budget, unproven, *message, RequestLimit(limits.max_concurrent_requests))
        checks = RequestLimit(limits.max_health_checks, name="health checks")
        watches = RequestLimit(limits.max_health_watches, name="health watches")
        held = ByteBudget((checks.limit + watches.limit) * limits.max_health_bytes, name="health")
        health = (held, ByteBudget(HEALTH_READS * limits.max_message_bytes, name="health"), limits.max_health_bytes, limits.health_timeout_s)
        self._checks, self._watches = _Door(*health, checks), _Door(*health, watches)

    def door(self, method: str) -> _Door:
        """Where calls of a method come in."""
        if method.startswith(HEALTH_PREFIX):
            return self._watches if method == HEALTH_WATCH else self._checks
        return self._data if method in DATA_METHODS else self._plain

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:  # noqa: ANN401
        """The handler behind the budgets; reflection, a stream of small messages, passes as it is."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None:
            return None
        call = _Call(self, method, _metadata(handler_call_details, SIZE_KEY), handler)
        if handler.unary_unary is not None and call.is_small:
            return grpc.stream_unary_rpc_method_handler(partial(_without_frames, call.small), None, handler.response_serializer)
        if handler.unary_unary is not None:
            answer = call.unary
        elif handler.unary_stream is not None:
            answer = call.unary_stream
        elif method in DATA_METHODS:
            answer = call.stream
        else:
            return handler
        return grpc.stream_stream_rpc_method_handler(partial(_without_frames, answer), None, handler.response_serializer)


class _Admitted:
    """A call's place and bytes, held for a block. Written out, since a generator for each call costs more than all that it does."""

    __slots__ = ("_call", "_context", "_is_stream", "_lease", "_places")

    def __init__(self, call: _Call, context: Any, *, is_stream: bool) -> None:  # noqa: ANN401  (grpc's)
        self._call = call
        self._context = context
        self._is_stream = is_stream
        self._lease: ByteLease | None = None
        self._places: RequestLimit | None = None

    async def __aenter__(self) -> ByteLease:
        places = self._call.door.places
        try:
            if places is not None:
                places.enter(self._context.time_remaining())
                self._places = places
            self._lease = await self._call.admit(self._context, is_stream=self._is_stream)
        except BaseException as error:
            self._leave(in_vain=True)
            if isinstance(error, MoeError):
                await self._call.end(self._context, error)
            raise
        return self._lease

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if isinstance(error, MoeError):
                await self._call.end(self._context, error)
        finally:
            self._leave(in_vain=isinstance(error, asyncio.CancelledError) or (error is not None and self._context.code() in _IN_VAIN))

    def _leave(self, *, in_vain: bool) -> None:
        if self._lease is not None:
            self._lease.release()
        if self._places is not None:
            self._places.leave(in_vain=in_vain)


class _Call:
    """One call of one method: admitted, read, handled, let go."""

    def __init__(self, admission: AdmissionInterceptor, method: str, declared: str | None, handler: Any) -> None:  # noqa: ANN401  (grpc's)
        self._admission = admission
        self._limits = admission.limits
        self.door = admission.door(method)
        self._is_handled = False
        self._method = method
        self._declared = declared
        self._handler = handler

    @property
    def is_small(self) -> bool:
        """Whether the call declares so little that its reply may leave together with its status, which is faster, and after its bytes are given back."""
        return self._declared is not None and len(self._declared) <= SMALL_DIGITS

    async def small(self, _: Any, context: Any) -> Any:  # noqa: ANN401
        async with self._admitted(context, is_stream=False) as lease:
            request = await self._message(context, lease)
            await self._admission.turns.take()
            return await self._handler.unary_unary(request, context)

    async def unary(self, _: Any, context: Any) -> None:  # noqa: ANN401
        async with self._admitted(context, is_stream=False) as lease:
            request = await self._message(context, lease)
            await self._admission.turns.take()
            reply = await self._handler.unary_unary(request, context)
            # Written here, so that the bytes are held until the caller has taken the reply.
            await self._write(context, reply)

    async def unary_stream(self, _: Any, context: Any) -> None:  # noqa: ANN401
        async with self._admitted(context, is_stream=False) as lease:
            request = await self._message(context, lease)
            await self._pump(self._handler.unary_stream(request, context), context)

    async def stream(self, _: Any, context: Any) -> None:  # noqa: ANN401
        async with self._admitted(context, is_stream=True) as lease:
            admitted_bytes.set(lease.num_bytes)
            self._is_handled = True
            await self._pump(self._handler.stream_stream(self._messages(context, lease), context), context)

    def _admitted(self, context: Any, *, is_stream: bool) -> _Admitted:  # noqa: ANN401
        """Hold a place and the bytes while the block runs. What goes wrong around the handler ends the call with its status."""
        return _Admitted(self, context, is_stream=is_stream)

    async def admit(self, context: Any, *, is_stream: bool) -> ByteLease:  # noqa: ANN401
        """The bytes of this call. Raises MoeError for what is not let in."""
        if self._admission.liars and self._caller(context) in self._admission.liars:
            self._declared = None
        return await self._acquire(context, self.door.budget, self._declared_bytes(is_stream=is_stream))

    async def end(self, context: Any, error: MoeError) -> NoReturn:  # noqa: ANN401
        """End the call with a status. A handler counts its own calls: what goes wrong after it, as a reply that nobody takes, is not counted again."""
        if not self._is_handled:
            self._admission.refused(self._method, error)
        await abort(context, error)

    async def _acquire(self, context: Any, budget: ByteBudget, num_bytes: int) -> ByteLease:  # noqa: ANN401
        lease = budget.take(num_bytes)
        if lease is not None:
            return lease
        remaining_s = context.time_remaining()
        wait_s = self._limits.max_wait_s if remaining_s is None else max(0.0, min(self._limits.max_wait_s, remaining_s))
        return await budget.acquire(num_bytes, timeout_s=wait_s)

    def _caller(self, context: Any) -> tuple[str, str]:  # noqa: ANN401
        """Tenant and host: a new connection makes no new caller, and another host of the tenant is not to blame."""
        return tenant_of_call.get(), str(context.peer()).rpartition(":")[0]

    def _declared_bytes(self, *, is_stream: bool) -> int:
        text = self._declared
        if text is None:
            return self.door.max_bytes
        if not (text.isascii() and text.isdigit() and len(text) <= MAX_SIZE_DIGITS):
            message = f"metadata `{SIZE_KEY}` must be a number of bytes in decimal digits"
            raise InvalidRequest(message, field=SIZE_KEY)
        limit = self._limits.max_inflight_bytes if is_stream else self.door.max_bytes
        if int(text) > limit:
            name, remedy = ("router.max_inflight_bytes", "send fewer tokens at once") if is_stream else ("router.max_message_bytes", "use DispatchStream")
            message = f"the message has {int(text)} bytes, over the limit of {limit} ({name}); {remedy}"
            raise MessageTooLarge(message, limit_bytes=limit)
        return int(text)

    async def _message(self, context: Any, lease: ByteLease) -> Message:  # noqa: ANN401
        """The one request message; the lease then holds its true size."""
        # A small message comes at once or not at all; waiting for it keeps others from being read.
        timeout_s = min(self.door.timeout_s, self._limits.idle_timeout_s) if self.is_small else self.door.timeout_s
        raw = await self._read(context, lease, timeout_s)
        if raw is None:
            message = f"no whole message came: it was missing, or over the limit of {self._limits.max_message_bytes} bytes (router.max_message_bytes)"
            raise InvalidRequest(message, field="message")
        lease.shrink(len(raw))
        request = self._decode(raw)
        self._is_handled = True
        return request

    async def _messages(self, context: Any, lease: ByteLease) -> AsyncIterator[Message]:  # noqa: ANN401
        while (raw := await self._read(context, lease, self._limits.idle_timeout_s)) is not None:
            yield self._decode(raw)

    async def _read(self, context: Any, lease: ByteLease, timeout_s: float) -> bytes | None:  # noqa: ANN401
        """The next message. It may be as large as the transport allows while it is read, and must be no larger than what was admitted."""
        undeclared = self._limits.max_message_bytes - lease.num_bytes
        unproven = await self._acquire(context, self.door.unproven, undeclared) if undeclared > 0 else None
        try:
            async with asyncio.timeout(timeout_s):
                raw = await context.read()
        except TimeoutError:
            message = f"no message came for {timeout_s:g} s; the call is closed: send without pauses"
            raise DeadlineExceeded(message) from None
        finally:
            if unproven is not None:
                unproven.release()
        if raw is grpc.aio.EOF:
            return None
        if len(raw) > lease.num_bytes:
            self._refuse_lie(context, len(raw), lease.num_bytes)
        return bytes(raw)

    def _refuse_lie(self, context: Any, num_bytes: int, admitted: int) -> NoReturn:  # noqa: ANN401
        if self._declared is None:
            message = f"the message has {num_bytes} bytes, over the limit of {admitted} for this method"
            raise MessageTooLarge(message, limit_bytes=admitted)
        self._admission.liars.add(self._caller(context))
        message = f"the message has {num_bytes} bytes, more than the {admitted} declared in metadata `{SIZE_KEY}`; declare the true size"
        raise InvalidRequest(message, field=SIZE_KEY)

    async def _pump(self, replies: Any, context: Any) -> None:  # noqa: ANN401
        """Write what a handler yields; one that writes itself is awaited."""
        if not hasattr(replies, "__aiter__"):
            await replies
            return
        async with contextlib.aclosing(replies):
            async for reply in replies:
                await self._write(context, reply)

    async def _write(self, context: Any, reply: Message) -> None:  # noqa: ANN401
        timeout_s = self._limits.message_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await context.write(reply)
        except TimeoutError:
            message = f"the reply was not taken for {timeout_s:g} s; the call is closed: read without pauses"
            raise DeadlineExceeded(message) from None

    def _decode(self, raw: bytes) -> Message:
        try:
            request: Message = self._handler.request_deserializer(raw)
        except DecodeError:
            message = f"the message is not one that {self._method} takes; check the client's protos"
            raise InvalidRequest(message, field="message") from None
        return request


async def _without_frames(answer: Callable[[Any, Any], Awaitable[Any]], messages: Any, context: Any) -> Any:  # noqa: ANN401  (grpc's)
    """Answer a call. grpc keeps what ended it, in a cycle, until the garbage collector comes by: that must not hold the call's frames, nor its message."""
    try:
        return await answer(messages, context)
    except grpc.aio.AbortError as ended:
        ended.__traceback__ = ended.__context__ = None
        raise


def _metadata(details: grpc.HandlerCallDetails, key: str) -> str | None:
    for name, value in details.invocation_metadata or ():
        if name == key:
            return value if isinstance(value, str) else None
    return None


def _refusing(error: MoeError) -> Any:  # noqa: ANN401
    """A handler that ends its call at once; as a stream, so that no message is read."""

    async def refuse(_: Any, context: Any) -> None:  # noqa: ANN401
        await abort(context, error)

    return grpc.stream_unary_rpc_method_handler(partial(_without_frames, refuse))
