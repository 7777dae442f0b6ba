"""One repetition as a pure machine: what happened goes in, what to do next comes out.

    VALIDATE -> BASELINE -> INJECT -> OBSERVE -> RECOVER -> VERIFY -> DONE
                                  +----------+-> ABORTED

Whatever happens, every action whose injection was begun is recovered, the last one first, before the machine ends: it has no other way out. Only then,
and unless something stopped the run, it asks for the rollbacks: what must be seen, each within its time, before the steady state is measured again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Literal, assert_never

from chaos.core.tolerance import Verdict


class Phase(StrEnum):
    """Where a repetition stands."""

    VALIDATE = "validate"
    BASELINE = "baseline"
    INJECT = "inject"
    OBSERVE = "observe"
    RECOVER = "recover"
    VERIFY = "verify"
    DONE = "done"
    ABORTED = "aborted"


class Ending(IntEnum):
    """How it ended; the number is the command's exit code."""

    PASSED = 0
    DEVIATED = 1
    BAD_SCENARIO = 2
    BASELINE_NOT_MET = 3
    ABORTED = 4
    INTERRUPTED = 5


@dataclass(frozen=True, slots=True)
class Planned:
    """One action of the timeline: `at_s` after the steady state was met, undone after `seconds` or, if that is None, at the end."""

    name: str
    at_s: float
    seconds: float | None = None


# Events, in the past tense.


@dataclass(frozen=True, slots=True)
class Checked:
    """The scenario was checked against the cluster; problems, if any."""

    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SteadyStateProbed:
    """The steady state was measured."""

    when: Literal["before", "after"]
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class TimePassed:
    """It is later now."""


@dataclass(frozen=True, slots=True)
class Injected:
    """The fault of an action is there, since `at_s` on the machine's clock."""

    action: int
    at_s: float


@dataclass(frozen=True, slots=True)
class InjectFailed:
    """It could not be injected, or not wholly."""

    action: int
    reason: str


@dataclass(frozen=True, slots=True)
class Recovered:
    """The fault of an action was seen to be gone."""

    action: int


@dataclass(frozen=True, slots=True)
class RecoverFailed:
    """It was not."""

    action: int
    reason: str


@dataclass(frozen=True, slots=True)
class RollbackSeen:
    """What a rollback wants was seen."""

    rollback: int


@dataclass(frozen=True, slots=True)
class RollbackMissed:
    """It was not, within its time."""

    rollback: int
    reason: str


@dataclass(frozen=True, slots=True)
class GuardTripped:
    """A stop condition came true."""

    reason: str


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The user, or the system, wants it to end."""

    reason: str


Event = (
    Checked | SteadyStateProbed | TimePassed | Injected | InjectFailed | Recovered | RecoverFailed | RollbackSeen | RollbackMissed | GuardTripped | Interrupted
)


# Steps, in the imperative.


@dataclass(frozen=True, slots=True)
class ProbeSteadyState:
    """Measure the steady state, then tell SteadyStateProbed."""

    when: Literal["before", "after"]


@dataclass(frozen=True, slots=True)
class Inject:
    """Inject this action's fault, then tell Injected or InjectFailed."""

    action: int


@dataclass(frozen=True, slots=True)
class Recover:
    """Undo it and see that it is undone, then tell Recovered or RecoverFailed."""

    action: int


