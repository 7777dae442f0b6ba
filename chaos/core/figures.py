"""The tables of the report: one row for each scenario, figures of all its repetitions, beside what was wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chaos.core.report import Judged, Record, judge, summarise
from chaos.core.tolerance import Tolerance


@dataclass(frozen=True, slots=True)
class Row:
    """One scenario's figures. `held` counts the assertions that held."""

    scenario: str
    title: str
    summary: Mapping[str, float | None]
    judged: Sequence[Judged]
    num_records: int

    @property
    def is_good(self) -> bool:
        """Whether every assertion held."""
        return all(found.ok for found in self.judged)


def rows_of(records: Sequence[Record], titles: Mapping[str, str], assertions: Mapping[str, Mapping[str, Tolerance]]) -> list[Row]:
    """A row for each scenario that has records, in the order of `titles`."""
    rows = []
    for name, title in titles.items():
        found = [record for record in records if record.scenario == name]
        if found:
            summary = summarise(found)
            rows.append(Row(name, title, summary, judge(summary, assertions.get(name, {})), len(found)))
    return rows


HEADER = (
    "fault",
    "runs",
    "failed of requests",
    "wrong",
    "added p50 / p99 / max ms",
    "control p99 ms",
    "scheduler wait ms/s (control)",
    "detected ms (p99)",
    "exact again s (p99)",
    "all exact again s (p99)",
    "copies again s (p99)",
    "not exact elsewhere",
    "held",
)
# What happens while the wait is measured, and may be late for want of a core; counts are not, and repair comes later.
_TIMES = ("_ms", "_ratio")


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as lines of a Markdown table."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for row in rows:
        of = row.summary
        cells = (
            f"[{row.title}](#{row.scenario})",
            shown(of["repetitions"]),
            f"{shown(of['failed'])} of {shown(of['requests'])}",
            shown(of["wrong"]),
            " / ".join(shown(of[f"added_{label}_ms"]) for label in ("p50", "p99", "max")),
            shown(of["control_p99_ms"]),
            f"{shown(of['sched_wait_ms'])} ({shown(of['control_sched_wait_ms'])})",
            _spread(of, "detected_ms"),
            _spread(of, "exact_again_s"),
            _spread(of, "all_exact_again_s"),
            _spread(of, "copies_again_s"),
            shown(of["inexact_elsewhere"]),
            f"{sum(found.ok for found in row.judged)} of {len(row.judged)}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def assertion_table(row: Row) -> list[str]:
    """One scenario's assertions, each with its value and whether it held; times that did not, with what the router waited for a core meanwhile."""
    lines = ["| assertion | measured | wanted | |", "|---|---|---|---|"]
    return lines + [f"| {found.name} | {shown(found.value)} | {found.tolerance} | {_verdict(row, found)} |" for found in row.judged]


def _verdict(row: Row, found: Judged) -> str:
    if found.ok:
        return "held"
    of = row.summary
    if not found.name.endswith(_TIMES) or of["sched_wait_ms"] is None:
        return "**not held**"
    return f"**not held**; scheduler wait {shown(of['sched_wait_ms'])} ms/s, control {shown(of['control_sched_wait_ms'])} ms/s"


def shown(value: float | str | None) -> str:
    """A figure for people: three digits that count."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    whole = 100
    if value == int(value) or abs(value) >= whole:
        return f"{value:.0f}"
    return f"{value:.3g}"


def _spread(summary: Mapping[str, float | None], name: str) -> str:
    missing = summary[f"{name}_missing"] or 0
    lack = f", {shown(missing)} without" if missing and summary[name] is not None else ""
    return f"{shown(summary[name])} ({shown(summary[f'{name}_p99'])}{lack})"
