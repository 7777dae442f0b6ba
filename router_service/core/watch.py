"""What a router knows of one actor's life: what it owes, when it was last heard, when its compute thread last advanced, how fast it usually is."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from router_service.core.hush import Hush
from router_service.core.verdicts import LivenessLimits, State

_NEVER_S = float("-inf")
_MAX_DOUBLINGS = 30


class Kind(Enum):
    """Why an actor is accused."""

    SILENT = "silent"
    STUCK = "stuck"


@dataclass(frozen=True, slots=True)
class Grievance:
    """Something is wrong with an actor for `lasting_s`; `is_grave`: for long enough to eject it."""

    kind: Kind
    is_grave: bool
    lasting_s: float
    evidence: str


class Pace:
    """How long so many rows usually take: a floor, and seconds per row learned from whole frames, the wait at the actor included.

    Sums of seconds above the floor and of rows, so that a large frame weighs more than a small one. They begin with a cautious guess, which keeps an
    actor that has only seen small frames from being blamed for its first large one.
    """

    __slots__ = ("_limits", "_num_frames", "_rows", "_s")

    def __init__(self, limits: LivenessLimits) -> None:
        self._limits = limits
        self._num_frames = 0
        self._rows = float(limits.prior_rows)
        self._s = limits.prior_rows * limits.prior_s_per_row

    def usual_s(self, num_rows: int) -> float:
        """What so many rows usually take."""
        limits = self._limits
        floor_s = limits.pace_floor_s if self._num_frames >= limits.cold_frames else limits.cold_floor_s
        return floor_s + num_rows * self._s / self._rows

    def learn(self, num_rows: int, took_s: float) -> None:
        """Take in one frame. A stall counts no more than what would have been forgiven, so that one does not excuse the next."""
        limits = self._limits
        counted_s = min(took_s, limits.pace_factor * self.usual_s(num_rows)) - limits.pace_floor_s
        self._num_frames += 1
        self._rows += num_rows
        if counted_s > 0.0:
            self._s += counted_s
        if self._rows > limits.max_pace_rows:
            keep = limits.max_pace_rows / self._rows
            self._rows *= keep
            self._s *= keep


@dataclass(slots=True, eq=False)
class Watch:
    """One actor. Times are of the observer's own clock, which stands still while the observer is late. `hush` is its node's."""

    actor: str
    node_id: str
    device: str
    pace: Pace
    hush: Hush
    state: State = State.HEALTHY
    is_linked: bool = True
    owed_rows: int = 0
    owed_frames: int = 0
    owing_since_s: float = _NEVER_S
    heard_s: float = _NEVER_S
    progressed_s: float = _NEVER_S
    probed_s: float = _NEVER_S
    frames_done: int | None = None
    oldest_age_s: float = 0.0
    queued_rows: int = 0
    is_loading: bool = False
    is_tried: bool = False
    num_ejections: int = 0
    state_since_s: float = _NEVER_S
    healthy_since_s: float = _NEVER_S
    readmit_s: float = _NEVER_S
    grievance: Grievance | None = field(default=None)

    def begin_link(self, clock_s: float) -> None:
        """A fresh link: nothing is owed on it, nothing is known of its progress."""
        self.is_linked = True
        self.heard_s = self.progressed_s = clock_s
        self.frames_done = None
        self.queued_rows = 0
        self.is_loading = self.is_tried = False
        self.write_off()

    def write_off(self) -> None:
        """What it owes is expected from elsewhere."""
        self.owed_rows = self.owed_frames = 0
        self.grievance = None

    def rewind(self, clock_s: float) -> None:
        """The clock was set back: nothing was seen later than now."""
        self.owing_since_s = min(self.owing_since_s, clock_s)
        self.heard_s = min(self.heard_s, clock_s)
        self.progressed_s = min(self.progressed_s, clock_s)
        self.probed_s = min(self.probed_s, clock_s)
        self.state_since_s = min(self.state_since_s, clock_s)
        self.healthy_since_s = min(self.healthy_since_s, clock_s)

    def hear(self, clock_s: float) -> float:
        """A sign of life: after how long it came, 0 where none was due."""
        silent_s = self.silent_s(clock_s) if self.owed_frames and not self.is_loading else 0.0
        self.heard_s = clock_s
        return silent_s

    def silent_s(self, clock_s: float) -> float:
        """How long it has owed an answer without a sign of life."""
        return clock_s - max(self.heard_s, self.owing_since_s)

    def examine(self, clock_s: float, limits: LivenessLimits) -> Grievance | None:
        """What is wrong with an actor that owes rows; the graver first."""
        silent_s = self.silent_s(clock_s)
        grace_s = limits.loading_grace_s if self.is_loading else 0.0
        stuck_s = 0.0 if self.is_loading else clock_s - self.progressed_s
        if max(silent_s - grace_s, stuck_s) < limits.suspect_s:
            return None
        rows = max(self.owed_rows, self.queued_rows)
        usual_s = self.pace.usual_s(rows)
        patience_s = max(limits.suspect_s, limits.pace_factor * usual_s)
        if silent_s >= limits.suspect_s + grace_s:
            eject_s = self.hush.patience_s(limits.eject_s, limits.max_eject_s, clock_s)
            is_grave = silent_s >= eject_s + grace_s or stuck_s >= patience_s + eject_s - limits.suspect_s
            evidence = f"silent for {silent_s:.3f} s, where {eject_s + grace_s:.3f} s are allowed, while it owed {self.owed_rows} rows"
            return Grievance(Kind.SILENT, is_grave, silent_s, evidence)
        if stuck_s < patience_s:
            return None
        evidence = f"no frame done for {stuck_s:.3f} s, its oldest {self.oldest_age_s:.3f} s old by its own account; {rows} rows usually take {usual_s:.3f} s"
        is_overdue = stuck_s >= patience_s + limits.eject_s - limits.suspect_s
        return Grievance(Kind.STUCK, is_overdue, stuck_s, evidence)

    def begin_ejection(self, clock_s: float, limits: LivenessLimits) -> None:
        """Out, for twice as long as the last time; time in health is held in its favour."""
        if self.state in {State.HEALTHY, State.SUSPECTED} and self.num_ejections:
            self.num_ejections = max(0, self.num_ejections - int((clock_s - self.healthy_since_s) / limits.forgive_s))
        self.num_ejections += 1
        away_s = min(limits.max_readmit_s, limits.first_readmit_s * 2.0 ** min(self.num_ejections - 1, _MAX_DOUBLINGS))
        self.readmit_s = clock_s + away_s
        self.enter(State.EJECTED, clock_s)
        self.write_off()

    def enter(self, state: State, clock_s: float) -> None:
        """Go over to a state."""
        if state is State.HEALTHY and self.state is not State.SUSPECTED:
            self.healthy_since_s = clock_s
        self.state = state
        self.state_since_s = clock_s
        self.is_tried = False
