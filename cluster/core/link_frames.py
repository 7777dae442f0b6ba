"""The expert link's wire format: a fixed prefix, a msgpack header, a raw tensor body. Bytes in, values out, no I/O.

    prefix   magic "MOEL" | protocol u16 | kind u16 | header length u32 | body length u64      little-endian
    header   one msgpack array per frame kind, fields in the order of its dataclass
    body     the rows of every segment, one segment after the other, row-major, in the segment's dtype; empty for control frames

Both lengths are checked against limits before anything is allocated, and every count in a header before it is used. Nothing is ever pickled.

Handshake (challenge-response, mutual; `link_handshake` holds its two sides; its frames keep their layout in every protocol):
    actor -> router  Challenge     router -> actor  Proof     actor -> router  Welcome     either side, instead: Refusal
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, ClassVar, TypeVar

import msgpack

from cluster.core.descriptors import DType
from cluster.core.errors import InvalidRequest, ProtocolMismatch
from cluster.core.ids import Incarnation, Role
from cluster.core.link_values import bytes_of, count_of, flag_of, seconds_of, size_of, text_of

MAGIC = b"MOEL"
PROTOCOL = 1
PREFIX = struct.Struct("<4sHHIQ")
MAX_HEADER_BYTES = 1 << 20
MAX_HANDSHAKE_BYTES = 4096
NONCE_BYTES = 32
MAX_ITEMS = 4096
MAX_TRACEPARENTS = 16


class SegmentStatus(IntEnum):
    """How a segment ended in the actor. Runs whose time was up are named by a result of any status."""

    OK = 1
    NOT_HELD = 2
    FAULTED = 3
    OVERLOADED = 4
    DRAINING = 5
    OUT_OF_MEMORY = 6


class FrameStatus(IntEnum):
    """Whether an actor took a frame at all; by the fencing rule only another generation refuses a whole frame."""

    OK = 1
    WRONG_GENERATION = 2


@dataclass(frozen=True, slots=True)
class Challenge:
    """Actor to router, first: who I am and a nonce to prove the key with."""

    KIND: ClassVar[int] = 1
    min_protocol: int
    max_protocol: int
    actor_id: str
    generation: int
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Proof:
    """Router to actor: the key is known here; prove it there."""

    KIND: ClassVar[int] = 2
    protocol: int
    router_id: str
    nonce: bytes
    mac: bytes


@dataclass(frozen=True, slots=True)
class Welcome:
    """Actor to router: proven; the limits that hold on this link."""

    KIND: ClassVar[int] = 3
    mac: bytes
    max_frame_bytes: int
    max_tokens_per_frame: int
    frames_in_flight: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Either side, instead of going on with the handshake. `reason` is the stable name of an error of the tree, `message` is for people."""

    KIND: ClassVar[int] = 4
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive rows of a segment that belong to one request.

    `timeout_ms` is what was left of its time when the frame was sent; `epoch` is recorded, not compared.
    """

    num_rows: int
    timeout_ms: int
    exact: bool
    epoch: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A frame's part for one copy of one expert: the unit of hedging, failure and provenance. Its rows are [num_rows, dim] of `dtype` in the body."""

    segment_id: int
    attempt: int
    model: str
    layer: int
    index: int
    version: bytes
    role: Role
    dtype: DType
    dim: int
    runs: tuple[Run, ...]

    @property
    def num_rows(self) -> int:
        """Rows over all runs."""
        return sum(run.num_rows for run in self.runs)

    @property
    def num_bytes(self) -> int:
        """Bytes of this segment in the body."""
        return self.num_rows * self.dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Forward:
    """Router to actor: compute these segments. `traceparents` are W3C contexts of the sampled requests merged here (at most 16)."""

    KIND: ClassVar[int] = 10
    frame_id: int
    generation: int
    traceparents: tuple[str, ...]
    segments: tuple[Segment, ...]

    @property
    def body_bytes(self) -> int:
        """Bytes the body must have."""
        return sum(segment.num_bytes for segment in self.segments)


