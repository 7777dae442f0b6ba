"""Draw what a lost GPU costs by codec and budget, from the report of `examples.shadow_quality`.

Run ``python -m examples.shadow_chart``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

FOLDER = Path(__file__).parent.parent / "docs" / "shadows"
BUDGET_PERCENT = 15.0

_INK, _FAINT, _LINE, _OTHER, _PLAIN = "#1f2933", "#9aa5b1", "#4269d0", "#ff725c", "#6cc5b0"
_FLOOR_PERCENT = 0.01


def main() -> None:
    """Write docs/shadows/lost_gpu.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, default=FOLDER / "report.json")
    parser.add_argument("--to", type=Path, default=FOLDER / "lost_gpu.png")
    arguments = parser.parse_args()
    draw(json.loads(arguments.report.read_text(encoding="utf-8"))["rows"], arguments.to)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Left: every rung and control as bars; right: shadows by memory."""
    mpl.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": _FAINT, "text.color": _INK})
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", width_ratios=(1, 1.2))
    _bars(left, [row for row in rows if row["kind"] in ("control", "ladder", "shipped")])
    _by_memory(right, rows)
    figure.suptitle("Held-out bits per byte with one GPU of four lost: mean over the four, whisker to the worst", x=0.01, ha="left", fontsize=12)
    figure.savefig(path, dpi=130)


def _bars(axes: Axes, rows: list[dict[str, Any]]) -> None:
    rows = sorted(rows, key=_mean, reverse=True)
    means = [_mean(row) for row in rows]
    worst = [_worst(row) - mean for row, mean in zip(rows, means, strict=True)]
    colours = [_LINE if row["kind"] == "shipped" else _OTHER if row["kind"] == "control" else _FAINT for row in rows]
    places = axes.barh([row["name"] for row in rows], means, xerr=[[0.0] * len(rows), worst], color=colours, ecolor=_INK)
    axes.bar_label(places, [f"  {mean:.2f} %" for mean in means], padding=2)
    axes.set_xlabel("rise of bits per byte, %")
    axes.set_title("without a copy: rungs and controls", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _by_memory(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["kind"] == "codec" and "int8" not in row["name"]:
            axes.plot(row["memory_percent"], max(_mean(row), _FLOOR_PERCENT), "o", color=_FAINT)
            axes.annotate(row["name"], (row["memory_percent"], max(_mean(row), _FLOOR_PERCENT)), xytext=(4, 3), textcoords="offset points", fontsize=8)
    for kind, colour in (("plan", _LINE), ("plan, nothing fitted", _PLAIN)):
        plans = [row for row in rows if row["kind"] == kind]
        axes.plot([row["memory_percent"] for row in plans], [max(_mean(row), _FLOOR_PERCENT) for row in plans], "s-", color=colour, label=kind)
    axes.axvline(BUDGET_PERCENT, color=_INK, linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_xlabel("packed bytes, % of the primaries'")
    axes.set_ylabel(f"rise of bits per byte, % (at least {_FLOOR_PERCENT})")
    axes.set_title("shadows by memory", loc="left", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _mean(row: dict[str, Any]) -> float:
    rises: list[float] = row["bits_per_byte_percent"]
    return sum(rises) / len(rises)


def _worst(row: dict[str, Any]) -> float:
    return float(max(row["bits_per_byte_percent"]))


if __name__ == "__main__":
    main()
