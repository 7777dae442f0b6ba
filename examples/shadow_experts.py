"""What it costs to lose one expert: held-out bits per byte of the shipped model with that expert alone answered by a shadow, for every expert and codec.

    python -m examples.shadow_quality --by-expert docs/shadows --text FILE...

writes `by_expert.json`, `by_expert.md` and `by_expert.png` into the folder. `rounded` shadows are made of the primary alone, as a node makes them; `fitted`
ones of calibration rows too. Errors and cosines are those of the expert's outputs on rows that nothing was fitted to.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from actors.core.codecs import CODECS, FITTED_CODECS, decode
from examples.tiny_moe_lm.scoring import heldout_texts
from router_service.calibration.shadows import COMPENSATED, ExpertShadows
from router_service.calibration.subject import Loss, Place, Subject, wide_weights

DROPPED = "dropped"
_SHOWN_RANGE_PERCENT = (0.003, 30.0)


class Scorer(Protocol):
    """A subject, and how much more bits per byte a loss costs it, in percent."""

    subject: Subject

    def rise(self, loss: Loss) -> float:
        """Of one loss."""
        ...


@dataclass(frozen=True)
class Cell:
    """One expert in one codec. `memory_percent` of its primary; the last field is the rise of bits per byte with this expert alone shadowed."""

    layer: int
    index: int
    codec: str
    memory_percent: float
    relative_error: float
    cosine: float
    bits_per_byte_percent: float


def columns() -> dict[str, str]:
    """Every kind of shadow, as tables call it, and its name among those that calibration makes."""
    found = {"int8": "int8"}
    for name in CODECS:
        if name != "int8":
            found |= {f"{name} rounded": name, f"{name} fitted": f"{name}{COMPENSATED}"}
    return found | {name: name for name in FITTED_CODECS}


def cells(scorer: Scorer, made: Sequence[ExpertShadows]) -> Iterator[Cell]:
    """Each expert dropped, then in each codec that there is of it."""
    for expert in made:
        layer, index = expert.place
        rise = scorer.rise(Loss(lost=[expert.place], rungs=("fewer_experts",)))
        yield Cell(layer, index, DROPPED, 0.0, 1.0, 0.0, rise)
        for title, name in columns().items():
            if name in expert.shadows:
                yield _cell(scorer, expert, title, name)


def _cell(scorer: Scorer, expert: ExpertShadows, title: str, name: str) -> Cell:
    shadow = expert.shadows[name]
    weights = wide_weights(scorer.subject, expert.place, decode(shadow.packed))
    memory = 100 * shadow.packed.num_bytes / sum(array.nbytes for array in scorer.subject.primaries[expert.place].values())
    rise = scorer.rise(Loss(instead={expert.place: weights}))
    return Cell(*expert.place, title, memory, shadow.fidelity.relative_error, shadow.fidelity.cosine, rise)


class Progress:
    """Experts that are scored already, one a line of a file in the report's folder: a run that was ended goes on where it was, on the same facts only."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder, self.facts = folder, dict(facts)
        self.usage: dict[Place, float] = {}
        self.cells: dict[Place, list[Cell]] = {}
        self._path = folder / "by_expert.partial.jsonl"
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        for record in map(json.loads, lines):
            if record["facts"] == self.facts:
                self._keep([Cell(**cell) for cell in record["cells"]], record["usage"])

    def add(self, found: Sequence[Cell], usage: float) -> None:
        """One expert is scored."""
        self._keep(found, usage)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"facts": self.facts, "usage": usage, "cells": [asdict(cell) for cell in found]}) + "\n")

    def report(self) -> dict[str, Any]:
        """All of it, experts in order."""
        usage = {f"{layer}/{index}": self.usage[layer, index] for layer, index in sorted(self.usage)}
        return {**self.facts, "usage": usage, "cells": [asdict(cell) for place in sorted(self.cells) for cell in self.cells[place]]}

    def end(self) -> None:
        """The report is written; the next run begins anew."""
        self._path.unlink(missing_ok=True)

    def _keep(self, found: Sequence[Cell], usage: float) -> None:
        place = (found[0].layer, found[0].index)
        self.cells[place], self.usage[place] = [*found], usage


