"""`up` and `down` without Ray: what is asked of whom, in which order, and what is remembered."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app as cli
from cluster.cli import up_down
from cluster.cli.up_down import EXAMPLE_CONFIG, connection_in
from cluster.config import parse_config
from cluster.core.errors import ConfigError, FleetError, MoeError
from cluster.deploy.__main__ import clear_text_warning, served_line
from cluster.deploy.connection import FILE_NAME, PRINTED, Connection
from cluster.local import processes
from cluster.local.run_folder import LocalState, NodeRecord, RunFolder, boot_id

MARKER = "up-down-test-marker"


def run(*arguments: str) -> str:
    """The output; errors of ours pass through, as in `main`."""
    result = CliRunner().invoke(cli.app, list(arguments))
    if isinstance(result.exception, MoeError | KeyboardInterrupt):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def has_ended(process: subprocess.Popen[str]) -> bool:
    """Its exit code may have been taken by whoever ended it."""
    process.wait(10)
    return True


@pytest.fixture
def head() -> Iterator[subprocess.Popen[str]]:
    """A plain process in place of a local cluster's head."""
    script = "import time; print('up', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", script], env={processes.MARKER_VARIABLE: MARKER}, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process
        process.kill()


@pytest.fixture
def folder(head: subprocess.Popen[str], tmp_path: Path) -> RunFolder:
    """A run folder of a cluster with one deployment."""
    made = RunFolder(tmp_path)
    node = NodeRecord(name="head", node_id="ab", num_gpus=0, raylet=processes.record("raylet", head.pid))
    made.write(
        LocalState(
            name="t",
            phase="ready",
            marker=MARKER,
            boot_id=boot_id(),
            created_unix_s=node.raylet.start_s,
            temp_dir=tmp_path / "none",
            token_path=made.make_token(),
            nodes=(node,),
        )
    )
    (tmp_path / up_down.CONFIG_NAME).write_text(EXAMPLE_CONFIG.read_text())
    Connection(name="tiny-moe-lm").write(tmp_path / FILE_NAME)
    return made


@pytest.fixture
def deployer(monkeypatch: pytest.MonkeyPatch, head: subprocess.Popen[str]) -> Callable[[BaseException | None], list[list[str]]]:
    """Stands in for the deployer's process: notes what it is asked while the head runs, and ends as told."""

    def set_up(outcome: BaseException | None) -> list[list[str]]:
        asked: list[list[str]] = []

        def run_it(command: list[str], _environment: Any, **_options: Any) -> None:
            assert head.poll() is None
            asked.append(command[1:])
            if outcome is not None:
                raise outcome

        monkeypatch.setattr(up_down, "_run", run_it)
        return asked

    return set_up


def test_down_lets_the_deployment_finish_before_its_processes_end(folder: RunFolder, head: subprocess.Popen[str], deployer: Any) -> None:
    asked = deployer(None)
    text = run("down", "--local", "--run-dir", str(folder.path), "--wait-s", "7")
    assert asked == [["-m", "cluster.deploy", "--config", str(folder.path / up_down.CONFIG_NAME), "--down", "--wait-s", "7.0"]]
    assert has_ended(head)
    assert "ended 1 processes, nothing left behind" in text
    assert folder.read() is None
    assert not (folder.path / FILE_NAME).exists()


@pytest.mark.parametrize("outcome", [FleetError("the controller did not answer"), KeyboardInterrupt()])
def test_down_ends_everything_also_when_the_deployment_does_not_finish(
    folder: RunFolder, head: subprocess.Popen[str], deployer: Any, outcome: BaseException
) -> None:
    asked = deployer(outcome)
    result = CliRunner().invoke(cli.app, ["down", "--local", "--run-dir", str(folder.path)])
    assert len(asked) == 1
    assert has_ended(head)
    assert "nothing left behind" in result.output
    assert folder.read() is None
    if isinstance(outcome, FleetError):
        assert "the controller did not answer; ending everything now" in result.output


