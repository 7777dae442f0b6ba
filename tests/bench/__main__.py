"""Measure ours beside its peers: `moelastic bench`, or `python -m bench` with `tests` importable."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from bench.profile import profile
from bench.report import figure_of, show, write
from bench.rig import Rig, running
from bench.settings import CASES, SMOKE, Settings
from cluster.local.settings import PROJECT_ROOT


def main() -> None:
    """One command, one run: a table, a JSON file, two plots."""
    parser = argparse.ArgumentParser(prog="moelastic bench", description=__doc__)
    parser.add_argument("--out", type=Path, default=PROJECT_ROOT / "docs" / "bench", help="folder of the JSON file and the plots")
    parser.add_argument("--rounds", type=int, help="how often each row takes its turn")
    parser.add_argument("--seconds", type=float, help="how long each turn is")
    parser.add_argument("--actors", type=int, help="expert actors; default: one for each core")
    parser.add_argument("--rows", help="comma-separated: in_process, moelastic, ray_actors, serve_actors.per_expert, serve_actors.all_in_one")
    parser.add_argument("--cases", help="comma-separated CALLERSxTOKENS out of those that are known, as in 1x8,16x64")
    parser.add_argument("--smoke", action="store_true", help="tiny experts, one short round: whether it works, not how fast")
    parser.add_argument("--profile", action="store_true", help="print where the time of one request goes, instead of the table")
    given = parser.parse_args()
    changes = {"rounds": given.rounds, "seconds": given.seconds, "num_actors": given.actors}
    settings = replace(SMOKE if given.smoke else Settings(), **{name: value for name, value in changes.items() if value})
    if given.rows:
        settings = replace(settings, rows=tuple(given.rows.split(",")))
    if given.cases:
        wanted = set(given.cases.split(","))
        settings = replace(settings, cases=tuple(case for case in CASES if f"{case.callers}x{case.tokens}" in wanted))
    if given.profile:
        settings = replace(settings, rows=("moelastic",))
    console = Console(width=170)
    with tempfile.TemporaryDirectory(prefix="moelastic-bench-") as folder, running(settings, Path(folder)) as rig:
        if given.profile:
            profile(rig, console)
        else:
            measure(rig, Path(folder), given.out, console)


def measure(rig: Rig, folder: Path, out: Path, console: Console) -> Path:
    """Check every answer, take the rows in turns, report. Returns the JSON's path."""
    differences = rig.check_answers(folder)
    for number in range(rig.settings.rounds):
        console.print(f"round {number + 1} of {rig.settings.rounds}")
        for case in rig.settings.cases:
            for row in rig.rows_of(case):
                row.take(case, rig.settings)
    figures = [figure_of(case, row) for case in rig.settings.cases for row in rig.rows_of(case)]
    show(rig.settings.cases, figures, console)
    path = write(out, rig.settings, figures, differences)
    console.print(f"wrote {path}")
    return path


if __name__ == "__main__":
    main()
