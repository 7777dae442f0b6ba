"""Draw each layer's expert utilisation over training from the log of a run.

Run ``python -m examples.tiny_moe_lm.chart``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import NDArray

from examples.tiny_moe_lm.data import HERE
from examples.tiny_moe_lm.train import RUN

CHART = HERE.parent.parent / "docs" / "tiny_moe_lm" / "expert_utilisation.png"
FLOOR_PERCENT = 5.0

_SMOOTHING = 12
_INK, _FAINT = "#1f2933", "#9aa5b1"
_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#9c6b4e")


def main() -> None:
    """Write docs/tiny_moe_lm/expert_utilisation.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, default=RUN / "log.jsonl", help="log of a training run")
    parser.add_argument("--to", type=Path, default=CHART)
    arguments = parser.parse_args()
    records = [json.loads(line) for line in arguments.log.read_text(encoding="utf-8").splitlines()]
    million_tokens = np.array([record["tokens"] for record in records]) / 1e6
    percent = 100.0 * np.array([record["utilisation"] for record in records])
    draw(million_tokens, percent, arguments.to)


def draw(million_tokens: NDArray[np.float64], percent: NDArray[np.float64], path: Path) -> None:
    """Draw one panel a layer; ``percent`` is [records, layers, experts]."""
    mpl.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "axes.edgecolor": _FAINT, "text.color": _INK})
    num_layers, num_experts = percent.shape[1:]
    figure, panels = plt.subplots(2, (num_layers + 1) // 2, figsize=(11, 7), sharex=True, sharey=True, layout="constrained")
    for layer, axes in enumerate(panels.flat[:num_layers]):
        _panel(axes, million_tokens, smoothed(percent[:, layer]))
        axes.set_title(f"layer {layer}", loc="left", fontsize=11, fontweight="bold")
    for axes in panels[-1]:
        axes.set_xlabel("training tokens (millions)", color=_INK)
    for axes in panels[:, 0]:
        axes.set_ylabel("share of (token, choice) pairs", color=_INK)
    figure.suptitle(
        f"No expert starves after the first million tokens\nshare of routed pairs by expert, mean of {_SMOOTHING} logged batches; "
        f"an even split is {100 / num_experts:.1f} %",
        x=0.01,
        ha="left",
        fontsize=12,
    )
    handles = panels.flat[0].get_lines()[:num_experts]
    figure.legend(handles, [f"expert {e}" for e in range(num_experts)], loc="outside lower center", ncols=num_experts, frameon=False)
    figure.savefig(path, dpi=130, facecolor="white")


def smoothed(series: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the trailing mean over a few records of [records, experts]; shorter at the start."""
    total = np.cumsum(np.vstack([np.zeros((1, series.shape[1])), series]), axis=0)
    last = np.arange(1, len(series) + 1)
    first = np.maximum(last - _SMOOTHING, 0)
    mean: NDArray[np.float64] = (total[last] - total[first]) / (last - first)[:, None]
    return mean


def _panel(axes: Axes, million_tokens: NDArray[np.float64], percent: NDArray[np.float64]) -> None:
    for expert in range(percent.shape[1]):
        axes.plot(million_tokens, percent[:, expert], color=_COLOURS[expert % len(_COLOURS)], linewidth=1.4)
    even = 100.0 / percent.shape[1]
    axes.axhline(even, color=_INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axes.axhspan(0.0, FLOOR_PERCENT, color="#d64545", alpha=0.10, linewidth=0)
    axes.text(0.995, FLOOR_PERCENT - 0.3, "below 5 %: starved", color="#a61b1b", fontsize=8.5, ha="right", va="top", transform=axes.get_yaxis_transform())
    axes.set_ylim(0.0, max(25.0, float(percent[len(percent) // 20 :].max()) + 1.0))
    axes.set_xlim(0.0, float(million_tokens[-1]))
    axes.yaxis.set_major_formatter("{x:.0f} %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK, length=3)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.7)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    main()
