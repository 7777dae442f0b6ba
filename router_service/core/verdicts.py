"""What liveness may say of an actor, and the limits it judges by."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """Whether an actor may be trusted with rows."""

    HEALTHY = "healthy"
    SUSPECTED = "suspected"
    EJECTED = "ejected"
    ON_TRIAL = "on_trial"


@dataclass(frozen=True, slots=True)
class Suspect:
    """It owes an answer and is silent, or its compute thread stands still: other copies first. Since `since_s`, for the reason in `evidence`."""

    actor: str
    evidence: str
    since_s: float


@dataclass(frozen=True, slots=True)
class Eject:
    """It gets no rows, and what it owes is sent elsewhere."""

    actor: str
    evidence: str
    since_s: float


@dataclass(frozen=True, slots=True)
class Readmit:
    """An ejected actor may have one frame, on trial."""

    actor: str
    evidence: str
    since_s: float


@dataclass(frozen=True, slots=True)
class Clear:
    """It is trusted again."""

    actor: str
    evidence: str
    since_s: float


Verdict = Suspect | Eject | Readmit | Clear


@dataclass(frozen=True, slots=True)
class LivenessLimits:
    """The `liveness` section of the spec, by the same names, and what nobody has needed to set yet.

    `pace_factor`: how many times the usual time its rows may take before a compute thread counts as stuck; `pace_floor_s`: what any frame may usually
    take, `cold_floor_s` while the actor has answered fewer than `cold_frames` (first touches of weights are slow). `prior_s_per_row`, `prior_rows` and
    `max_pace_rows` say what a row is thought to take at first, how many rows of evidence outweigh that, and after how many older evidence fades.
    `max_eject_s`: how long a silence may last at most where others that were nearly as long ended well (`Hush`).
    `doubt_limit_s`: how long an observer that doubts itself puts up with compute threads that stand still while their loops answer.
    `loading_grace_s`: how long an actor that said it was loading may be silent. `forgive_s`: one ejection is forgotten for each such time in health.
    """

    probe_s: float = 0.04
    suspect_s: float = 0.1
    eject_s: float = 0.27
    max_eject_s: float = 1.0
    node_window_s: float = 0.2
    first_readmit_s: float = 0.25
    max_readmit_s: float = 30.0
    pace_factor: float = 4.0
    pace_floor_s: float = 0.01
    cold_floor_s: float = 0.25
    cold_frames: int = 8
    prior_s_per_row: float = 0.001
    prior_rows: int = 512
    max_pace_rows: int = 16_384
    loading_grace_s: float = 1.0
    forgive_s: float = 10.0
    min_actors_to_doubt_oneself: int = 3
    doubt_limit_s: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.suspect_s <= self.eject_s:
            message = f"liveness.suspect_s ({self.suspect_s}) must be positive and not above liveness.eject_s ({self.eject_s})"
            raise ValueError(message)
        if not 0 < self.first_readmit_s <= self.max_readmit_s:
            message = f"liveness.first_readmit_s ({self.first_readmit_s}) must be positive and not above liveness.max_readmit_s ({self.max_readmit_s})"
            raise ValueError(message)
