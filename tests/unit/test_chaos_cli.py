from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import typer
from typer.testing import CliRunner

from chaos import campaign, cli, runner
from chaos.campaign import Outcome, append_record, read_records
from chaos.core.report import ActionRecord, Judged, Record, ending_of, journal, judge, summarise, unknown_assertions
from chaos.core.run_machine import Ending
from chaos.core.tolerance import Tolerance
from chaos.report_files import read_any, write_report
from chaos.scenario_files import SHIPPED, find, load, names
from cluster.cli.app import app
from cluster.core.errors import ConfigError
from kit.chaos import FakeCluster, FakeSession, scenario_file

JOURNAL_KEYS = {"experiment", "status", "deviated", "start", "end", "duration", "steady_states", "run", "rollbacks", "platform", "node"}


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["chaos", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def record(number: int = 0, ending: str = "PASSED", scenario: str = "kill_actor", **metrics: float | None) -> Record:
    return Record(
        scenario=scenario,
        digest=load(SHIPPED / f"{scenario}.yaml").digest,
        seed=1,
        repetition=number,
        started="2026-01-01T00:00:00+00:00",
        duration_s=1.0,
        ending=ending,
        reason="",
        deployment="d",
        fidelity="any",
        tokens=8,
        rate=10.0,
        actions=[],
        steady_states={},
        metrics={"requests": 10.0, "failed": 0.0, "detected_ms": 10.0 + number} | metrics,
        affected_ms=[10.0, 30.0 + number],
        control_ms=[10.0, 20.0],
    )


def outcome(ending: Ending) -> Outcome:
    written = journal(experiment={}, records=[], judged=[], summary={}, ending=ending, times=("", "", 0.0), place={})
    return Outcome([], {}, [], ending, written, 0.0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    made = FakeCluster()
    extra = {
        "close": lambda: None,
        "cluster": SimpleNamespace(folder=SimpleNamespace(path="here")),
        "spec": SimpleNamespace(models=[SimpleNamespace(name="m")]),
    }
    for name, value in extra.items():
        setattr(made, name, value)
    monkeypatch.setattr(cli, "_target", lambda _run_dir: made)
    return made


@pytest.mark.parametrize("ending", list(Ending))
def test_the_exit_code_says_how_it_ended(ending: Ending, fake: FakeCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "_carry_out", lambda *_arguments, **_options: outcome(ending))
    path = tmp_path / "journal.json"
    code, _ = invoke("run", "kill_actor", "--yes", "--journal-path", str(path))
    assert code == ending
    assert set(json.loads(path.read_text())) >= JOURNAL_KEYS
    assert fake.done == []


def test_a_cluster_that_does_not_answer_is_no_fault_of_the_scenario(fake: FakeCluster) -> None:
    fake.is_silent = True
    code, text = invoke("run", "kill_actor", "--yes")
    assert code == Ending.BASELINE_NOT_MET
    assert "the controller does not answer" in text


def test_a_dry_run_names_its_target_and_strikes_nobody(fake: FakeCluster) -> None:
    code, text = invoke("run", "kill_actor", "--dry", "--seed", "5")
    assert code == 0
    assert "seed 5" in text.splitlines()[0]
    assert "kill_actor on actor-0/g1" in text
    assert fake.done == []


def test_without_a_terminal_nobody_is_struck_unless_yes_is_said(fake: FakeCluster) -> None:
    code, text = invoke("run", "kill_actor")
    assert code == Ending.BAD_SCENARIO
    assert "--yes" in text
    assert fake.done == []


def test_no_cluster_is_a_refusal_that_says_what_to_do(tmp_path: Path) -> None:
    code, text = invoke("run", "kill_actor", "--yes", "--run-dir", str(tmp_path))
    assert code == Ending.BAD_SCENARIO
    assert "moelastic up --local" in text


def test_a_crash_of_chaos_itself_is_no_deviation(fake: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_carry_out", lambda *_arguments, **_options: 1 / 0)
    code, text = invoke("run", "kill_actor", "--yes")
    assert code == cli.EXIT_CRASHED
    assert code not in set(Ending)
    assert "ZeroDivisionError" in text
    assert fake.done == []


@pytest.mark.parametrize("error", [typer.Abort, KeyboardInterrupt])
def test_a_question_that_is_not_answered_is_an_interruption(error: type[BaseException], fake: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_confirm", asked)
    code, text = invoke("run", "kill_actor")
    assert (code, fake.done) == (Ending.INTERRUPTED, [])
    assert "interrupted" in text


def test_the_help_tells_every_exit_code() -> None:
    code, text = invoke("run", "--help")
    assert code == 0
    words = " ".join(text.replace("│", " ").split())
    assert "Exit code: 0 held, 1 deviated, 2 bad scenario or refused, 3 steady state not met, 4 aborted by a guard, 5 interrupted" in words
    assert f"{cli.EXIT_CRASHED} an error in chaos itself" in words


def test_what_was_stopped_goes_on_when_the_one_who_stopped_it_is_killed() -> None:
    """The whole chain with real processes: a stopper stops a child of ours, is killed, and the dead man's switch resumes the child."""
    script = (
        "import os, signal, sys, time; from chaos.dead_man import DeadMan; from chaos.core.targets import Process\n"
        "pid, start = int(sys.argv[1]), float(sys.argv[2]); DeadMan().guard(Process('x', pid, start)); os.kill(pid, signal.SIGSTOP)\n"
        "print('stopped', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        start_s = psutil.Process(child.pid).create_time()
        command = [sys.executable, "-c", script, str(child.pid), repr(start_s)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stopper:
            assert stopper.stdout is not None
            assert stopper.stdout.readline() == b"stopped\n"
            stopper.kill()
        child.communicate(b"\n", timeout=20)  # a stopped child would never read it
        assert child.returncode == 0


@pytest.mark.parametrize("name", names())
def test_every_shipped_scenario_is_valid_and_its_assertions_are_measured(name: str) -> None:
    file = load(find(name))
    assert unknown_assertions(file.scenario.assertions) == []
    assert invoke("validate", name)[0] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metod": []}, "metod"),
        ({"method": [{"name": "a", "at": 0, "fault": "kill_actr", "target": {"kind": "actor"}}]}, "unknown fault kill_actr"),
        ({"assertions": {"added_p98_ms": 1}}, "nothing is measured as added_p98_ms"),
        ({"seed": "${nothing}"}, "is not in `configuration`"),
        ({"load": {"fidelity": "some"}}, "load.fidelity"),
    ],
)
def test_a_wrong_scenario_is_refused_by_its_place(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    import yaml

    document = yaml.safe_load((SHIPPED / "kill_actor.yaml").read_text()) | change
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(document))
    code, text = invoke("validate", str(path))
    assert code == Ending.BAD_SCENARIO
    assert words in text


def test_records_are_pooled_and_counted_only_when_the_fault_was_there() -> None:
    refused = ActionRecord(name="kill", fault="kill_actor", target="actor-0/g1", problem="it had left")
    never_struck = record(3, ending="DEVIATED", failed=9.0).model_copy(update={"actions": [refused]})
    summary = summarise([record(0), record(1, failed=1.0), record(2, ending="INTERRUPTED", failed=7.0), never_struck])
    assert (summary["repetitions"], summary["failed"], summary["requests"]) == (2, 1, 20)
    assert summary["added_p99_ms"] == pytest.approx(10.5)  # the median of 10 and 11
    assert (summary["affected_p99_ms"], summary["control_p99_ms"]) == (31.0, 20.0)
    assert (summary["detected_ms"], summary["detected_ms_p99"]) == (10.0, 11.0)
    assert summary["availability"] == pytest.approx(0.95)
    assert [found.ok for found in judge(summary, {"failed": Tolerance(equals=0), "detected_ms": Tolerance(at_most=10)})] == [False, True]


def test_a_control_window_that_something_disturbed_hides_no_other_run_s_added_latency() -> None:
    disturbed = record(2).model_copy(update={"control_ms": [500.0, 900.0]})
    summary = summarise([record(0), record(1), disturbed])
    assert summary["added_p99_ms"] == pytest.approx(10.0)
    assert summary["p99_ratio"] == pytest.approx(1.5)


def test_the_worst_of_several_repetitions_decides() -> None:
    held, broken = (Judged(name="failed", value=0.0, tolerance="", ok=ok, reason="") for ok in (True, False))
    assert ending_of([record(0)], [held]) is Ending.PASSED
    assert ending_of([record(0)], [broken]) is Ending.DEVIATED
    assert ending_of([record(0), record(1, "DEVIATED")], [held]) is Ending.DEVIATED
    assert ending_of([record(0), record(1, "ABORTED")], [held]) is Ending.ABORTED
    assert ending_of([record(0), record(1, "INTERRUPTED"), record(2, "ABORTED")], [held]) is Ending.INTERRUPTED


def test_a_killed_writer_leaves_records_that_can_be_read_and_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_record(path, record(0))
    with path.open("a") as file:
        file.write('{"scenario": "kill')
    assert [found.repetition for found in read_records(path)] == [0]
    append_record(path, record(1))
    assert [found.repetition for found in read_records(path)] == [0, 1]
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(ConfigError, match=r"records\.jsonl:1: not a record"):
        read_records(path)


async def test_repetitions_that_are_recorded_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records.jsonl"
    for number in range(2):
        append_record(path, record(number))
    monkeypatch.setattr(campaign, "opened", None)  # no session may be opened
    file = load(find("kill_actor"))
    found = await campaign.run(campaign.Campaign(file, tmp_path, 2, 1, path, resumes=True), None, print)  # type: ignore[arg-type]
    assert [done.repetition for done in found.records] == [0, 1]


@pytest.mark.parametrize(("failures", "endings"), [([1, 0], ["BASELINE_NOT_MET", "PASSED"]), ([1, 1, 1, 0], ["BASELINE_NOT_MET"] * 3)])
async def test_a_steady_state_that_is_missed_is_waited_for_a_few_times(
    failures: list[int], endings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.asynccontextmanager
    async def opened(*_arguments: object, **_options: object) -> AsyncIterator[FakeSession]:
        yield FakeSession(failures=list(failures))

    monkeypatch.setattr(campaign, "opened", opened)
    monkeypatch.setattr(runner, "SETTLE_S", 0.0)
    path = tmp_path / "records.jsonl"
    found = await campaign.run(campaign.Campaign(scenario_file(), tmp_path, 1, 1, path), FakeCluster(), lambda _record: None)  # type: ignore[arg-type]
    assert [done.ending for done in read_records(path)] == endings
    assert [done.ending for done in found.records] == endings[-1:]
    assert found.ending is Ending[endings[-1]]


def test_the_report_is_made_from_records_alone(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    for number in range(3):
        append_record(path, record(number))
    page = write_report(read_any(path), tmp_path / "out", source=path)
    text = page.read_text()
    assert "SIGKILL of an expert actor" in text
    assert "| failed | 0 | equal to 0 | held |" in text
    assert text.splitlines()[2].startswith("3 runs on ")
    assert "floor.md" not in text
    assert {found.name for found in page.parent.iterdir()} == {"README.md", "latency.png", "times.png"}
    code, printed = invoke("report", str(path))
    assert code == 0
    assert "SIGKILL of an expert actor" in printed
    assert invoke("report", str(tmp_path / "none.jsonl"))[0] == Ending.BAD_SCENARIO


def test_the_report_tells_runs_from_those_that_do_not_count_and_leads_to_the_floor_where_that_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_record(path, record(0))
    append_record(path, record(1, "INTERRUPTED"))
    (tmp_path / "floor.md").write_text("# How early a death can be known\n")
    text = write_report(read_any(path), tmp_path, source=path).read_text()
    assert text.splitlines()[2].startswith("1 run (1 not counted: begun, and the fault never struck, or was not over at the end) on ")
    assert "SIGKILL of an expert actor; 1 run (1 not counted" in text
    assert "[floor.md](floor.md)" in text


def test_a_time_that_was_not_held_stands_beside_what_the_router_waited_for_a_core_and_a_count_does_not(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_record(path, record(detected_ms=90.0, failed=1.0, sched_wait_ms=615.0, control_sched_wait_ms=453.0))
    text = write_report(read_any(path), tmp_path / "out", source=path).read_text()
    assert "| detected_ms | 90 | at most 30 | **not held**; scheduler wait 615 ms/s, control 453 ms/s |" in text
    assert "| failed | 1 | equal to 0 | **not held** |" in text
    assert "| 20 | 615 (453) | 90 (90) |" in text


def test_a_report_is_made_even_when_no_fault_was_reached(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_record(path, record(0, "BASELINE_NOT_MET").model_copy(update={"affected_ms": [], "control_ms": []}))
    assert "SIGKILL of an expert actor" in write_report(read_any(path), tmp_path / "out", source=path).read_text()
    append_record(path, record(0, scenario="lose_gpu"))
    assert "GPU lost" in write_report(read_any(path), tmp_path / "out", source=path).read_text()


def test_list_names_every_fault_and_scenario() -> None:
    code, text = invoke("list")
    assert code == 0
    for word in (*names(), "lose_node", "flip_weights", "availability", "added_p99_ms"):
        assert word in text


@pytest.mark.parametrize("command", ["", "run", "validate", "list", "report"])
def test_every_command_explains_itself(command: str) -> None:
    code, text = invoke(*filter(None, [command]), "--help")
    assert code == 0
    assert "Usage: moelastic chaos" in text
