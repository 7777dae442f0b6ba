"""From samples to a table, a JSON file and two plots."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from bench.rows import BestOf, Row, Sample
from bench.settings import GOALS, IDLE_GOAL_S, IDLE_MODEL, Case, Settings

REFERENCE = "in_process"
OURS = "moelastic"


@dataclass(frozen=True, slots=True)
class Figure:
    """One row in one case. `p50_s` and `tokens_per_s` are medians over the rounds, with the smallest and largest round beside them."""

    case: str
    row: str
    variant: str
    p50_s: float
    p50_spread_s: tuple[float, float]
    p99_s: float
    tokens_per_s: float
    tokens_spread_per_s: tuple[float, float]
    client_cpu_s_per_call: float
    num_calls: int


def figure_of(case: Case, row: Row | BestOf) -> Figure:
    """The figures of what was sampled."""
    samples: Sequence[Sample] = row.samples[case]
    p50s = [median(sample.latencies_s) for sample in samples]
    rates = [sample.tokens_per_s for sample in samples]
    latencies = [latency for sample in samples for latency in sample.latencies_s]
    return Figure(
        case=case.name,
        row=row.name,
        variant=row.chosen[case] if isinstance(row, BestOf) else "",
        p50_s=median(p50s),
        p50_spread_s=(min(p50s), max(p50s)),
        p99_s=quantiles(latencies, n=100)[-1] if len(latencies) > 1 else latencies[0],
        tokens_per_s=median(rates),
        tokens_spread_per_s=(min(rates), max(rates)),
        client_cpu_s_per_call=median(sample.cpu_s_per_call for sample in samples),
        num_calls=len(latencies),
    )


def verdict(case: Case, figures: Sequence[Figure]) -> str:
    """How ours stands in one case, beside the goal."""
    found = {figure.row: figure for figure in figures if figure.case == case.name}
    ours = found.get(OURS)
    if ours is None:
        return ""
    if case.model == IDLE_MODEL:
        echo = found.get("grpc_echo")
        return "" if echo is None else f"echo + {1e3 * (ours.p50_s - echo.p50_s):.2f} ms (goal: at most + {1e3 * IDLE_GOAL_S:.2f})"
    goal, reference = GOALS.get(case), found.get(REFERENCE)
    if goal is None or reference is None:
        return ""
    if goal.latency_ratio is not None:
        return f"{ours.p50_s / reference.p50_s:.2f} x in-process (goal: at most {goal.latency_ratio})"
    return f"{ours.tokens_per_s / reference.tokens_per_s:.2f} x in-process (goal: at least {goal.throughput_ratio})"


def show(cases: Sequence[Case], figures: Sequence[Figure], console: Console) -> None:
    """Print the table."""
    table = Table(title="callers x tokens; medians over interleaved rounds, smallest and largest round in brackets")
    for column in ("case", "row", "p50 ms", "p99 ms", "tokens/s", "client CPU ms/call", ""):
        table.add_column(column, justify="left" if column in {"case", "row", ""} else "right")
    for case in cases:
        verdict_shown = verdict(case, figures)
        for figure in (figure for figure in figures if figure.case == case.name):
            low_s, high_s = figure.p50_spread_s
            table.add_row(
                figure.case,
                f"{figure.row} ({figure.variant})" if figure.variant else figure.row,
                f"{1e3 * figure.p50_s:.2f} ({1e3 * low_s:.2f}-{1e3 * high_s:.2f})",
                f"{1e3 * figure.p99_s:.2f}",
                f"{figure.tokens_per_s:,.0f} ({figure.tokens_spread_per_s[0]:,.0f}-{figure.tokens_spread_per_s[1]:,.0f})",
                f"{1e3 * figure.client_cpu_s_per_call:.2f}",
                verdict_shown if figure.row == OURS else "",
            )
        table.add_section()
    console.print(table)


def machine() -> dict[str, Any]:
    """What this ran on."""
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.machine())
    return {
        "cpu": model,
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": psutil.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(folder: Path, settings: Settings, figures: Sequence[Figure], differences: dict[str, float]) -> Path:
    """Write `bench.json` and both plots; returns the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": machine(),
        "settings": asdict(settings),
        "largest_difference_from_fp32": differences,
        "figures": [asdict(figure) for figure in figures],
        "verdicts": {case.name: found for case in settings.cases if (found := verdict(case, figures))},
    }
    path = folder / "bench.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    one = [case for case in settings.cases if case.callers == 1 and case.model != IDLE_MODEL]
    many = sorted((case for case in settings.cases if case.model != IDLE_MODEL), key=lambda case: case.callers * case.tokens)
    _plot(folder / "latency.png", one, figures, "p50 of one caller, ms", lambda figure: 1e3 * figure.p50_s)
    _plot(folder / "throughput.png", many, figures, "tokens/s", lambda figure: figure.tokens_per_s)
    return path


def _plot(path: Path, cases: Sequence[Case], figures: Sequence[Figure], title: str, value: Any) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    chart, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    names = [case.name for case in cases]
    for row in dict.fromkeys(figure.row for figure in figures):
        points = {figure.case: value(figure) for figure in figures if figure.row == row and figure.case in names}
        if points:
            axes.plot(list(points), list(points.values()), marker="o", label=row)
    axes.set_yscale("log")
    axes.set_xlabel("callers x tokens")
    axes.set_ylabel(title)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    chart.savefig(path, dpi=120)
    plt.close(chart)
