"""The frames of the expert link, as values. `link_codec` holds their wire format, `link_handshake` the two sides of the handshake.

Handshake (challenge-response, mutual; its frames keep their layout in every protocol):
    actor -> router  Challenge     router -> actor  Proof     actor -> router  Welcome     either side, instead: Refusal
A link's tether, a connection of its own: Challenge, Tether, Welcome, then nothing until one of the two ends.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, NamedTuple

from cluster.core.descriptors import DType
from cluster.core.ids import Incarnation, Role

NONCE_BYTES = 32
MAX_TRACEPARENTS = 16


class SegmentStatus(IntEnum):
    """How a segment ended in the actor. Runs whose time was up are named by a result of any status."""

    OK = 1
    NOT_HELD = 2
    FAULTED = 3
    OVERLOADED = 4
    DRAINING = 5
    OUT_OF_MEMORY = 6
    WRONG_NUMBERS = 7


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
class Tether:
    """Router to actor, instead of a Proof: keep this connection open for as long as your process lives. `nonce` is that of the Proof of its link.

    Only for actors of TETHER_PROTOCOL.
    """

    KIND: ClassVar[int] = 5
    protocol: int
    router_id: str
    nonce: bytes
    mac: bytes


class Run(NamedTuple):
    """Consecutive rows of a segment that belong to one request.

    `timeout_ms` is what was left of its time when the frame was sent; `epoch` is recorded, not compared.
    """

    num_rows: int
    timeout_ms: int
    exact: bool
    epoch: int


class Segment(NamedTuple):
    """A frame's part for one copy of one expert: the unit of hedging, failure and provenance. Its rows are [num_rows, dim] of `dtype` in the body."""

    segment_id: int
    attempt: int
    model: str
    layer: int
    index: int  # type: ignore[assignment]  # (in the place of tuple.index)
    version: bytes
    role: Role
    dtype: DType
    dim: int
    runs: tuple[Run, ...]

    @property
    def num_rows(self) -> int:
        """Rows over all runs."""
        return self.runs[0].num_rows if len(self.runs) == 1 else sum([run.num_rows for run in self.runs])

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
        return sum([segment.num_bytes for segment in self.segments])


class SegmentResult(NamedTuple):
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
        return sum([segment.num_bytes for segment in self.segments])


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


@dataclass(frozen=True, slots=True)
class ShadowHint:
    """Router to actor: what is to be expected of a shadow. Only a hint: no reply."""

    model: str
    layer: int
    index: int
    version: bytes


@dataclass(frozen=True, slots=True)
class Warm(ShadowHint):
    """Rows for this shadow are likely soon, since its replica is suspected; expand it where there is time."""

    KIND: ClassVar[int] = 24


@dataclass(frozen=True, slots=True)
class Cool(ShadowHint):
    """The replica of this shadow is back, the shadow need not stay expanded for this router. Only for actors of COOL_PROTOCOL."""

    KIND: ClassVar[int] = 25


@dataclass(frozen=True, slots=True)
class Fault:
    """Chaos to actor: behave badly in this way until told otherwise. `settings` is JSON. Refused unless the spec allows chaos and the token is right."""

    KIND: ClassVar[int] = 30
    token: bytes
    name: str
    settings: str


@dataclass(frozen=True, slots=True)
class FaultReply:
    """Actor to chaos: whether the fault is as asked; `message` says what was done, or why not, as text for people or JSON for probes."""

    KIND: ClassVar[int] = 31
    ok: bool
    message: str


Frame = Challenge | Proof | Welcome | Refusal | Tether | Forward | Result | Ping | Pong | Cancel | Goodbye | Warm | Cool | Fault | FaultReply


def derive_link_key(secret: bytes, incarnation: Incarnation) -> bytes:
    """The link key of one incarnation: a key that leaks with one actor opens no other."""
    key: bytes = hmac.new(secret, f"moelastic/link/{incarnation}".encode(), hashlib.sha256).digest()
    return key


def derive_fault_token(secret: bytes, incarnation: Incarnation) -> bytes:
    """The fault token of one incarnation, from the deployment's link secret."""
    return fault_token_of(derive_link_key(secret, incarnation), incarnation)


def fault_token_of(link_key: bytes, incarnation: Incarnation) -> bytes:
    """The same, from the incarnation's link key: an actor knows no more than that."""
    token: bytes = hmac.new(link_key, f"moelastic/fault/{incarnation}".encode(), hashlib.sha256).digest()
    return token
