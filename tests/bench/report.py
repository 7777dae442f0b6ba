"""The rows beside each other: from samples to figures, verdicts, a table and two plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles

import psutil

from bench.rig import Rig
from bench.rows import BestOf, Row, Sample
from bench.settings import (
    ECHO,
    GOALS,
    HIVEMIND,
    HIVEMIND_GOAL,
    IDLE_GOAL_S,
    IDLE_MODEL,
    IN_PROCESS,
    MODEL,
    OURS,
    PACKED,
    PER_EXPERT,
    SERVE_ROWS,
    WIDE_MODEL,
    Case,
)
from bench.tables import Section, Table

# Measured elsewhere, on a quiet machine of two cores, with hivemind 1.1.12; shown where it cannot be measured here.
HIVEMIND_ELSEWHERE_S = {Case(1, 8, WIDE_MODEL): 0.069, Case(1, 64, WIDE_MODEL): 0.436}


@dataclass(frozen=True, slots=True)
class Figure:
    """One row in one case. `p50_s` and `tokens_per_s` are medians over the rounds, with the smallest and largest round beside them.

    `rounds_p50_s`, `rounds_tokens_per_s`: of each round, in order.
    """

    case: str
    row: str
    variant: str
    p50_s: float
    p50_spread_s: tuple[float, float]
    p99_s: float
    tokens_per_s: float
    tokens_spread_per_s: tuple[float, float]
    client_cpu_s_per_call: float
    server_cpu_s_per_call: float
    num_calls: int
    rounds_p50_s: tuple[float, ...] = ()
    rounds_tokens_per_s: tuple[float, ...] = ()


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
        server_cpu_s_per_call=median(sample.server_cpu_s_per_call for sample in samples),
        num_calls=len(latencies),
        rounds_p50_s=tuple(p50s),
        rounds_tokens_per_s=tuple(rates),
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """How ours stands in one case against one goal. `is_reached`: None where there is no goal, only something worth knowing."""

    case: str
    text: str
    is_reached: bool | None = None


def verdicts(case: Case, figures: Sequence[Figure]) -> list[Verdict]:
    """Ours against the goals of a case, and against its ceiling."""
    found = {figure.row: figure for figure in figures if figure.case == case.name}
    ours = found.pop(OURS, None)
    if ours is None:
        return []
    if case.model == IDLE_MODEL:
        added_s = ours.p50_s - found[ECHO].p50_s
        return [Verdict(case.name, f"echo + {1e3 * added_s:.2f} ms (goal: at most + {1e3 * IDLE_GOAL_S:.1f})", added_s <= IDLE_GOAL_S)]
    if case.model == WIDE_MODEL:
        return _against_hivemind(case, ours, found.get(HIVEMIND))
    return [*_against_in_process(case, ours, found), *_against_serve(case, ours, found)]


def _against_in_process(case: Case, ours: Figure, found: dict[str, Figure]) -> list[Verdict]:
    goal, reference = GOALS.get(case), found.get(IN_PROCESS)
    if goal is None or reference is None:
        return []
    ceiling = ceiling_of(case, reference, found[ECHO])
    beside = f", {_ratio(case, ours, packed):.2f} x with packed matrices there, too" if (packed := found.get(PACKED)) else ""
    ratio = _ratio(case, ours, reference)
    if goal.latency_ratio is not None:
        text = f"{ratio:.2f} x in-process{beside} (goal: at most {goal.latency_ratio}; in-process and an echo one after the other: {ceiling:.2f} x)"
        return [Verdict(case.name, text, ratio <= goal.latency_ratio)]
    assert goal.throughput_ratio is not None
    text = f"{ratio:.2f} x in-process{beside} (goal: at least {goal.throughput_ratio}; with Python gRPC on both sides at most about {ceiling:.2f} x)"
    return [Verdict(case.name, text, ratio >= goal.throughput_ratio)]


def ceiling_of(case: Case, reference: Figure, echo: Figure) -> float:
    """What a perfect service behind Python gRPC could reach on these cores, against the process of its own.

    One caller waits for both, one after the other. Many keep all cores busy: each call costs what the process of its own spends on its rows, on all
    cores, and what the echo spends on both sides.
    """
    if case.callers == 1:
        return (reference.p50_s + echo.p50_s) / reference.p50_s
    compute_s = (psutil.cpu_count() or 1) * case.tokens / reference.tokens_per_s
    return compute_s / (compute_s + echo.client_cpu_s_per_call + echo.server_cpu_s_per_call)


def _ratio(case: Case, ours: Figure, other: Figure) -> float:
    """Latency of one caller, throughput of many: the median of each round's own ratio, since a machine's speed drifts from round to round."""
    if case.callers == 1:
        return _paired(ours.rounds_p50_s, other.rounds_p50_s) or ours.p50_s / other.p50_s
    return _paired(ours.rounds_tokens_per_s, other.rounds_tokens_per_s) or ours.tokens_per_s / other.tokens_per_s


def _paired(ours: Sequence[float], others: Sequence[float]) -> float | None:
    """None where there are no rounds, or not as many on both sides."""
    if not ours or len(ours) != len(others):
        return None
    return median(own / other for own, other in zip(ours, others, strict=True))


def _against_serve(case: Case, ours: Figure, found: dict[str, Figure]) -> list[Verdict]:
    goal, serve = GOALS.get(case), [found[row] for row in SERVE_ROWS if row in found]
    if goal is None or not serve:
        return []
    ahead = min(1 / _ratio(case, ours, row) if case.callers == 1 else _ratio(case, ours, row) for row in serve)
    result = [Verdict(case.name, f"{ahead:.1f} x the better Ray Serve (goal: at least {goal.better_serve})", ahead >= goal.better_serve)]
    if goal.serve_per_expert is not None and (theirs := found.get(PER_EXPERT)):
        times = _ratio(case, ours, theirs)
        result.append(Verdict(case.name, f"{times:.1f} x Ray Serve per expert (goal: at least {goal.serve_per_expert:.0f})", times >= goal.serve_per_expert))
    return result


def _against_hivemind(case: Case, ours: Figure, theirs: Figure | None) -> list[Verdict]:
    if theirs is not None:
        ahead, where = 1 / _ratio(case, ours, theirs), f"hivemind's {1e3 * theirs.p50_s:.0f} ms"
    elif case in HIVEMIND_ELSEWHERE_S:
        ahead, where = (
            HIVEMIND_ELSEWHERE_S[case] / ours.p50_s,
            f"the {1e3 * HIVEMIND_ELSEWHERE_S[case]:.0f} ms that hivemind took on another machine, not measured here",
        )
    else:
        return []
    return [Verdict(case.name, f"{ahead:.1f} x faster than {where} (goal: at least {HIVEMIND_GOAL:.0f})", ahead >= HIVEMIND_GOAL)]


def section_of(rig: Rig, differences: dict[str, float], idle_cores: dict[str, float]) -> Section:
    """Tables and figures of everything that was sampled."""
    cases = rig.settings.cases
    figures = [figure_of(case, row) for case in cases for row in rig.rows_of(case)]
    found = [verdict for case in cases for verdict in verdicts(case, figures)]
    left_out = [f"{name}: {why}" for name, why in rig.left_out.items()]
    burn = ", ".join(f"{name} {cores:.2f}" for name, cores in idle_cores.items() if cores >= 0.005)
    note = "callers x tokens; medians over interleaved rounds, smallest and largest round in brackets; CPU of router and actors beside the caller's."
    note += f" Cores burnt while idle: {burn or 'none'}." + (f" Not measured: {'; '.join(left_out)}." if left_out else "")
    shown = {True: "yes", False: "NO", None: ""}
    return Section(
        [
            Table("ours beside its peers", ("case", "row", "p50 ms", "p99 ms", "tokens/s", "caller CPU ms", "server CPU ms"), _lines(figures), note),
            Table("against the goals", ("case", "ours", "reached"), [(one.case, one.text, shown[one.is_reached]) for one in found]),
        ],
        {
            "figures": [asdict(figure) for figure in figures],
            "verdicts": [asdict(one) for one in found],
            "largest_difference_from_fp32": differences,
            "idle_cores": idle_cores,
            "left_out": rig.left_out,
        },
    )


def _lines(figures: Sequence[Figure]) -> list[tuple[str, ...]]:
    return [
        (
            figure.case,
            f"{figure.row} ({figure.variant})" if figure.variant else figure.row,
            f"{1e3 * figure.p50_s:.2f} ({1e3 * figure.p50_spread_s[0]:.2f}-{1e3 * figure.p50_spread_s[1]:.2f})",
            f"{1e3 * figure.p99_s:.2f}",
            f"{figure.tokens_per_s:,.0f} ({figure.tokens_spread_per_s[0]:,.0f}-{figure.tokens_spread_per_s[1]:,.0f})",
            f"{1e3 * figure.client_cpu_s_per_call:.2f}",
            f"{1e3 * figure.server_cpu_s_per_call:.2f}" if figure.server_cpu_s_per_call else "",
        )
        for figure in figures
    ]


def plot(folder: Path, cases: Sequence[Case], section: Section) -> None:
    """Write `latency.png` by batch size, and `throughput.png` by concurrency."""
    figures = [Figure(**figure) for figure in section.data["figures"]]
    one = [case for case in cases if case.callers == 1 and case.model == MODEL]
    many = sorted((case for case in cases if case.model == MODEL), key=lambda case: case.callers * case.tokens)
    _plot(folder / "latency.png", one, figures, "p50 of one caller, ms", lambda figure: 1e3 * figure.p50_s)
    _plot(folder / "throughput.png", many, figures, "tokens/s", lambda figure: figure.tokens_per_s)


def _plot(path: Path, cases: Sequence[Case], figures: Sequence[Figure], title: str, value: Callable[[Figure], float]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    chart, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    names = [case.name for case in cases]
    for row in dict.fromkeys(figure.row for figure in figures if figure.row != ECHO):
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
