"""The report as files: Markdown tables and plots, made from records, or from a journal, alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from chaos.campaign import read_records
from chaos.core.figures import Row, assertion_table, rows_of, shown, table
from chaos.core.report import Record
from chaos.core.tolerance import Tolerance
from chaos.scenario_files import SHIPPED, load, names
from cluster.core.errors import ConfigError

COLUMNS = 3
CAPTION = (
    "The load is an open loop: requests are due one by one at even times, at half of the most that the cluster keeps up with so (95 of 100 answered within "
    "0.1 s of when they were due, twice in a row; rates are tried downwards, by a tenth each, from what 16 callers in a closed loop "
    "reach), unless a scenario says otherwise. "
    "Added latency is that of requests alive within 1 s of the fault (2 s of slow_replica, as long as it lasts) less that of requests alive in the control "
    "window just before it and ended by then: the same load, the same cluster; the median of the runs' own differences. Latency counts from when a request "
    "was due, so a stalled sender hides nothing. "
    "`detected` is an upper bound: the first of the router noting a loss or an ejection, a look at it showing one, and an answer by another copy. "
    "`exact again` is when the last answer ended in which an expert that was struck was not exact, `all exact again` the same for any expert; "
    "`not exact elsewhere` counts answers that were not exact for experts that nobody struck (on a busy machine rows of an actor that "
    "gets no core go to shadows, without a fault, too); `copies again` is when the router's table "
    "had all full-precision copies again, none of them struck. `scheduler wait` is what the router's threads together waited for a core in each second "
    "after the fault (and in the control window), the median of the runs."
)


def read_any(path: Path) -> list[Record]:
    """The records in a journal or a file of records. Raises ConfigError when there are none."""
    if path.suffix == ".json":
        try:
            records = [Record.model_validate(record) for record in json.loads(path.read_text())["repetitions"]]
        except (OSError, ValueError, KeyError, ValidationError) as error:
            message = f"{path}: not a journal ({type(error).__name__}); give a journal.json or a file of records"
            raise ConfigError(message) from error
    else:
        records = read_records(path)
    if not records:
        message = f"{path}: no repetition is recorded there; run `moelastic chaos run SCENARIO --records {path}` first"
        raise ConfigError(message)
    return records


def rows(records: Sequence[Record]) -> list[Row]:
    """Figures of the shipped scenarios in the records, then of others."""
    titles, assertions = _shipped()
    titles |= {record.scenario: record.scenario for record in records if record.scenario not in titles}
    return rows_of(records, titles, assertions)


def tables(records: Sequence[Record]) -> list[str]:
    """The table, and each scenario's assertions, as lines of Markdown."""
    found = rows(records)
    lines = table(found)
    for row in found:
        first = next(record for record in records if record.scenario == row.scenario)
        load_words = (
            f"{shown(row.summary['requests'])} requests of {first.tokens} tokens, fidelity {first.fidelity}, {shown(_mean_rate(records, row))} requests/s"
        )
        runs = _runs(int(row.summary["repetitions"] or 0), row.num_records)
        lines += ["", f"### {row.scenario}", "", f"{row.title}; {runs}, {load_words}.", "", *assertion_table(row)]
    return lines


def write_report(records: Sequence[Record], out: Path, *, source: Path) -> Path:
    """Write README.md and its plots into a folder; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    found = rows(records)
    _plot_latencies(records, found, out / "latency.png")
    _plot_times(records, found, out / "times.png")
    machine, runs = records[-1].machine, _runs(sum(record.is_counted for record in records), len(records))
    lines = [
        "# Failover, measured",
        "",
        f"{runs} on {machine.get('cores', '?')} cores ({machine.get('platform', '')}), {records[0].started[:10]} to {records[-1].started[:10]}.",
        f"Made by `make chaos`; this page by `moelastic chaos report {source} --out {source.parent}`.",
        "",
        CAPTION,
        "",
        *(["How early a death can be known at best, by the memory of the process: [floor.md](floor.md).", ""] if (out / "floor.md").exists() else []),
        "![latency of requests alive within 1 s of the fault, and of the control window before it](latency.png)",
        "",
        "![time to detection, and to exact answers again](times.png)",
        "",
        *tables(records),
    ]
    page = out / "README.md"
    page.write_text("\n".join(lines) + "\n")
    return page


def _runs(num_counted: int, num_records: int) -> str:
    """How many runs the figures are of, and how many were recorded besides."""
    rest = num_records - num_counted
    besides = f" ({rest} not counted: begun, and the fault never struck, or was not over at the end)" if rest else ""
    return f"{num_counted} run{'' if num_counted == 1 else 's'}{besides}"


def _shipped() -> tuple[dict[str, str], dict[str, Mapping[str, Tolerance]]]:
    files = {name: load(SHIPPED / f"{name}.yaml").scenario for name in names()}
    return {name: scenario.title for name, scenario in files.items()}, {name: scenario.assertions for name, scenario in files.items()}


def _mean_rate(records: Sequence[Record], row: Row) -> float:
    found = [record.rate for record in records if record.scenario == row.scenario]
    return sum(found) / len(found)


def _plot_latencies(records: Sequence[Record], found: Sequence[Row], path: Path) -> None:
    """One small chart per scenario: the share of requests that took longer than so long, with the fault and without."""
    from matplotlib.figure import Figure

    # A scenario that never came to its fault has nothing to draw, and a logarithmic axis needs something.
    charted = [row for row in found if any(record.scenario == row.scenario and record.is_counted and record.affected_ms for record in records)]
    num_lines = max(1, -(-len(charted) // COLUMNS))
    figure = Figure(figsize=(4 * COLUMNS, 2.8 * num_lines), layout="constrained")
    axes = figure.subplots(num_lines, COLUMNS, squeeze=False)
    for place, row in zip(axes.flat, charted, strict=False):
        mine = [record for record in records if record.scenario == row.scenario and record.is_counted]
        for name, values in (
            ("control", [value for record in mine for value in record.control_ms]),
            ("within 1 s of the fault", [value for record in mine for value in record.affected_ms]),
        ):
            ordered = sorted(values)
            place.step(ordered, [1 - number / len(ordered) for number in range(len(ordered))], where="post", label=name)
        place.set(title=row.scenario, xscale="log", yscale="log", xlabel="ms", ylabel="share slower")
    _hide_rest(axes, len(charted))
    if charted:
        axes.flat[0].legend()
    figure.savefig(path, dpi=110)


def _plot_times(records: Sequence[Record], found: Sequence[Row], path: Path) -> None:
    """Every run as a dot: detection in ms, exact again in s."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.2 + 0.4 * len(found)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, row in enumerate(found):
        mine = [record for record in records if record.scenario == row.scenario and record.is_counted]
        for place, name in ((left, "detected_ms"), (right, "exact_again_s")):
            values = [value for record in mine if (value := record.metrics.get(name)) is not None]
            place.plot(values, [number] * len(values), "o", alpha=0.4, markersize=4, color="C0")
    left.set(yticks=range(len(found)), yticklabels=[row.scenario for row in found], xlabel="detected, ms", xscale="symlog")
    right.set(xlabel="exact again, s", xscale="symlog")
    left.invert_yaxis()
    figure.savefig(path, dpi=110)


def _hide_rest(axes: Any, num_used: int) -> None:  # noqa: ANN401  # an array of matplotlib's axes
    for place in list(axes.flat)[num_used:]:
        place.set_visible(False)
