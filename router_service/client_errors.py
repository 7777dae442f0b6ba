"""gRPC statuses as exceptions of the one error tree: the one table from gRPC to the caller.

A status with our ErrorInfo becomes the class it was raised as, with its fields. One without comes from gRPC itself or from something in between.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from cluster.core.errors import (
    DataLoss,
    DeadlineExceeded,
    ExpertUnavailable,
    InvalidRequest,
    InvariantBroken,
    MessageTooLarge,
    MoeError,
    NotFound,
    NotReady,
    Overloaded,
    ProtocolMismatch,
    Unauthenticated,
)

DOMAIN: Final = "moelastic"
MAX_ROWS: Final = 65_536
_RANGE: Final = re.compile(r"[0-9]{1,12}(-[0-9]{1,12})?")
# What grpc.aio says when a call ends under a write; the status that the router sent is lost then.
_BROKEN_WRITE: Final = "Internal error from Core"
_TOO_LARGE: Final = re.compile(r"larger than max(?: \(\d+ vs\. (\d+)\))?")
_PLAIN: Final[dict[grpc.StatusCode, type[MoeError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: NotReady,
    # We did not cancel: the router's process ended the call on its way down.
    grpc.StatusCode.CANCELLED: NotReady,
    grpc.StatusCode.ABORTED: NotReady,
    grpc.StatusCode.UNIMPLEMENTED: ProtocolMismatch,
    grpc.StatusCode.FAILED_PRECONDITION: ProtocolMismatch,
    grpc.StatusCode.DATA_LOSS: DataLoss,
}


def error_of(error: grpc.RpcError, *, address: str) -> MoeError:
    """The exception that a failed call stands for."""
    details = list(_details(error))
    info = next((item for item in details if isinstance(item, error_details_pb2.ErrorInfo) and item.domain == DOMAIN), None)
    kind = None if info is None else _kinds().get(info.reason)
    if info is None or kind is None:
        return _plain(error, address)
    return _rebuilt(kind, str(error.details()), info, details)


def rows_of(text: str) -> tuple[int, ...]:
    """Row numbers from `0-15,17`; at most MAX_ROWS of them, none from a text in another form."""
    rows: list[int] = []
    for part in text.split(","):
        if not _RANGE.fullmatch(part):
            return ()
        first, _, last = part.partition("-")
        room = MAX_ROWS - len(rows)
        rows.extend(range(int(first), min(int(last or first), int(first) + room - 1) + 1))
    return tuple(rows)


def _plain(error: grpc.RpcError, address: str) -> MoeError:
    code: grpc.StatusCode = error.code()
    text = str(error.details() or "")
    too_large = _TOO_LARGE.search(text)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and too_large:
        limit = int(too_large.group(1) or 0)
        shown = f"of {limit} bytes " if limit else ""
        settings = "router.max_message_bytes, or this client's max_message_bytes"
        message = f"a message is over the receive limit {shown}({settings}); use DispatchStream or send fewer tokens"
        return MessageTooLarge(message, limit_bytes=limit)
    if code is grpc.StatusCode.INTERNAL and text == _BROKEN_WRITE:
        return NotReady(f"the router at {address} ended the call while the request was sent; is it running? `moelastic status` tells")
    kind = _PLAIN.get(code, InvariantBroken)
    if kind is NotReady:
        return NotReady(f"no answer from the router at {address} ({text or code.name}); is it running? `moelastic status` tells")
    if kind is DeadlineExceeded:
        return DeadlineExceeded(f"no answer from the router at {address} in time; allow more with timeout_s")
    if kind is InvariantBroken:
        return InvariantBroken(f"the call to {address} ended as {code.name}: {text}")
    return kind(text or code.name)


def _rebuilt(kind: type[MoeError], message: str, info: error_details_pb2.ErrorInfo, details: list[Message]) -> MoeError:
    fields: dict[str, Any] = {}
    if issubclass(kind, InvalidRequest):
        fields["field"] = next((item.field_violations[0].field for item in details if isinstance(item, error_details_pb2.BadRequest)), "")
    elif issubclass(kind, NotFound):
        found = next((item for item in details if isinstance(item, error_details_pb2.ResourceInfo)), error_details_pb2.ResourceInfo())
        fields.update(resource=found.resource_type, name=found.resource_name)
    elif issubclass(kind, MessageTooLarge):
        text = info.metadata.get("limit_bytes", "")
        fields["limit_bytes"] = int(text) if text.isdigit() else 0
    elif issubclass(kind, ExpertUnavailable | DataLoss):
        fields["failed_rows"] = rows_of(info.metadata.get("failed_rows", ""))
    if issubclass(kind, ExpertUnavailable | Overloaded) and not issubclass(kind, MessageTooLarge):
        pause = next((item.retry_delay for item in details if isinstance(item, error_details_pb2.RetryInfo)), None)
        if pause is not None:
            fields["retry_after_s"] = pause.ToMilliseconds() / 1000
    return kind(message, **fields)


def _details(error: grpc.RpcError) -> Iterator[Message]:
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError, AttributeError):
        return
    for packed in () if status is None else status.details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.ResourceInfo, error_details_pb2.RetryInfo):
            if packed.Is(kind.DESCRIPTOR):
                detail = kind()
                if packed.Unpack(detail):
                    yield detail


def _kinds() -> dict[str, type[MoeError]]:
    found: dict[str, type[MoeError]] = {}
    waiting: list[type[MoeError]] = [MoeError]
    while waiting:
        kind = waiting.pop()
        found[kind("").reason] = kind
        waiting.extend(kind.__subclasses__())
    return found
