"""Our errors as gRPC statuses with `google.rpc` details: the one table from ours to gRPC. A message stands alone; details are for programs.

Every status carries an ErrorInfo (reason, request id, whether a retry can help). Beside it, by kind: BadRequest (the field), ResourceInfo (what was
asked for), RetryInfo (when to come back), and for rows that failed the caller's own row numbers, as ranges, in ErrorInfo's metadata.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final, NoReturn, Protocol

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from cluster.core.errors import (
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    ExpertUnavailable,
    InvalidRequest,
    InvariantBroken,
    MessageTooLarge,
    MoeError,
    NotFound,
    Overloaded,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

DOMAIN: Final = "moelastic"
PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"
DEFAULT_RETRY_AFTER_S: Final = 0.5
# Trailing metadata beyond 8 KiB is refused by stock clients: the message, its copy in the details and base64 must all fit below.
MAX_MESSAGE_CHARACTERS: Final = 800
MAX_FAILED_ROWS: Final = 1000
MAX_FAILED_ROWS_CHARACTERS: Final = 2600


class AbortContext(Protocol):
    """The part of a servicer context that ends a call."""

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Sequence[tuple[str, str | bytes]] = ()) -> NoReturn:
        """End the call with this status."""
        ...


def translated(error: BaseException) -> MoeError:
    """One of ours for anything raised. What is not ours is a bug or a time limit; its text may quote tensors, so only its type is told."""
    if isinstance(error, MoeError):
        return error
    if isinstance(error, TimeoutError):
        return DeadlineExceeded("the request's time ran out before every expert answered; give it a longer timeout or send fewer tokens")
    if isinstance(error, asyncio.CancelledError):
        return Cancelled("the call was cancelled")
    return InvariantBroken(f"internal error ({type(error).__name__}); the router's log has its stack under this request id; please report it")


def code_of(error: BaseException) -> grpc.StatusCode:
    """The gRPC code of anything raised."""
    return grpc.StatusCode[translated(error).status]


def status_of(error: BaseException, *, request_id: str = "") -> status_pb2.Status:
    """The whole google.rpc.Status of anything raised."""
    ours = translated(error)
    message = str(ours) or ours.reason
    if len(message) > MAX_MESSAGE_CHARACTERS:
        message = message[: MAX_MESSAGE_CHARACTERS - 3] + "..."
    details = []
    for detail in _details(ours, message, request_id):
        packed = AnyMessage()
        packed.Pack(detail)
        details.append(packed)
    return status_pb2.Status(code=code_of(ours).value[0], message=message, details=details)


def retry_after_s(error: MoeError) -> float | None:
    """When the same request may succeed; None where a retry cannot help."""
    if not error.retryable:
        return None
    return float(getattr(error, "retry_after_s", DEFAULT_RETRY_AFTER_S))


async def abort(context: AbortContext, error: BaseException, *, request_id: str = "") -> NoReturn:
    """End a call with the status of an error; bugs are logged with their stack, without their text.

    The error has done its work then. Its frames hold all that the call had in hand, and some of them hold the error, so they are let go of.
    """
    ours = translated(error)
    if ours is not error and isinstance(ours, InvariantBroken):
        stack = "".join(traceback.format_tb(error.__traceback__))
        logger.error("request %r failed with %s:\n%s", request_id, type(error).__name__, stack)
    error.__traceback__ = error.__cause__ = error.__context__ = None
    status = rpc_status.to_status(status_of(ours, request_id=request_id))
    pause_s = retry_after_s(ours)
    pushback = () if pause_s is None else ((PUSHBACK_KEY, str(int(pause_s * 1000))),)
    await context.abort(status.code, status.details, (*status.trailing_metadata, *pushback))


def _details(error: MoeError, message: str, request_id: str) -> Iterator[Message]:
    metadata = {"retryable": "true" if error.retryable else "false"}
    if request_id:
        metadata["request_id"] = request_id[:128]
    if isinstance(error, ExpertUnavailable | DataLoss) and error.failed_rows:
        metadata["failed_rows"], num_told = rows_text(error.failed_rows)
        metadata["num_failed_rows"] = str(len(error.failed_rows))
        metadata["num_failed_rows_told"] = str(num_told)
    if isinstance(error, MessageTooLarge) and error.limit_bytes:
        metadata["limit_bytes"] = str(error.limit_bytes)
    yield error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    if isinstance(error, InvalidRequest) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        yield error_details_pb2.BadRequest(field_violations=[violation])
    if isinstance(error, NotFound):
        yield error_details_pb2.ResourceInfo(resource_type=error.resource, resource_name=error.name[:256])
    pause_s = retry_after_s(error)
    if pause_s is not None:
        delay = Duration()
        delay.FromMilliseconds(int(pause_s * 1000))
        yield error_details_pb2.RetryInfo(retry_delay=delay)
    if isinstance(error, Overloaded):
        yield error_details_pb2.QuotaFailure(violations=[error_details_pb2.QuotaFailure.Violation(subject="router", description=message)])


def rows_text(rows: Iterable[int]) -> tuple[str, int]:
    """Row numbers as `0-15,17`, and how many of them it tells: at most MAX_FAILED_ROWS, cut at a whole range when the text grows too long."""
    parts: list[str] = []
    length, num_told = 0, 0
    for first, last in _ranges(rows):
        end = min(last, first + MAX_FAILED_ROWS - num_told - 1)
        part = str(first) if first == end else f"{first}-{end}"
        if end < first or length + len(part) + 1 > MAX_FAILED_ROWS_CHARACTERS:
            break
        parts.append(part)
        length += len(part) + 1
        num_told += end - first + 1
    return ",".join(parts), num_told


def _ranges(rows: Iterable[int]) -> Iterator[tuple[int, int]]:
    first = last = None
    for row in sorted(set(rows)):
        if first is not None and last is not None and row == last + 1:
            last = row
            continue
        if first is not None and last is not None:
            yield first, last
        first = last = row
    if first is not None and last is not None:
        yield first, last