@dataclass(frozen=True, slots=True)
class SegmentResult:
    """How one segment ended.

    With OK the body holds its rows in order, less the runs in `expired_runs` (indices), which were dropped before they were computed.
    """

    segment_id: int
    attempt: int
    status: SegmentStatus
    dtype: DType
    dim: int
    num_rows: int
    expired_runs: tuple[int, ...]
    message: str

    @property
    def num_bytes(self) -> int:
        """Bytes of this segment in the body."""
        return self.num_rows * self.dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Result:
    """Actor to router: the answer to one Forward, and where its time went."""

    KIND: ClassVar[int] = 11
    frame_id: int
    generation: int
    status: FrameStatus
    queue_s: float
    compute_s: float
    segments: tuple[SegmentResult, ...]

    @property
    def body_bytes(self) -> int:
        """Bytes the body must have."""
        return sum(segment.num_bytes for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Ping:
    """Router to actor: are you making progress?"""

    KIND: ClassVar[int] = 20
    sequence: int


@dataclass(frozen=True, slots=True)
class Pong:
    """Actor to router: progress of the compute thread, not of an idle loop."""

    KIND: ClassVar[int] = 21
    sequence: int
    generation: int
    frames_done: int
    oldest_age_s: float
    queued_tokens: int
    is_loading: bool


@dataclass(frozen=True, slots=True)
class Cancel:
    """Router to actor: nobody waits for these segments of a frame any more; skip those that have not started."""

    KIND: ClassVar[int] = 22
    frame_id: int
    segment_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Goodbye:
    """Either side: this link ends in order; `reason` is for people."""

    KIND: ClassVar[int] = 23
    reason: str


Frame = Challenge | Proof | Welcome | Refusal | Forward | Result | Ping | Pong | Cancel | Goodbye
_KINDS: dict[int, type[Frame]] = {kind.KIND: kind for kind in (Challenge, Proof, Welcome, Refusal, Forward, Result, Ping, Pong, Cancel, Goodbye)}
_HANDSHAKE_KINDS = frozenset({Challenge.KIND, Proof.KIND, Welcome.KIND, Refusal.KIND})
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
    body_bytes = frame.body_bytes if isinstance(frame, Forward | Result) else 0
    return PREFIX.pack(MAGIC, PROTOCOL, frame.KIND, len(header), body_bytes) + header


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
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        message = f"link header of kind {prefix.kind} is malformed ({type(error).__name__})"
        raise InvalidRequest(message, field="link.header") from error
    body_bytes = frame.body_bytes if isinstance(frame, Forward | Result) else 0
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
        parents = tuple(text_of(item) for item in traceparents)
        return Forward(count_of(frame_id), count_of(generation), parents, tuple(_segment(item) for item in segments))
    if kind is Result:
        frame_id, generation, status, queue_s, compute_s, segments = values
        results = tuple(_segment_result(item) for item in segments)
        return Result(count_of(frame_id), count_of(generation), FrameStatus(count_of(status)), seconds_of(queue_s), seconds_of(compute_s), results)
    if kind is Cancel:
        frame_id, segment_ids = values
        return Cancel(count_of(frame_id), tuple(count_of(item) for item in segment_ids))
    return _plain(kind, values)


def _plain(kind: type[_F], values: Any) -> _F:  # noqa: ANN401
    expected = fields(kind)  # type: ignore[arg-type]
    return kind(*(_CHECKS[str(entry.type)](value) for entry, value in zip(expected, values, strict=True)))


def _segment(values: Any) -> Segment:  # noqa: ANN401
    segment_id, attempt, model, layer, index, version, role, dtype, dim, runs = values
    if not runs:
        message = "runs"
        raise ValueError(message)
    parsed = tuple(Run(size_of(rows), count_of(timeout_ms), flag_of(exact), count_of(epoch)) for rows, timeout_ms, exact, epoch in runs)
    place = (count_of(segment_id), count_of(attempt), text_of(model), count_of(layer), count_of(index), bytes_of(version))
    return Segment(*place, Role(count_of(role)), DType(text_of(dtype)), size_of(dim), parsed)


def _segment_result(values: Any) -> SegmentResult:  # noqa: ANN401
    segment_id, attempt, status, dtype, dim, num_rows, expired, message = values
    ended = SegmentStatus(count_of(status))
    if num_rows and ended is not SegmentStatus.OK:
        text = "rows"
        raise ValueError(text)
    dropped = tuple(count_of(item) for item in expired)
    return SegmentResult(count_of(segment_id), count_of(attempt), ended, DType(text_of(dtype)), size_of(dim), count_of(num_rows), dropped, text_of(message))


_CHECKS: dict[str, Callable[[Any], object]] = {"int": count_of, "str": text_of, "bytes": bytes_of, "bool": flag_of, "float": seconds_of}


def derive_link_key(secret: bytes, incarnation: Incarnation) -> bytes:
    """The link key of one incarnation: a key that leaks with one actor opens no other."""
    key: bytes = hmac.new(secret, f"moelastic/link/{incarnation}".encode(), hashlib.sha256).digest()
    return key