@dataclass(frozen=True, slots=True)
class RollBack:
    """Wait until what this rollback wants is seen, then tell RollbackSeen or RollbackMissed."""

    rollback: int


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Tell TimePassed at this time, unless something happens before."""

    at_s: float


@dataclass(frozen=True, slots=True)
class Finish:
    """It is over."""

    ending: Ending
    reason: str


Step = ProbeSteadyState | Inject | Recover | RollBack | WakeAt | Finish


class _State(IntEnum):
    PENDING = 0
    INJECTING = 1
    ACTIVE = 2
    RECOVERING = 3
    GONE = 4


@dataclass
class RunMachine:
    """The machine; `step` is its one way in."""

    method: Sequence[Planned]
    observe_s: float
    num_rollbacks: int = 0
    phase: Phase = Phase.VALIDATE
    problems: list[str] = field(default_factory=list)
    _states: list[_State] = field(default_factory=list)
    _until_s: dict[int, float] = field(default_factory=dict)
    _rollbacks_left: set[int] | None = None
    _begun_s: float = 0.0
    _last_injected_s: float = 0.0
    _stop: Ending | None = None

    def __post_init__(self) -> None:
        self._states = [_State.PENDING] * len(self.method)

    @property
    def active(self) -> list[int]:
        """Actions whose injection was begun and whose recovery was not seen."""
        return [number for number, state in enumerate(self._states) if state not in {_State.PENDING, _State.GONE}]

    def step(self, event: Event, now_s: float) -> list[Step]:
        """What to do, now that this has happened. After Finish nothing more is asked for."""
        if self.phase in {Phase.DONE, Phase.ABORTED}:
            return []
        match event:
            case Checked():
                return self._on_checked(event)
            case SteadyStateProbed():
                return self._on_probed(event, now_s)
            case Injected() | InjectFailed() | Recovered() | RecoverFailed():
                self._on_action(event)
            case RollbackSeen() | RollbackMissed():
                self._on_rollback(event)
            case GuardTripped():
                self._halt(Ending.ABORTED, event.reason)
            case Interrupted():
                self._halt(Ending.INTERRUPTED, event.reason)
            case TimePassed():
                pass
            case _:
                assert_never(event)
        return self._go_on(now_s)

    def _on_checked(self, event: Checked) -> list[Step]:
        if event.problems:
            return self._end(Ending.BAD_SCENARIO, "; ".join(event.problems))
        self.phase = Phase.BASELINE
        return [ProbeSteadyState("before")]

    def _on_probed(self, event: SteadyStateProbed, now_s: float) -> list[Step]:
        broken = [verdict.reason for verdict in event.verdicts if not verdict.ok]
        if event.when == "after":
            self.problems += [f"after: {reason}" for reason in broken]
            return self._end(Ending.DEVIATED if self.problems else Ending.PASSED, "; ".join(self.problems))
        if self._stop is not None:
            return self._end(self._stop, "; ".join(self.problems))
        if broken:
            return self._end(Ending.BASELINE_NOT_MET, "; ".join(broken))
        self.phase = Phase.INJECT
        self._begun_s = self._last_injected_s = now_s
        return self._go_on(now_s)

    def _on_action(self, event: Injected | InjectFailed | Recovered | RecoverFailed) -> None:
        name = self.method[event.action].name
        match event:
            case Injected():
                self._states[event.action] = _State.ACTIVE
                self._last_injected_s = max(self._last_injected_s, event.at_s)
                seconds = self.method[event.action].seconds
                if seconds is not None:
                    self._until_s[event.action] = event.at_s + seconds
            case InjectFailed():
                if self._states[event.action] is _State.INJECTING:  # else it was injected, and something afterwards failed
                    self._states[event.action] = _State.ACTIVE
                    self._halt(Ending.DEVIATED, f"{name}: not injected: {event.reason}")
            case Recovered():
                self._states[event.action] = _State.GONE
            case RecoverFailed():
                self._states[event.action] = _State.GONE
                self.problems.append(f"{name}: not recovered: {event.reason}")

    def _on_rollback(self, event: RollbackSeen | RollbackMissed) -> None:
        if self._rollbacks_left is not None:
            self._rollbacks_left.discard(event.rollback)
        if isinstance(event, RollbackMissed):
            self.problems.append(f"rollback: {event.reason}")

    def _halt(self, ending: Ending, reason: str) -> None:
        """End the timeline; the first reason counts for the ending, all are told."""
        self._stop = self._stop or ending
        self.problems.append(reason)

    def _go_on(self, now_s: float) -> list[Step]:
        """The next steps of the phase that the machine is in; it may enter a later one on the way."""
        if self.phase in {Phase.VALIDATE, Phase.BASELINE}:
            return self._end(self._stop, "; ".join(self.problems)) if self._stop is not None else []
        if self.phase is Phase.INJECT and self._stop is None:
            steps: list[Step] = [*self._inject_due(now_s), *self._undo_due(now_s)]
            if _State.PENDING in self._states:
                return [*steps, WakeAt(self._next_s())]
            self.phase = Phase.OBSERVE
            if steps:
                return steps
        if self.phase in {Phase.INJECT, Phase.OBSERVE}:
            if self._stop is None:
                if due := self._undo_due(now_s):
                    return list[Step](due)
                if now_s < (end_s := self._observed_until_s()):
                    return [WakeAt(end_s)]
            self.phase = Phase.RECOVER
        return self._recover_rest()

    def _inject_due(self, now_s: float) -> list[Inject]:
        due = [number for number, action in enumerate(self.method) if self._states[number] is _State.PENDING and now_s >= self._begun_s + action.at_s]
        for number in due:
            self._states[number] = _State.INJECTING
        return [Inject(number) for number in due]

    def _undo_due(self, now_s: float) -> list[Recover]:
        due = [number for number, until_s in self._until_s.items() if self._states[number] is _State.ACTIVE and now_s >= until_s]
        for number in due:
            self._states[number] = _State.RECOVERING
        return [Recover(number) for number in due]

    def _next_s(self) -> float:
        pending = [self._begun_s + action.at_s for number, action in enumerate(self.method) if self._states[number] is _State.PENDING]
        undo = [until_s for number, until_s in self._until_s.items() if self._states[number] is _State.ACTIVE]
        return min(pending + undo)

    def _observed_until_s(self) -> float:
        """When to look no longer: once the last fault was watched for long enough and every timed one is undone; before that, at the next one's end."""
        if _State.INJECTING in self._states or _State.RECOVERING in self._states:
            return float("inf")
        undo = [until_s for number, until_s in self._until_s.items() if self._states[number] is _State.ACTIVE]
        return min(undo) if undo else self._last_injected_s + self.observe_s

    def _recover_rest(self) -> list[Step]:
        if _State.INJECTING in self._states:
            return []  # it is undone once it is known what it did
        steps: list[Step] = []
        for number in reversed(range(len(self.method))):
            if self._states[number] is _State.ACTIVE:
                self._states[number] = _State.RECOVERING
                steps.append(Recover(number))
        if steps or _State.RECOVERING in self._states:
            return steps
        if self._stop is not None:
            return self._end(self._stop, "; ".join(self.problems))
        return self._verify() if self.phase is Phase.RECOVER else []

    def _verify(self) -> list[Step]:
        """Everything is undone: the rollbacks, then the steady state."""
        if self._rollbacks_left is None:
            self._rollbacks_left = set(range(self.num_rollbacks))
            if self._rollbacks_left:
                return [RollBack(number) for number in sorted(self._rollbacks_left)]
        if self._rollbacks_left:
            return []
        self.phase = Phase.VERIFY
        return [ProbeSteadyState("after")]

    def _end(self, ending: Ending | None, reason: str) -> list[Step]:
        ending = Ending.DEVIATED if ending is None else ending
        self.phase = Phase.DONE if ending in {Ending.PASSED, Ending.DEVIATED} else Phase.ABORTED
        return [Finish(ending, reason)]
