"""Records of repetitions, what they say together, and the journal in Chaos Toolkit's keys. Append-only: the report is made from the records alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict

from chaos.core.observations import quantile
from chaos.core.run_machine import Ending
from chaos.core.tolerance import Tolerance, Verdict

SUMMED = (
    "requests",
    "failed",
    "failed_unexplained",
    "late",
    "wrong",
    "unchecked",
    "unaccounted",
    "degraded",
    "lower_rungs",
    "epoch_regressions",
    "stale",
    "ejections",
    "router_ejections",
    "redispatches",
    "inexact_elsewhere",
)
SPREAD = (
    "first_other_ms",
    "detected_ms",
    "exact_again_s",
    "all_exact_again_s",
    "copies_again_s",
    "whole_again_s",
    "gap_ms",
    "control_gap_ms",
    "sched_wait_ms",
    "control_sched_wait_ms",
)
STATUS = {
    Ending.PASSED: "completed",
    Ending.DEVIATED: "completed",
    Ending.BAD_SCENARIO: "failed",
    Ending.BASELINE_NOT_MET: "failed",
    Ending.ABORTED: "aborted",
    Ending.INTERRUPTED: "interrupted",
}


class Judged(BaseModel):
    """One probe or assertion: what was measured, what was wanted, and the verdict with its reason."""

    model_config = ConfigDict(frozen=True)

    name: str
    value: float | str | None
    tolerance: str
    ok: bool
    reason: str

    @classmethod
    def of(cls, name: str, value: float | str | None, tolerance: Tolerance) -> Judged:
        """Judge a value."""
        verdict = tolerance.judge(value)
        return cls(name=name, value=value, tolerance=str(tolerance), ok=verdict.ok, reason=f"{name}: {verdict.reason}")

    @property
    def verdict(self) -> Verdict:
        """The verdict alone."""
        return Verdict(self.ok, self.reason)


class ActionRecord(BaseModel):
    """One action as it happened. Times are seconds after the steady state was met; `recovered_s` is when the fault was seen to be gone."""

    name: str
    fault: str
    target: str
    arguments: dict[str, Any] = {}
    injected_s: float | None = None
    recovered_s: float | None = None
    phase_before: str = ""
    phase_after: str = ""
    problem: str = ""
    details: dict[str, Any] = {}


class Record(BaseModel):
    """One repetition of a scenario. Latencies are of answered requests, in ms: alive within `affected_s` of the fault, and in the control window before it.

    `odd`: why a kept reply, by its name, counts as wrong or could not be replayed.
    """

    scenario: str
    digest: str
    seed: int
    repetition: int
    started: str
    duration_s: float
    ending: str
    reason: str
    deployment: str
    fidelity: str
    tokens: int
    rate: float
    actions: list[ActionRecord]
    rollbacks: list[Judged] = []
    steady_states: dict[str, list[Judged]]
    metrics: dict[str, float | None]
    affected_ms: list[float]
    control_ms: list[float]
    odd: dict[str, str] = {}
    machine: dict[str, Any] = {}

    @property
    def is_counted(self) -> bool:
        """Whether the fault was there, so that the figures are of it: neither refused, nor aborted, nor interrupted."""
        return self.ending in {Ending.PASSED.name, Ending.DEVIATED.name} and all(action.injected_s is not None for action in self.actions)


def summarise(records: Sequence[Record]) -> dict[str, float | None]:
    """What the repetitions of one scenario say together: counts summed, latencies pooled, times as median (bare name), `_p99` and `_max`.

    What a fault added is the median of what it added in each run, beside that run's own control window: one window that something else disturbed says
    nothing about the others.
    """
    counted = [record for record in records if record.is_counted]
    summary: dict[str, float | None] = {"repetitions": float(len(counted))}
    for name in SUMMED:
        found = [record.metrics.get(name) for record in counted]
        summary[name] = sum(value for value in found if value is not None) if any(value is not None for value in found) else None
    requests, failed = summary["requests"], summary["failed"]
    summary["availability"] = 1.0 - (failed or 0.0) / requests if requests else None
    struck, quiet = [value for record in counted for value in record.affected_ms], [value for record in counted for value in record.control_ms]
    for label, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        summary[f"affected_{label}_ms"], summary[f"control_{label}_ms"] = quantile(struck, share), quantile(quiet, share)
        summary[f"added_{label}_ms"] = _median(during - before for during, before in _beside(counted, share))
    summary["p99_ratio"] = _median(during / before for during, before in _beside(counted, 0.99) if before)
    for name in SPREAD:
        found = [record.metrics.get(name) for record in counted]
        values = [value for value in found if value is not None]
        summary[f"{name}_missing"] = float(len(found) - len(values))
        for suffix, share in (("", 0.5), ("_p99", 0.99), ("_max", 1.0)):
            summary[name + suffix] = quantile(values, share)
    ratios = [(value, record.metrics.get("requests") or 0.0) for record in counted if (value := record.metrics.get("amplification")) is not None]
    weight = sum(share for _, share in ratios)
    summary["amplification"] = sum(value * share for value, share in ratios) / weight if weight else None
    return summary


def _beside(records: Sequence[Record], share: float) -> list[tuple[float, float]]:
    """For each run the quantile of the affected requests, and that of its own control window."""
    pairs = [(quantile(record.affected_ms, share), quantile(record.control_ms, share)) for record in records]
    return [(during, before) for during, before in pairs if during is not None and before is not None]


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return median(found) if found else None


def judge(summary: Mapping[str, float | None], assertions: Mapping[str, Tolerance]) -> list[Judged]:
    """Each assertion on what the repetitions said together."""
    return [Judged.of(name, summary.get(name), tolerance) for name, tolerance in assertions.items()]


def unknown_assertions(assertions: Iterable[str]) -> list[str]:
    """Names that no summary has."""
    return sorted(set(assertions) - set(summarise([])) - set(SUMMED))


def ending_of(records: Sequence[Record], judged: Sequence[Judged]) -> Ending:
    """How a run of several repetitions ended: the worst of what stopped it, else whether all held."""
    for ending in (Ending.INTERRUPTED, Ending.ABORTED, Ending.BAD_SCENARIO, Ending.BASELINE_NOT_MET):
        if any(record.ending == ending.name for record in records):
            return ending
    if not records:
        return Ending.BASELINE_NOT_MET
    is_fine = all(record.ending == Ending.PASSED.name for record in records) and all(found.ok for found in judged)
    return Ending.PASSED if is_fine else Ending.DEVIATED


def journal(
    *,
    experiment: dict[str, Any],
    records: Sequence[Record],
    judged: Sequence[Judged],
    summary: Mapping[str, float | None],
    ending: Ending,
    times: tuple[str, str, float],
    place: Mapping[str, str],
) -> dict[str, Any]:
    """The journal of a run: Chaos Toolkit's keys, `metrics` and `repetitions` beside them. `times` are start, end (RFC 3339) and seconds."""
    start, end, duration_s = times
    last = records[-1] if records else None
    return {
        "experiment": experiment,
        "status": STATUS[ending],
        "deviated": ending is Ending.DEVIATED,
        "ending": ending.name,
        "exit_code": int(ending),
        "start": start,
        "end": end,
        "duration": duration_s,
        "steady_states": {
            "during": [],
            **({} if last is None else {when: [found.model_dump() for found in probes] for when, probes in last.steady_states.items()}),
        },
        "run": [action.model_dump() | {"repetition": record.repetition} for record in records for action in record.actions],
        "rollbacks": [
            {"name": action.name, "repetition": record.repetition, "recovered_s": action.recovered_s, "problem": action.problem}
            for record in records
            for action in record.actions
        ]
        + [found.model_dump() | {"repetition": record.repetition} for record in records for found in record.rollbacks],
        "platform": place.get("platform", ""),
        "node": place.get("node", ""),
        "metrics": dict(summary),
        "assertions": [found.model_dump() for found in judged],
        "repetitions": [record.model_dump() for record in records],
    }
