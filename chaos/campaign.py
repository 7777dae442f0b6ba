"""Runs a scenario again and again on one running cluster, one record appended per repetition; a campaign that was interrupted goes on where it was."""

from __future__ import annotations

import asyncio
import contextlib
import json
import platform
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from chaos.core.report import Judged, Record, ending_of, journal, judge, summarise
from chaos.core.run_machine import Ending
from chaos.runner import Repetition
from chaos.scenario_files import ScenarioFile
from chaos.session import Session, opened
from chaos.target import LocalTarget
from cluster.core.errors import ConfigError

STOPPING = frozenset({Ending.BAD_SCENARIO, Ending.BASELINE_NOT_MET, Ending.ABORTED, Ending.INTERRUPTED})
TRIES = 3
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Report = Callable[[Record], None]


@dataclass(frozen=True, slots=True)
class Campaign:
    """One scenario, how often. `records_path`: where each repetition is appended; `resumes`: repetitions that are there already count."""

    file: ScenarioFile
    folder: Path
    repetitions: int
    seed: int
    records_path: Path | None = None
    resumes: bool = False
    peak: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What all repetitions together came to. `peak` may be handed to the next campaign on the same deployment."""

    records: list[Record]
    summary: dict[str, float | None]
    judged: list[Judged]
    ending: Ending
    journal: dict[str, Any]
    peak: float


def read_records(path: Path) -> list[Record]:
    """Every record in a file; a line that a killed run left unfinished at its end is left out. Raises ConfigError for what is no record."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(Record.model_validate_json(line))
        except ValidationError as error:
            if number == len(lines):
                break
            message = f"{path}:{number}: not a record ({error.error_count()} errors); remove the line"
            raise ConfigError(message) from error
    return found


def append_record(path: Path, record: Record) -> None:
    """Add one record; one that a killed run left unfinished is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1])
    with path.open("a") as file:
        file.write(record.model_dump_json() + "\n")


async def run(campaign: Campaign, target: LocalTarget, report: Report) -> Outcome:
    """All repetitions that are missing. On a signal the one under way is healed, recorded as interrupted, and no other is begun."""
    file, scenario = campaign.file, campaign.file.scenario
    start, begin_s = datetime.now(UTC).isoformat(timespec="milliseconds"), time.monotonic()
    done = [] if campaign.records_path is None or not campaign.resumes else read_records(campaign.records_path)
    records = [record for record in done if _is_of(record, campaign) and record.is_counted][: campaign.repetitions]
    peak = campaign.peak or 0.0
    missing = [number for number in range(campaign.repetitions) if number not in {record.repetition for record in records}]
    if missing:
        _make(campaign.folder)
        async with opened(target, scenario.load, campaign.folder, seed=campaign.seed, recover_s=scenario.recover_s, peak=campaign.peak) as session:
            peak = session.peak
            await session.load.begin(callers=scenario.load.callers, rate=session.rate)
            for number in missing:
                record = await _run_one(campaign, session, number, report)
                records.append(record)
                if Ending[record.ending] in STOPPING:
                    break
    summary = summarise(records)
    judged = judge(summary, scenario.assertions)
    ending = ending_of(records, judged)
    times = (start, datetime.now(UTC).isoformat(timespec="milliseconds"), round(time.monotonic() - begin_s, 3))
    place = {"platform": f"{platform.system()} {platform.machine()}", "node": platform.node()}
    experiment = scenario.model_dump(mode="json", by_alias=True) | {"name": file.name, "digest": file.digest, "seed": campaign.seed}
    written = journal(experiment=experiment, records=records, judged=judged, summary=summary, ending=ending, times=times, place=place)
    return Outcome(records, summary, judged, ending, written, peak)


async def _run_one(campaign: Campaign, session: Session, number: int, report: Report) -> Record:
    """One repetition. On a busy machine the steady state may be missed by chance: it is waited for again, and only the last try counts."""
    for tries_left in reversed(range(TRIES)):
        session.load.forget(time.monotonic() - campaign.file.scenario.load.timeout_s)
        repetition = Repetition(campaign.file, session, number, campaign.seed)
        with _signals_to(repetition):
            record = await repetition.run()
        if campaign.records_path is not None:
            append_record(campaign.records_path, record)
        report(record)
        if record.ending != Ending.BASELINE_NOT_MET.name or not tries_left:
            break
    return record


def write_journal(path: Path, outcome: Outcome) -> None:
    """The journal as a file of JSON, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(outcome.journal, indent=2) + "\n")
    temporary.replace(path)


def _is_of(record: Record, campaign: Campaign) -> bool:
    """Whether a record is of this scenario as it is written now, with this seed."""
    return (record.scenario, record.digest, record.seed) == (campaign.file.name, campaign.file.digest, campaign.seed)


@contextlib.contextmanager
def _signals_to(repetition: Repetition) -> Iterator[None]:
    """While a repetition runs, signals end it in order: everything healed first. A second one changes nothing."""
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, repetition.interrupt, signal.Signals(number).name)
    try:
        yield
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
