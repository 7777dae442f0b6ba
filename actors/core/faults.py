"""The faults that an actor plays when chaos is allowed: what each asks for, which are active, how often each struck, and what a frame or a reply suffers.

Decisions only: `actors.fault_port` holds, delays, raises and flips. Time arrives as `now_s`, chance as a seed in the fault itself.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError

from cluster.core.errors import InvalidRequest

MAX_FAULT_S = 120.0
MAX_BALLOON_BYTES = 16 << 30
_MAX_FLIPS = 1 << 20
_MAX_DELAY_S = 60.0
_MAX_FACTOR = 1000.0

Bits = Literal["any", "exponent"]


class _Fault(BaseModel):
    """A fault heals itself after `seconds`; None, or nothing said: after the most that is allowed."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    seconds: Annotated[float, Field(gt=0, le=MAX_FAULT_S)] | None = None


class _Counted(_Fault):
    """Strikes `count` times, or until it is healed."""

    count: PositiveInt | None = None


class _OfExpert(_Fault):
    """Hits one held replica: the first one that fits what is said."""

    model: str | None = None
    layer: NonNegativeInt | None = None
    index: NonNegativeInt | None = None


class StuckCompute(_Fault):
    """The compute thread holds the next frame in its hands and does not go on."""


class SlowCompute(_Fault):
    """Every frame takes `factor` times as long."""

    factor: Annotated[float, Field(ge=1, le=_MAX_FACTOR)]


class NanWeights(_OfExpert):
    """One weight of the last matrix becomes NaN or infinite."""

    value: Literal["nan", "inf"] = "nan"


class FlipWeights(_OfExpert):
    """Random bits of a replica's weights are flipped."""

    seed: int = 0
    flips: Annotated[int, Field(ge=1, le=_MAX_FLIPS)] = 1
    bits: Bits = "any"


class FlipOutputs(_Fault):
    """In a share of frames, one random bit of an expert's output is flipped."""

    seed: int = 0
    rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    bits: Bits = "any"


class DropReplies(_Counted):
    """Replies are computed and kept back until this is healed; by then nobody can use them any more."""


class LateReplies(_Counted):
    """Replies leave late."""

    delay_s: Annotated[NonNegativeFloat, Field(le=_MAX_DELAY_S)]


class RaiseForward(_Counted):
    """The forward of a frame raises."""


class RefuseAll(_Fault):
    """Every frame is refused as if the queue were full."""


class Exit(_Fault):
    """The process ends at once with this code."""

    code: Annotated[int, Field(ge=0, le=255)] = 1


class Balloon(_Fault):
    """So many bytes of memory are taken and touched."""

    num_bytes: Annotated[int, Field(alias="bytes", ge=1, le=MAX_BALLOON_BYTES)]


Fault = StuckCompute | SlowCompute | NanWeights | FlipWeights | FlipOutputs | DropReplies | LateReplies | RaiseForward | RefuseAll | Exit | Balloon
_F = TypeVar("_F", bound=_Fault)

FAULTS: Mapping[str, type[Fault]] = {
    "stuck_compute": StuckCompute,
    "slow_compute": SlowCompute,
    "nan_weights": NanWeights,
    "flip_weights": FlipWeights,
    "flip_outputs": FlipOutputs,
    "drop_replies": DropReplies,
    "late_replies": LateReplies,
    "raise_forward": RaiseForward,
    "refuse_all": RefuseAll,
    "exit": Exit,
    "balloon": Balloon,
}
_NAMES: Mapping[type[_Fault], str] = {kind: name for name, kind in FAULTS.items()}


def parse_fault(name: str, settings: str) -> Fault:
    """The fault that a frame asks for. Raises InvalidRequest, naming the setting."""
    kind = FAULTS.get(name)
    if kind is None:
        message = f"there is no fault of this name; there are {', '.join(FAULTS)}, heal and state"
        raise InvalidRequest(message, field="fault.name")
    try:
        return kind.model_validate_json(settings or "{}")
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "settings"
        message = f"{name}: {place}: {first['msg']}"
        raise InvalidRequest(message, field="fault.settings") from error


@dataclass(slots=True)
class _Active:
    fault: Fault
    until_s: float
    left: int | None
    rng: random.Random


@dataclass(frozen=True, slots=True)
class Flips:
    """One bit of a frame's output is to be flipped: which, `rng` says."""

    rng: random.Random
    bits: Bits