@pytest.mark.parametrize("option", ["--now", "--force"])
def test_down_now_asks_nobody(folder: RunFolder, head: subprocess.Popen[str], deployer: Any, option: str) -> None:
    asked = deployer(None)
    run("down", "--local", option, "--run-dir", str(folder.path))
    assert asked == []
    assert has_ended(head)


def test_a_deployer_that_hangs_is_ended_at_its_limit() -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(FleetError, match="what is asked took longer than 1 s"):
        up_down._run(command, {}, what="what is asked", limit_s=1.0)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stands in for a job: notes its options and prints what a deployer prints."""
    asked: list[list[str]] = []

    def submit(_config: Path, _address: str | None, options: list[str]) -> list[str]:
        asked.append(options)
        connection = Connection(name="tiny-moe-lm", router_address="192.0.2.7:50051", token_path=Path("/on-the-head/token"), control_address="192.0.2.7:9")
        return ["copies 32/32", f"{PRINTED}{connection.model_dump_json()}", "Job succeeded"]

    monkeypatch.setattr(up_down, "_submit", submit)
    return asked


def test_up_remembers_how_a_job_s_deployment_is_reached_and_down_forgets_it(job: list[list[str]], tmp_path: Path) -> None:
    text = run("up", str(EXAMPLE_CONFIG), "--address", "http://192.0.2.7:8265", "--run-dir", str(tmp_path / "run"))
    found = Connection.read(tmp_path / "run" / FILE_NAME)
    assert found is not None
    assert (found.router_address, found.control_address) == ("192.0.2.7:50051", "192.0.2.7:9")
    assert "the token lies on the head node, in /on-the-head/token" in text
    run("down", str(EXAMPLE_CONFIG), "--force", "--run-dir", str(tmp_path / "run"))
    assert Connection.read(tmp_path / "run" / FILE_NAME) is None
    assert [options[0] for options in job] == ["--print-connection", "--down"]
    assert "--force" in job[1]


def test_a_token_file_of_this_machine_is_used_as_it_lies(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("the-secret")
    line = up_down.next_step(Connection(name="d", token_path=token), RunFolder(tmp_path))
    assert line.startswith("next: moelastic status")
    assert "the-secret" not in line


def test_a_local_cluster_s_folder_is_not_taken_for_another_deployment(folder: RunFolder, job: list[list[str]]) -> None:
    with pytest.raises(ConfigError, match="belongs to a local cluster"):
        run("up", str(EXAMPLE_CONFIG), "--run-dir", str(folder.path))
    assert job == []


def test_output_without_a_connection_has_none() -> None:
    assert connection_in(["serving", "Job 'x' succeeded"]) is None


@pytest.mark.parametrize(
    ("router", "is_warned"),
    [
        ("{}", False),
        ("{host: localhost}", False),
        ("{host: '::1'}", False),
        ("{host: 0.0.0.0}", True),
        ("{host: head.example}", True),
        ("{host: 0.0.0.0, tls_cert: c, tls_key: k}", False),
    ],
)
def test_an_open_port_without_tls_is_warned_of_in_one_line(router: str, tmp_path: Path, *, is_warned: bool) -> None:
    spec = parse_config(f"models: [{{name: a, path: /w}}]\nrouter: {router}\n", origin=tmp_path / "c.yaml")
    warning = clear_text_warning(spec)
    assert ("clear text" in warning) is is_warned
    assert "\n" not in warning


def test_what_is_degraded_is_not_called_serving(tmp_path: Path) -> None:
    connection = Connection(name="d", router_address="h:1", token_path=tmp_path)
    assert served_line(connection, "") == f"d: serving on h:1   token file {tmp_path}"
    assert served_line(connection, "node-3 is gone") == f"d: DEGRADED (node-3 is gone), answers on h:1   token file {tmp_path}"
