"""`moelastic chaos`: strike a local cluster on purpose, see what its callers notice, and judge it by numbers."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chaos.core.run_machine import Ending
from cluster.core.errors import ConfigError, MoeError

if TYPE_CHECKING:
    from chaos.campaign import Outcome
    from chaos.core.report import Record
    from chaos.scenario_files import ScenarioFile
    from chaos.target import LocalTarget

EXIT_CRASHED = 70  # EX_SOFTWARE of sysexits.h
app = typer.Typer(help="Faults on purpose, on a local cluster whose spec allows them.", no_args_is_help=True, rich_markup_mode=None)
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="folder of the local cluster; default: .moelastic/local/default")]


@app.command()
def run(
    scenario: Annotated[str, typer.Argument(help="a YAML file, or the name of a shipped scenario")],
    run_dir: RunDir = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="whom and when to strike follows from it; default: the scenario's")] = None,
    repeat: Annotated[int | None, typer.Option("--repeat", min=1, help="repetitions; default: the scenario's")] = None,
    journal_path: Annotated[Path | None, typer.Option("--journal-path", help="where the journal goes; default: runs/chaos/TIME-NAME/journal.json")] = None,
    records: Annotated[Path | None, typer.Option("--records", help="append one JSON line per repetition here")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="with --records: repetitions that are there already count")] = False,
    dry: Annotated[bool, typer.Option("--dry", help="check everything, choose targets, inject nothing")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Run a scenario.

    Exit code: 0 held, 1 deviated, 2 bad scenario or refused, 3 steady state not met, 4 aborted by a guard, 5 interrupted, or not confirmed, 70 an
    error in chaos itself, which says nothing about the cluster.
    """
    with _exit_codes():
        file = _loaded(scenario)
        with contextlib.closing(_target(run_dir)) as target:
            first = file.scenario.seed if seed is None else seed
            typer.echo(f"{file.name} ({file.digest}), seed {first}: {file.scenario.title}; on {target.name} in {target.cluster.folder.path}")
            _confirm(file, target, dry=dry, yes=yes, seed=first)
            if dry:
                raise typer.Exit(Ending.PASSED)
            folder = Path("runs") / "chaos" / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{file.name}"
            outcome = _carry_out(file, target, folder, seed=first, repeat=repeat or file.scenario.repetitions, records=records, resume=resume)
            _tell(outcome, journal_path or folder / "journal.json")
        raise typer.Exit(outcome.ending)


@app.command()
def validate(scenario: Annotated[str, typer.Argument(help="a YAML file, or the name of a shipped scenario")]) -> None:
    """Check a scenario: schema, faults, targets, probes, assertions. Nothing is injected, no cluster is needed."""
    with _exit_codes():
        file = _loaded(scenario)
    typer.echo(f"{file.path}: ok: {file.scenario.title} ({len(file.scenario.method)} actions, {len(file.scenario.assertions)} assertions)")


@app.command("list")
def list_all() -> None:
    """The shipped scenarios, the faults with their arguments, the probes, and what assertions may be about."""
    from chaos.core.report import summarise
    from chaos.faults.table import FAULTS
    from chaos.probes.table import PROBES
    from chaos.scenario_files import SHIPPED, load, names

    typer.echo("scenarios")
    for name in names():
        typer.echo(f"  {name:<20} {load(SHIPPED / f'{name}.yaml').scenario.title}")
    typer.echo("faults (target kinds; arguments)")
    for kind in FAULTS.values():
        arguments = ", ".join(kind.settings.model_fields) or "none"
        typer.echo(f"  {kind.name:<20} {kind.summary} ({', '.join(sorted(kind.kinds))}; {arguments})")
    typer.echo(f"probes\n  {', '.join(PROBES)}")
    typer.echo(f"assertions\n  {', '.join(sorted(summarise([])))}")


@app.command()
def report(
    records: Annotated[Path, typer.Argument(help="a journal, or a file of records")],
    out: Annotated[Path | None, typer.Option("--out", help="folder for README.md and plots; default: print the tables")] = None,
) -> None:
    """Tables, and plots, of what was recorded."""
    from chaos.report_files import read_any, tables, write_report

    with _exit_codes():
        found = read_any(records)
        if out is None:
            typer.echo("\n".join(tables(found)))
        else:
            typer.echo(f"wrote {write_report(found, out, source=records)}")


def _loaded(scenario: str) -> ScenarioFile:
    from chaos.scenario_files import find, load

    return load(find(scenario))


def _target(run_dir: Path | None) -> LocalTarget:
    from chaos.target import LocalTarget
    from cluster.cli.endpoints import find_connection, run_folder

    return LocalTarget(run_folder(run_dir), find_connection(run_dir))


def _confirm(file: ScenarioFile, target: LocalTarget, *, dry: bool, yes: bool, seed: int) -> None:
    """Say who would be struck; ask, unless told not to. Raises ConfigError when nobody can be asked."""
    from chaos.plan import planned_targets

    for line in planned_targets(file, target, seed):
        typer.echo(f"  {line}")
    if dry or yes:
        return
    if not sys.stdin.isatty():
        message = "nobody can be asked whether to go on: standard input is no terminal; give --yes"
        raise ConfigError(message)
    if not typer.confirm(f"strike {target.name}?"):
        raise typer.Exit(Ending.INTERRUPTED)


def _carry_out(file: ScenarioFile, target: LocalTarget, folder: Path, *, seed: int, repeat: int, records: Path | None, resume: bool) -> Outcome:
    from chaos import campaign

    found = campaign.Campaign(file, folder, repeat, seed, records, resume)
    return asyncio.run(campaign.run(found, target, _show))


def _show(record: Record) -> None:
    typer.echo(summary_line(record))


def summary_line(record: Record) -> str:
    """One repetition on one line."""
    from chaos.core.figures import shown

    metrics = record.metrics
    struck = ", ".join(f"{action.fault} {action.target}" for action in record.actions) or "nothing struck"
    facts = ", ".join(
        f"{name} {shown(metrics[name])}" for name in ("failed", "wrong", "detected_ms", "exact_again_s", "copies_again_s") if metrics.get(name) is not None
    )
    return f"  {record.repetition:>3} {record.ending.lower():<9} {struck}: {facts}{f'; {record.reason}' if record.reason else ''}"


def _tell(outcome: Outcome, path: Path) -> None:
    from chaos.campaign import write_journal

    for found in outcome.judged:
        typer.echo(f"  {'held    ' if found.ok else 'NOT HELD'} {found.reason}")
    write_journal(path, outcome)
    typer.echo(f"{outcome.ending.name.lower()}; journal: {path}")


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """Every way out has a code of its own: left alone, a crash and a Ctrl-C at the question would exit as 1, which says that a cluster deviated."""
    try:
        yield
    except typer.Exit:
        raise
    except MoeError as error:
        typer.echo(f"{error.reason}: {error}", err=True)
        raise typer.Exit(Ending.BAD_SCENARIO if isinstance(error, ConfigError) else Ending.BASELINE_NOT_MET) from error
    except (typer.Abort, KeyboardInterrupt) as error:
        typer.echo("interrupted", err=True)
        raise typer.Exit(Ending.INTERRUPTED) from error
    except Exception as error:
        traceback.print_exc()
        raise typer.Exit(EXIT_CRASHED) from error
