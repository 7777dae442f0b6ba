"""`generate()` of the shipped model with its experts in the cluster, beside transformers in one process: the same folder, the same element type."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from bench.rig import Rig, with_bench
from bench.rows import ModuleProcess, Row
from bench.settings import ECHO, OURS, Case
from bench.tables import Section, Table
from cluster.cli.generate import EXAMPLE_MODEL

BATCHES = (1, 16)
GOALS = {1: 0.5, 16: 0.7}
NEW_TOKENS = 24
ROUNDS = 4
# bf16 on both sides: the worst row's logits were 0.12 apart, relative, where only the order of sums differed.
LOGITS_TOLERANCE = 0.2
IMPLEMENTATIONS = ("eager", "grouped_mm")


@dataclass
class Speaker:
    """One process, and what it took: tokens per second by batch."""

    name: str
    process: ModuleProcess
    experts: str
    tokens_per_s: dict[int, list[float]] = field(default_factory=dict)

    def take(self, batch: int) -> float:
        """Generate once."""
        answer = self.process.ask({"do": "generate", "experts": self.experts, "batch": batch, "new_tokens": NEW_TOKENS})
        return float(answer["tokens"] / answer["wall_s"])


def run(rig: Rig) -> Section:
    """Compare the logits first; then batch by batch, the fastest process of its own found in a trial, both in turns."""
    with ExitStack() as ending, TemporaryDirectory() as folder:
        ours = _ours(rig)
        others = _in_process()
        processes = list(dict.fromkeys(speaker.process for speaker in (ours, *others)))
        for process in processes:
            ending.callback(process.close)
        for process in processes:
            process.wait_until_ready()
        difference = max(_difference(ours, other, Path(folder)) for other in others)
        chosen = {}
        for batch in BATCHES:
            trials = {other.name: max(other.take(batch) for _ in range(2)) for other in others}
            best = next(other for other in others if other.name == max(trials, key=lambda name: trials[name]))
            chosen[batch] = best
            ours.take(batch)
            for _ in range(ROUNDS):
                for speaker in (best, ours):
                    speaker.tokens_per_s.setdefault(batch, []).append(speaker.take(batch))
        ceilings = {batch: _ceiling(rig, batch, median(best.tokens_per_s[batch])) for batch, best in chosen.items()}
    return Section([_table(ours, chosen, ceilings)], _data(ours, chosen, difference) | {"ceilings": ceilings})


def _ceiling(rig: Rig, batch: int, in_process_per_s: float) -> float | None:
    """What the ratio would be if each MoE layer cost one Python gRPC echo, call after call, and nothing else: no service behind gRPC is above it."""
    echo = rig.row(ECHO)
    if not isinstance(echo, Row):
        return None
    echo_s = median(echo.measure(Case(1, batch), rig.settings.seconds, rig.settings.warm_up_calls).latencies_s)
    layers = json.loads((Path(EXAMPLE_MODEL) / "config.json").read_text())["num_hidden_layers"]
    step_s = batch / in_process_per_s
    return float(step_s / (step_s + layers * echo_s))


def _ours(rig: Rig) -> Speaker:
    connection = rig.deployment.connection
    arguments = [connection.router_address, str(connection.token_path), "1", OURS]
    return Speaker(OURS, ModuleProcess("bench.language", arguments, with_bench(dict(os.environ))), OURS)


def _in_process() -> list[Speaker]:
    cores = os.cpu_count() or 1
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "GOMP_", "KMP_"))}
    ways = [(threads, policy) for threads, policy in ((1, "PASSIVE"), (cores, "ACTIVE")) if threads == 1 or cores > 1]
    found = []
    for threads, policy in ways:
        arguments = ["", "", str(threads), ",".join(IMPLEMENTATIONS)]
        process = ModuleProcess("bench.language", arguments, with_bench(environment | {"OMP_WAIT_POLICY": policy}), pausing=True)
        found += [Speaker(f"{experts}, {threads} threads", process, experts) for experts in IMPLEMENTATIONS]
    return found


def _difference(ours: Speaker, other: Speaker, folder: Path) -> float:
    """The worst row of logits against its norm. Raises ValueError above the tolerance."""
    found = []
    for speaker in (ours, other):
        path = folder / "logits.npy"
        speaker.process.ask({"do": "logits", "experts": speaker.experts, "path": str(path)})
        found.append(np.load(path))
    worst = float((np.linalg.norm(found[0] - found[1], axis=1) / np.linalg.norm(found[1], axis=1)).max())
    if not worst <= LOGITS_TOLERANCE:
        message = f"the cluster's logits differ from those of {other.name} by {worst:.3f} of a row; at most {LOGITS_TOLERANCE} is rounding"
        raise ValueError(message)
    return worst


def _data(ours: Speaker, chosen: Mapping[int, Speaker], difference: float) -> dict[str, object]:
    rates = {batch: {"ours": ours.tokens_per_s[batch], "in_process": best.tokens_per_s[batch], "variant": best.name} for batch, best in chosen.items()}
    return {"tokens_per_s": rates, "largest_logits_difference": difference, "new_tokens": NEW_TOKENS}


def _table(ours: Speaker, chosen: Mapping[int, Speaker], ceilings: Mapping[int, float | None]) -> Table:
    rows = []
    for batch, best in chosen.items():
        mine, theirs = ours.tokens_per_s[batch], best.tokens_per_s[batch]
        ratio = median(mine) / median(theirs)
        spread = [f"{median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})" for rates in (mine, theirs)]
        ceiling = "" if (most := ceilings[batch]) is None else f"{most:.2f}"
        rows.append((str(batch), *spread, best.name, f"{ratio:.2f}", ceiling, f"at least {GOALS[batch]}", "yes" if ratio >= GOALS[batch] else "NO"))
    note = (
        f"Greedy, {NEW_TOKENS} new tokens; medians of {ROUNDS} rounds in turns, smallest and largest in brackets; bf16 on both sides."
        " `an echo's`: the ratio if each layer's experts cost one Python gRPC echo and nothing else."
    )
    return Table(
        "generate() of the shipped model, tokens/s",
        ("batch", "ours", "transformers in one process", "its best", "ratio", "an echo's", "goal", "reached"),
        rows,
        note,
    )
