"""Measure ours beside its peers: `moelastic bench`, or `python -m bench` with `tests` importable."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from bench import abft, failover_cost, generation, growth, kernels, leak, overload, shadow_load, slots
from bench.document import FOLDER, fill_readme, write
from bench.profile import profile
from bench.report import plot, section_of
from bench.rig import Rig, running, start_cluster
from bench.settings import CASES, ECHO, OURS, SMOKE, Settings
from bench.tables import Section
from cluster.local.cluster import LocalCluster

Shared = Callable[[Rig], Section]
Own = Callable[[LocalCluster, Settings, Path], Section]
# In this process alone.
ALONE: dict[str, Callable[[Settings], Section]] = {"kernels": kernels.run, "abft": abft.run}
# On one deployment, with the peers beside it or without.
SHARED: dict[str, Shared] = {"overload": overload.run, "generation": generation.run}
# Each with deployments of its own, one after the other.
OWN: dict[str, Own] = {"growth": growth.run, "slots": slots.run}
# Likewise, on a cluster with other nodes for shadows.
ON_NODES: dict[str, Own] = {"failover_cost": failover_cost.run, "shadow_load": shadow_load.run}
NUM_NODES = 4
DEFAULT = ("kernels", "peers", "profile", *SHARED)
EVERYTHING = (*DEFAULT, "abft", *OWN, *ON_NODES, "leak")


def main() -> None:
    """One command, one run: tables, a JSON file, plots."""
    given = _parser().parse_args()
    settings = settings_of(given)
    wanted = tuple(given.only.split(",")) if given.only else EVERYTHING if given.full else DEFAULT
    if given.profile:
        wanted = ("profile",)
    if given.leak is not None:
        wanted, settings = ("leak",), replace(settings, leak_requests=given.leak)
    if unknown := set(wanted) - set(EVERYTHING):
        message = f"--only: {', '.join(sorted(unknown))} is none of {', '.join(EVERYTHING)}"
        raise SystemExit(message)
    console = Console(width=190)
    with tempfile.TemporaryDirectory(prefix="moelastic-bench-") as folder:
        measure(settings, wanted, Path(folder), given.out, console)
    if given.out == FOLDER:
        fill_readme(given.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moelastic bench", description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the JSON file and the plots")
    parser.add_argument("--only", help=f"comma-separated sections out of {', '.join(EVERYTHING)}; default: {', '.join(DEFAULT)}")
    parser.add_argument("--full", action="store_true", help="every section; up to 40 minutes")
    parser.add_argument("--rounds", type=int, help="how often each row takes its turn")
    parser.add_argument("--seconds", type=float, help="how long each turn is")
    parser.add_argument("--actors", type=int, help="expert actors; default: one for each core")
    parser.add_argument("--layout", choices=("mapped", "packed", "widened", "auto"), help="actors.layout of our deployment")
    parser.add_argument("--rows", help="comma-separated rows of the section `peers`, as its table names them")
    parser.add_argument("--cases", help="comma-separated CALLERSxTOKENS out of those that are known, as in 1x8,16x64")
    parser.add_argument("--smoke", action="store_true", help="tiny experts, one short round: whether it works, not how fast")
    parser.add_argument("--profile", action="store_true", help="the section `profile` alone: where the time of one request goes")
    parser.add_argument("--leak", type=int, metavar="N", help="the section `leak` alone, with so many requests")
    return parser


def settings_of(given: argparse.Namespace) -> Settings:
    """The settings that the options ask for."""
    changes = {"rounds": given.rounds, "seconds": given.seconds, "num_actors": given.actors, "layout": given.layout}
    settings = replace(SMOKE if given.smoke else Settings(), **{name: value for name, value in changes.items() if value})
    if given.rows:
        settings = replace(settings, rows=tuple(name for name in given.rows.split(",") if name != ECHO))  # which is always measured
    if given.cases:
        wanted = set(given.cases.split(","))
        settings = replace(settings, cases=tuple(case for case in CASES if f"{case.callers}x{case.tokens}" in wanted))
    return settings


def measure(settings: Settings, wanted: tuple[str, ...], folder: Path, out: Path, console: Console, cluster: LocalCluster | None = None) -> Path | None:
    """Take sections and write each as soon as it is there. `cluster`: one that runs already and is left running. Returns the JSON's path."""
    begun_s = time.monotonic()
    path: Path | None = None

    def keep(name: str, section: Section) -> None:
        nonlocal path
        section.show(console)
        path = write(out, settings, {name: section})
        console.print(f"{name}: {time.monotonic() - begun_s:.0f} s since the start; wrote {path}")

    for name, alone in ALONE.items():
        if name in wanted:
            keep(name, alone(settings))
    if {"peers", "profile", "leak", *SHARED, *OWN} & {*wanted}:
        with on_cluster(folder / "one-node", cluster, 1) as used:
            _on_one_deployment(settings, wanted, folder, out, console, used, keep)
            _each(OWN, used, settings, wanted, folder, keep)
    if {*ON_NODES} & {*wanted}:
        with on_cluster(folder / "nodes", cluster, NUM_NODES) as used:
            _each(ON_NODES, used, settings, wanted, folder, keep)
    return path


def _each(
    runs: Mapping[str, Own], cluster: LocalCluster, settings: Settings, wanted: tuple[str, ...], folder: Path, keep: Callable[[str, Section], None]
) -> None:
    """The wanted ones, one after the other."""
    for name, run in runs.items():
        if name in wanted:
            keep(name, run(cluster, settings, folder))


@contextmanager
def on_cluster(folder: Path, given: LocalCluster | None, num_nodes: int) -> Iterator[LocalCluster]:
    """The given cluster, or one of a head and so many nodes for as long as it is used."""
    if given is not None:
        yield given
        return
    folder.mkdir()
    cluster = start_cluster(folder, num_nodes)
    try:
        yield cluster
    finally:
        cluster.stop()


def _on_one_deployment(
    settings: Settings, wanted: tuple[str, ...], folder: Path, out: Path, console: Console, cluster: LocalCluster, keep: Callable[[str, Section], None]
) -> None:
    """What needs peers while they run; then the rest, with nobody beside it."""
    if "peers" in wanted:
        with running(settings, folder / "peers", cluster) as rig:
            section = take_turns(rig, folder, console)
        keep("peers", section)
        plot(out, settings.cases, section)
    if {"profile", "leak", *SHARED} & {*wanted}:
        with running(replace(settings, rows=(OURS,)), folder / "alone", cluster) as rig:
            for name, run in {"profile": profile, **SHARED, "leak": leak.run}.items():
                if name in wanted:
                    keep(name, run(rig))


def take_turns(rig: Rig, folder: Path, console: Console) -> Section:
    """Check every answer, measure the rows in turns."""
    differences = rig.check_answers(folder)
    idle_cores = rig.idle_cores()
    for number in range(rig.settings.rounds):
        console.print(f"round {number + 1} of {rig.settings.rounds}")
        for case in rig.settings.cases:
            for row in rig.rows_of(case):
                row.take(case, rig.settings)
    return section_of(rig, differences, idle_cores)


if __name__ == "__main__":
    main()