def write_report(done: Progress, scorer: Scorer, made: Iterable[ExpertShadows]) -> None:
    """Score every expert that is made; write the JSON, its tables and its picture of all that are done."""
    begun_s = time.process_time()
    for expert in made:
        found = list(cells(scorer, [expert]))
        done.add(found, expert.usage)
        layer, index = expert.place
        print(f"expert {layer}/{index}: dropped {found[0].bits_per_byte_percent:+.3f} %; {time.process_time() - begun_s:.0f} CPU s", flush=True)
    report = done.report()
    (done.folder / "by_expert.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (done.folder / "by_expert.md").write_text("\n".join(page(report)) + "\n", encoding="utf-8")
    draw(report, done.folder / "by_expert.png")
    done.end()


def page(report: Mapping[str, Any]) -> list[str]:
    """The page: a summary by codec, then a table for each figure."""
    found = [Cell(**cell) for cell in report["cells"]]
    titles, num_bytes = [DROPPED, *columns()], report["scored_bytes"] // len(heldout_texts())
    lines = [
        "# One expert at a time",
        "",
        "The shipped model with one expert answered by its shadow, or dropped (the other weights rescaled), and all others exact.",
        f"{report['scored_bytes']:,} held-out bytes, {report['bits_per_byte']:.4f} bits per byte without a loss; shadows fitted to",
        f"{report['calibration_rows']:,} tokens of training-side text. Written by",
        f"`python -m examples.shadow_quality --by-expert docs/shadows --bytes {num_bytes} --rows {report['calibration_rows']} --text TEXT ...`,",
        "with the training side of code, prose and markup as examples/tiny_moe_lm makes them.",
        "",
        "| codec | memory | relative error | cosine | rise of bits per byte: mean | worst | worst expert |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    lines += [_summary(title, [cell for cell in found if cell.codec == title]) for title in titles]
    lines += _table("Rise of bits per byte, percent", found, titles, lambda cell: f"{cell.bits_per_byte_percent:+.3f}", report["usage"])
    lines += _table("Relative error of the outputs", found, titles[1:], lambda cell: f"{cell.relative_error:.3f}", report["usage"])
    lines += _table("Cosine of the outputs", found, titles[1:], lambda cell: f"{cell.cosine:.4f}", report["usage"])
    return lines


def _summary(title: str, found: Sequence[Cell]) -> str:
    worst = max(found, key=lambda cell: cell.bits_per_byte_percent)
    error, cosine = (mean(getattr(cell, name) for cell in found) for name in ("relative_error", "cosine"))
    rise, memory = mean(cell.bits_per_byte_percent for cell in found), mean(cell.memory_percent for cell in found)
    return f"| {title} | {memory:.1f} % | {error:.3f} | {cosine:.4f} | {rise:+.4f} % | {worst.bits_per_byte_percent:+.3f} % | {worst.layer}/{worst.index} |"


def _table(title: str, found: Sequence[Cell], titles: Sequence[str], text: Any, usage: Mapping[str, float]) -> list[str]:  # noqa: ANN401  (Cell -> str)
    by_place = _by_place(found)
    lines = ["", f"## {title}", "", f"| expert | usage | {' | '.join(titles)} |", "|---|---:|" + "---:|" * len(titles)]
    for (layer, index), cells_of in by_place.items():
        shown = (text(cells_of[name]) if name in cells_of else "" for name in titles)
        lines.append(f"| {layer}/{index} | {100 * usage[f'{layer}/{index}']:.1f} % | {' | '.join(shown)} |")
    return lines


def _by_place(found: Sequence[Cell]) -> dict[Place, dict[str, Cell]]:
    places: dict[Place, dict[str, Cell]] = {}
    for cell in found:
        places.setdefault((cell.layer, cell.index), {})[cell.codec] = cell
    return places


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Experts by codecs, as colours of the rise; what falls or hardly rises is the lightest."""
    found = _by_place([Cell(**cell) for cell in report["cells"]])
    titles = [DROPPED, *columns()]
    rises = np.array([[cells_of[name].bits_per_byte_percent if name in cells_of else np.nan for name in titles] for cells_of in found.values()])
    low, high = _SHOWN_RANGE_PERCENT
    mpl.rcParams.update({"font.family": "DejaVu Sans", "font.size": 8})
    figure, axes = plt.subplots(figsize=(8, 9), layout="constrained")
    shown = axes.imshow(np.clip(rises, low, high), aspect="auto", cmap="OrRd", norm=mpl.colors.LogNorm(low, high))
    axes.set_xticks(range(len(titles)), titles, rotation=45, ha="right")
    axes.set_yticks(range(len(found)), [f"layer {layer}, expert {index}" for layer, index in found])
    for (row, column), rise in np.ndenumerate(rises):
        axes.text(column, row, f"{rise:+.2f}", ha="center", va="center", fontsize=6)
    figure.colorbar(shown, label="rise of held-out bits per byte, percent")
    axes.set_title("One expert lost, everything else exact", loc="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)
