"""The expert link's wire format: a fixed prefix, a msgpack header, a raw tensor body. Bytes in, values out, no I/O.

    prefix   magic "MOEL" | protocol u16 | kind u16 | header length u32 | body length u64      little-endian
    header   one msgpack array per frame kind, fields in the order of its dataclass
    body     the rows of every segment, one segment after the other, row-major, in the segment's dtype; empty for control frames

Both lengths are checked against limits before anything is allocated, and every count in a header before it is used. Nothing is ever pickled.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import msgpack

from cluster.core.descriptors import DType
from cluster.core.errors import InvalidRequest, ProtocolMismatch
from cluster.core.ids import Role
from cluster.core.link_frames import (
    MAX_TRACEPARENTS,
    Cancel,
    Challenge,
    Cool,
    Fault,
    FaultReply,
    Forward,
    Frame,
    FrameStatus,
    Goodbye,
    Ping,
    Pong,
    Proof,
    Refusal,
    Result,
    Run,
    Segment,
    SegmentResult,
    SegmentStatus,
    Tether,
    Warm,
    Welcome,
)
from cluster.core.link_values import bytes_of, check_counts, count_of, flag_of, seconds_of, size_of, text_of

MAGIC = b"MOEL"
PROTOCOL = 1  # of the layout; what the two sides may say to each other beyond it, they agree on in the handshake
PREFIX = struct.Struct("<4sHHIQ")
MAX_HEADER_BYTES = 1 << 20
MAX_HANDSHAKE_BYTES = 4096
MAX_ITEMS = 4096

_KINDS: dict[int, type[Frame]] = {
    kind.KIND: kind for kind in (Challenge, Proof, Welcome, Refusal, Tether, Forward, Result, Ping, Pong, Cancel, Goodbye, Warm, Cool, Fault, FaultReply)
}
_HANDSHAKE_KINDS = frozenset({Challenge.KIND, Proof.KIND, Welcome.KIND, Refusal.KIND, Tether.KIND})
# Looked up by value: an enum's own call is Python, and takes longer than all other checks of a segment.
_DTYPES: dict[str, DType] = {member.value: member for member in DType}
_ROLES: dict[int, Role] = {member.value: member for member in Role}
_STATUSES: dict[int, SegmentStatus] = {member.value: member for member in SegmentStatus}
_FRAME_STATUSES: dict[int, FrameStatus] = {member.value: member for member in FrameStatus}
_WITH_BODY = (Forward, Result)
_F = TypeVar("_F")


@dataclass(frozen=True, slots=True)
class Prefix:
    """What the fixed prefix says is coming."""

    kind: int
    header_bytes: int
    body_bytes: int


def encode(frame: Frame) -> bytes:
    """Prefix and header of a frame, to be followed by exactly its body bytes."""
    header: bytes = msgpack.packb(_fields_of(frame), use_bin_type=True)
    if len(header) > MAX_HEADER_BYTES:
        message = f"link header of {len(header)} bytes is over the limit of {MAX_HEADER_BYTES}; send fewer segments or runs in a frame"
        raise InvalidRequest(message, field="link.header")
    body_bytes = frame.body_bytes if isinstance(frame, _WITH_BODY) else 0
    return PREFIX.pack(MAGIC, PROTOCOL, frame.KIND, len(header), body_bytes) + header


def body_bytes_of(header: bytes) -> int:
    """How many bytes of body follow what `encode` gave."""
    body_bytes: int = PREFIX.unpack_from(header)[-1]
    return body_bytes


def _fields_of(frame: Frame) -> tuple[Any, ...]:
    if isinstance(frame, Forward):
        return (frame.frame_id, frame.generation, frame.traceparents, [_segment_fields(segment) for segment in frame.segments])
    if isinstance(frame, Result):
        segments = [
            (item.segment_id, item.attempt, item.status, item.dtype, item.dim, item.num_rows, item.expired_runs, item.message) for item in frame.segments
        ]
        return (frame.frame_id, frame.generation, frame.status, frame.queue_s, frame.compute_s, segments)
    return tuple(getattr(frame, entry.name) for entry in fields(frame))


def _segment_fields(segment: Segment) -> tuple[Any, ...]:
    runs = [(run.num_rows, run.timeout_ms, run.exact, run.epoch) for run in segment.runs]
    place = (segment.segment_id, segment.attempt, segment.model, segment.layer, segment.index, segment.version)
    return (*place, segment.role, segment.dtype, segment.dim, runs)


def decode_prefix(data: bytes | memoryview, *, max_body_bytes: int, handshake: bool = False) -> Prefix:
    """Check a prefix before a byte of what follows is read. During the handshake only its own small frames pass, of any protocol.

    Raises ProtocolMismatch for another protocol or an unexpected kind, InvalidRequest for lengths over the limits.
    """
    magic, protocol, kind, header_bytes, body_bytes = PREFIX.unpack(data)
    if magic != MAGIC:
        message = "not an expert link: the first bytes are wrong; check the port"
        raise ProtocolMismatch(message)
    if protocol != PROTOCOL and not handshake:
        message = f"link protocol {protocol} is not spoken here (this side speaks {PROTOCOL}); update the older side"
        raise ProtocolMismatch(message)
    if kind not in _KINDS or (handshake != (kind in _HANDSHAKE_KINDS)):
        message = f"link frame kind {kind} is not expected now"
        raise ProtocolMismatch(message)
    limit = MAX_HANDSHAKE_BYTES if handshake else MAX_HEADER_BYTES
    if header_bytes > limit:
        message = f"link header of {header_bytes} bytes is over the limit of {limit}"
        raise InvalidRequest(message, field="link.header")
    carries_body = kind in (Forward.KIND, Result.KIND)
    if body_bytes > (max_body_bytes if carries_body else 0):
        message = f"link body of {body_bytes} bytes is over the limit of {max_body_bytes if carries_body else 0} (link.max_frame_bytes)"
        raise InvalidRequest(message, field="link.body")
    return Prefix(kind, header_bytes, body_bytes)


def decode(prefix: Prefix, header: bytes | memoryview) -> Frame:
    """The frame of a checked prefix. Raises InvalidRequest for a header that is malformed or disagrees with the body length."""
    kind = _KINDS[prefix.kind]
    try:
        # The bounds keep a header that lies about its counts from reserving memory: nested arrays are allocated as they are announced.
        values = msgpack.unpackb(header, raw=False, use_list=False, max_array_len=MAX_ITEMS, max_map_len=0, max_ext_len=0)
        frame = _build(kind, values)
    except (ValueError, TypeError, KeyError, msgpack.exceptions.UnpackException) as error:
        message = f"link header of kind {prefix.kind} is malformed ({type(error).__name__})"
        raise InvalidRequest(message, field="link.header") from error
    body_bytes = frame.body_bytes if isinstance(frame, _WITH_BODY) else 0
    if body_bytes != prefix.body_bytes:
        message = f"link body has {prefix.body_bytes} bytes where its segments need {body_bytes}"
        raise InvalidRequest(message, field="link.body")
    return frame


def _build(kind: type[Frame], values: Any) -> Frame:  # noqa: ANN401  (untrusted msgpack, checked field by field)
    if kind is Forward:
        frame_id, generation, traceparents, segments = values
        if len(traceparents) > MAX_TRACEPARENTS or not segments:
            message = "items"
            raise ValueError(message)
        return Forward(count_of(frame_id), count_of(generation), tuple(map(text_of, traceparents)), tuple(map(_segment, segments)))
    if kind is Result:
        frame_id, generation, status, queue_s, compute_s, segments = values
        check_counts(frame_id, generation, status)
        return Result(frame_id, generation, _FRAME_STATUSES[status], seconds_of(queue_s), seconds_of(compute_s), tuple(map(_segment_result, segments)))
    if kind is Cancel:
        frame_id, segment_ids = values
        return Cancel(count_of(frame_id), tuple(map(count_of, segment_ids)))
    return _plain(kind, values)


def _plain(kind: type[_F], values: Any) -> _F:  # noqa: ANN401
    expected = fields(kind)  # type: ignore[arg-type]
    return kind(*(_CHECKS[str(entry.type)](value) for entry, value in zip(expected, values, strict=True)))


def _segment(values: Any) -> Segment:  # noqa: ANN401
    segment_id, attempt, model, layer, index, version, role, dtype, dim, runs = values
    if not runs:
        message = "runs"
        raise ValueError(message)
    check_counts(segment_id, attempt, layer, index, role)
    parsed = tuple([Run(size_of(rows), count_of(timeout_ms), flag_of(exact), count_of(epoch)) for rows, timeout_ms, exact, epoch in runs])
    copy = (text_of(model), layer, index, bytes_of(version), _ROLES[role])
    return Segment(segment_id, attempt, *copy, _DTYPES[text_of(dtype)], size_of(dim), parsed)


def _segment_result(values: Any) -> SegmentResult:  # noqa: ANN401
    segment_id, attempt, status, dtype, dim, num_rows, expired, message = values
    check_counts(segment_id, attempt, status, num_rows, *expired)
    ended = _STATUSES[status]
    if num_rows and ended is not SegmentStatus.OK:
        text = "rows"
        raise ValueError(text)
    return SegmentResult(segment_id, attempt, ended, _DTYPES[text_of(dtype)], size_of(dim), num_rows, tuple(expired), text_of(message))


_CHECKS: dict[str, Callable[[Any], object]] = {"int": count_of, "str": text_of, "bytes": bytes_of, "bool": flag_of, "float": seconds_of}
