"""`python -m examples.failover`, which `make chaos` runs: every scenario, as often as asked, on clusters of its own; then the report.

Each repetition is one line of `docs/failover/records.jsonl`. What is there already counts: an interrupted campaign goes on where it was. All of it
takes a little over an hour on two cores; `budget` says why, in seconds per repetition.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from chaos.campaign import Campaign, Outcome, read_records, run
from chaos.cli import summary_line
from chaos.core.report import Record
from chaos.core.run_machine import Ending
from chaos.report_files import write_report
from chaos.scenario_files import SHIPPED, ScenarioFile, load, names
from chaos.target import LocalTarget
from cluster.cli.up_down import deploy_local
from cluster.config import load_config
from cluster.core.errors import MoeError
from cluster.deploy.connection import FILE_NAME, Connection
from cluster.local.cluster import LocalCluster
from cluster.local.run_folder import RunFolder
from cluster.local.settings import PROJECT_ROOT, LocalSettings
from examples.failover.budget import DEPLOY_S, NUM_DEPLOYMENTS, planned_s
from examples.failover.layer import save_layer

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
CONFIGS = PROJECT_ROOT / "examples" / "configs"
RESULTS = PROJECT_ROOT / "docs" / "failover"
NUM_NODES = 4
DEPLOY_LIMIT_S = 300.0
# Scenarios that need two full-precision copies of every expert run on a deployment of their own.
TWO_REPLICAS = frozenset({"kill_actor_exact", "stop_actor_exact", "lose_gpu_exact", "slow_replica"})


def main() -> int:
    """Run what is missing, write the report."""
    options = _options()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        outcomes = _run_all(options)
    except MoeError as error:
        sys.stderr.write(f"{error.reason}: {error}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; everything stopped, what was recorded counts next time\n")
        return EXIT_INTERRUPTED
    if records := read_records(options.records):
        sys.stdout.write(f"wrote {write_report(records, options.records.parent, source=_shown(options.records))}\n")
    return 0 if all(outcome.ending is Ending.PASSED for outcome in outcomes) else EXIT_FAILED


def _run_all(options: argparse.Namespace) -> list[Outcome]:
    wanted = [_at_rate(load(SHIPPED / f"{name}.yaml"), options.rate) for name in options.scenarios or names()]
    groups = (
        ("chaos.yaml", [file for file in wanted if file.name not in TWO_REPLICAS]),
        ("chaos_exact.yaml", [file for file in wanted if file.name in TWO_REPLICAS]),
    )
    outcomes: list[Outcome] = []
    _say(f"{len(wanted)} scenarios: about {NUM_DEPLOYMENTS * DEPLOY_S / 60 + planned_s(wanted) / 60:.0f} minutes when nothing is recorded yet")
    for config, files in groups:
        left = [file for file in files if _num_missing(file, options) > 0]
        if left:
            outcomes += _run_group(config, left, options)
        if any(outcome.ending is Ending.INTERRUPTED for outcome in outcomes):
            raise KeyboardInterrupt
    return outcomes


def _run_group(config: str, files: Sequence[ScenarioFile], options: argparse.Namespace) -> list[Outcome]:
    """One cluster, one deployment, its scenarios one after the other; the peak of a load is measured once for each kind of load."""
    save_layer()
    folder = RunFolder(PROJECT_ROOT / "runs" / "failover" / Path(config).stem)
    _say(f"starting a local cluster for {config}")
    cluster = LocalCluster.start(LocalSettings(name="failover", num_nodes=NUM_NODES), folder)
    outcomes: list[Outcome] = []
    peaks: dict[tuple[object, ...], float] = {}
    try:
        deploy_local(cluster, load_config(CONFIGS / config), wait_s=DEPLOY_LIMIT_S)
        for file in files:
            outcome = _run_one(file, folder, peaks, options)
            outcomes.append(outcome)
            if outcome.ending is Ending.INTERRUPTED:
                break
    finally:
        cluster.stop()
    return outcomes


def _run_one(file: ScenarioFile, folder: RunFolder, peaks: dict[tuple[object, ...], float], options: argparse.Namespace) -> Outcome:
    connection = Connection.read(folder.path / FILE_NAME)
    assert connection is not None  # noqa: S101  (the deployment above wrote it)
    target = LocalTarget(folder, connection)
    load_spec = file.scenario.load
    kind = (load_spec.model, load_spec.layer, load_spec.callers, load_spec.tokens, load_spec.fidelity)
    repetitions = min(options.repetitions or file.scenario.repetitions, file.scenario.repetitions)
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    work = PROJECT_ROOT / "runs" / "chaos" / f"{stamp}-{file.name}"
    _say(f"{file.name}: {file.scenario.title}: {_num_missing(file, options)} runs to go")
    try:
        campaign = Campaign(file, work, repetitions, file.scenario.seed, options.records, resumes=True, peak=peaks.get(kind))
        outcome = asyncio.run(run(campaign, target, _show))
    finally:
        target.close()
    if outcome.peak:
        peaks[kind] = outcome.peak
    for found in outcome.judged:
        _say(f"  {'held    ' if found.ok else 'NOT HELD'} {found.reason}")
    return outcome


def _at_rate(file: ScenarioFile, rate: float) -> ScenarioFile:
    """The scenario as it is, or with so many requests a second instead of its share of the peak."""
    if not rate:
        return file
    at_rate = file.scenario.load.model_copy(update={"rate": rate, "share_of_peak": None})
    return replace(file, scenario=file.scenario.model_copy(update={"load": at_rate}))


def _num_missing(file: ScenarioFile, options: argparse.Namespace) -> int:
    wanted = min(options.repetitions or file.scenario.repetitions, file.scenario.repetitions)
    done = sum((record.scenario, record.digest) == (file.name, file.digest) and record.is_counted for record in read_records(options.records))
    return max(0, wanted - done)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.failover", description=__doc__)
    parser.add_argument("scenarios", nargs="*", help="names of shipped scenarios; default: all")
    parser.add_argument("--repetitions", type=int, default=0, help="of each scenario, at most; default: what each says")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second; default: half of the peak; wants --records of its own")
    parser.add_argument("--records", type=Path, default=RESULTS / "records.jsonl", help="one line per repetition; what is there counts")
    options = parser.parse_args()
    if options.rate and options.records == RESULTS / "records.jsonl":
        parser.error("--rate is another load than that of the records there: give --records PATH, too")
    return options


def _show(record: Record) -> None:
    _say(summary_line(record))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _shown(path: Path) -> Path:
    return path.relative_to(PROJECT_ROOT) if path.is_relative_to(PROJECT_ROOT) else path


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