@dataclass(frozen=True, slots=True)
class FrameOrder:
    """What the next frame suffers in the compute thread."""

    is_stuck: bool = False
    factor: float = 1.0
    raises: bool = False
    flips: Flips | None = None


@dataclass(slots=True)
class ActiveFaults:
    """The faults of one actor, at most one of a kind. Not thread-safe."""

    struck: Counter[str] = field(default_factory=Counter)
    _active: dict[str, _Active] = field(default_factory=dict)

    def add(self, fault: Fault, now_s: float) -> tuple[Fault, ...]:
        """Play a fault from now on, in place of one of its kind, which is returned."""
        before = self._active.pop(name_of(fault), None)
        count = fault.count if isinstance(fault, _Counted) else None
        seed = fault.seed if isinstance(fault, FlipOutputs) else 0
        self._active[name_of(fault)] = _Active(fault, now_s + (fault.seconds or MAX_FAULT_S), count, random.Random(seed))  # noqa: S311  (replayable)
        return () if before is None else (before.fault,)

    def heal(self) -> tuple[Fault, ...]:
        """End all faults; returns them."""
        ended = tuple(item.fault for item in self._active.values())
        self._active.clear()
        return ended

    def expire(self, now_s: float) -> tuple[Fault, ...]:
        """End the faults whose time is over; returns them."""
        ended = [name for name, item in self._active.items() if now_s >= item.until_s]
        return tuple(self._active.pop(name).fault for name in ended)

    def next_expiry_s(self) -> float | None:
        """When the next fault ends by itself."""
        return min((item.until_s for item in self._active.values()), default=None)

    def is_stuck(self, now_s: float) -> bool:
        """Whether the compute thread must not go on."""
        return self._live(StuckCompute, now_s) is not None

    def refuses(self, now_s: float) -> bool:
        """Whether a frame that arrives now is refused."""
        return self._strike(RefuseAll, now_s) is not None

    def on_frame(self, now_s: float) -> FrameOrder:
        """What a frame suffers whose turn has come; flips are counted where they happen."""
        is_stuck = self._strike(StuckCompute, now_s) is not None
        slow = self._strike(SlowCompute, now_s)
        raises = self._strike(RaiseForward, now_s) is not None
        return FrameOrder(is_stuck, 1.0 if slow is None else slow.factor, raises, self._flips(now_s))

    def on_reply(self, now_s: float) -> float | None:
        """When a reply that is ready now may leave: at `now_s`, later, or only when healed (None)."""
        if self._strike(DropReplies, now_s) is not None:
            return None
        late = self._strike(LateReplies, now_s)
        return now_s if late is None else now_s + late.delay_s

    def state(self, now_s: float) -> dict[str, dict[str, float]]:
        """For probes: seconds left of each active fault, and how often each struck since the start."""
        active = {name: round(item.until_s - now_s, 3) for name, item in self._active.items() if now_s < item.until_s}
        return {"active": active, "struck": dict(self.struck)}

    def _flips(self, now_s: float) -> Flips | None:
        fault = self._live(FlipOutputs, now_s)
        if fault is None:
            return None
        rng = self._active[name_of(fault)].rng
        return Flips(rng, fault.bits) if rng.random() < fault.rate else None

    def _live(self, kind: type[_F], now_s: float) -> _F | None:
        for item in self._active.values():
            if isinstance(item.fault, kind) and now_s < item.until_s and item.left != 0:
                return item.fault
        return None

    def _strike(self, kind: type[_F], now_s: float) -> _F | None:
        fault = self._live(kind, now_s)
        if fault is not None:
            item = self._active[name_of(fault)]
            item.left = None if item.left is None else item.left - 1
            self.struck[name_of(fault)] += 1
        return fault


def name_of(fault: _Fault) -> str:
    """The name that a fault is asked for by."""
    return _NAMES[type(fault)]


def pick_bit(rng: random.Random, num_elements: int, itemsize: int, bits: Bits) -> tuple[int, int]:
    """A random bit of an array of floats: the byte it lies in, little-endian, and its place there. `exponent` leaves sign and mantissa alone."""
    element = rng.randrange(num_elements)
    width = 8 * itemsize
    # bf16 and fp32 have 8 bits of exponent below the sign, fp16 five; the five upper ones are exponent in all of them.
    bit = rng.randrange(width - 6, width - 1) if bits == "exponent" else rng.randrange(width)
    return element * itemsize + bit // 8, bit % 8
