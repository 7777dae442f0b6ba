from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from cluster.cli import app as cli
from cluster.cli.endpoints import find_connection, find_trace_dir
from cluster.cli.trace import show_last
from cluster.cli.up_down import EXAMPLE_CONFIG, stage
from cluster.config import load_config
from cluster.core.errors import CheckpointError, ConfigError, MoeError, NotFound
from cluster.core.spec import Rung
from cluster.deploy.code_digest import PACKAGES
from cluster.deploy.connection import FILE_NAME, Connection
from cluster.registry.ladder_file import LADDER_FILE

COMMANDS = ["up", "down", "status", "doctor", "generate", "config schema", "config check", "checkpoint manifest", "trace last"]


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and output; errors of ours pass through, as in `main`."""
    result = CliRunner().invoke(cli.app, list(arguments))
    if isinstance(result.exception, MoeError):
        raise result.exception
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    code, text = run(*command.split(), "--help")
    assert code == 0
    assert "Usage:" in text


def test_an_error_is_one_line_with_its_name_and_exit_code_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["moelastic", "status", "--run-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("CONFIG_ERROR: no deployment is known here")
    assert error.count("\n") == 1
    assert "moelastic up --local" in error


def test_the_shipped_example_is_a_config_that_can_be_deployed() -> None:
    code, text = run("config", "check", str(EXAMPLE_CONFIG))
    assert code == 0
    assert ": ok: tiny-moe-lm" in text


@pytest.mark.parametrize("config", sorted((EXAMPLE_CONFIG.parent).glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(config: Path) -> None:
    assert load_config(config).models


def test_a_config_with_an_unknown_key_is_refused_by_its_path(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("models: [{name: a, path: b}]\nactors: {standbye: 1}\n")
    with pytest.raises(ConfigError, match=r"actors\.standbye: unknown key; did you mean `standby`"):
        run("config", "check", str(config))


def test_the_schema_is_json() -> None:
    code, text = run("config", "schema")
    assert code == 0
    assert "models" in json.loads(text)["required"]


def test_deploying_without_a_cluster_or_a_config_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"CONFIG is missing.*--local"):
        run("up")
    with pytest.raises(ConfigError, match=r"no Ray cluster is named.*--local"):
        run("up", str(EXAMPLE_CONFIG))
    with pytest.raises(ConfigError, match="CONFIG is missing"):
        run("down")


def test_taking_down_what_does_not_run_is_fine(tmp_path: Path) -> None:
    for _ in range(2):
        code, text = run("down", "--local", "--run-dir", str(tmp_path / "run"))
        assert code == 0
        assert "nothing ran" in text


def test_what_up_local_serves_has_every_rung_and_may_be_struck() -> None:
    """As the README has it: `moelastic up --local`, then `moelastic chaos run kill_actor`."""
    spec = load_config(EXAMPLE_CONFIG)
    (model,) = spec.models
    assert model.shadow is not None
    assert set(model.ladder) == set(get_args(Rung))
    assert (model.path / LADDER_FILE).is_file()
    assert spec.chaos == "allowed"
    code, text = run("chaos", "validate", "kill_actor")
    assert code == 0, text


def test_a_staged_job_holds_our_packages_and_a_config_without_relative_paths(tmp_path: Path) -> None:
    spec = load_config(EXAMPLE_CONFIG)
    stage(tmp_path, spec)
    assert {path.name for path in tmp_path.iterdir()} == {*PACKAGES, "config.yaml"}
    assert not list(tmp_path.rglob("__pycache__"))
    staged = load_config(tmp_path / "config.yaml")
    assert staged == spec
    assert staged.models[0].path.is_absolute()


def test_an_endpoint_that_is_named_wins_over_the_run_folder(tmp_path: Path) -> None:
    token = tmp_path / "token"
    Connection(name="d", router_address="127.0.0.1:1", token_path=token, control_address="127.0.0.1:2").write(tmp_path / FILE_NAME)
    assert find_connection(tmp_path).control_address == "127.0.0.1:2"
    assert find_connection(tmp_path, endpoint="127.0.0.1:1").token_path == token
    other = find_connection(tmp_path, endpoint="elsewhere:1", token_file=tmp_path / "mine")
    assert (other.router_address, other.token_path, other.control_address) == ("elsewhere:1", tmp_path / "mine", "")
    with pytest.raises(ConfigError, match=r"writes no traces; set `telemetry\.trace_dir`"):
        find_trace_dir(tmp_path, None)


def test_an_empty_trace_store_names_the_setting_to_change(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(NotFound, match=r"telemetry\.sampling_ratio"):
            show_last(folder)


def test_a_manifest_of_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--dtype: int8 is not one of"):
        run("checkpoint", "manifest", str(tmp_path), "--dtype", "int8")
    with pytest.raises(CheckpointError):
        run("checkpoint", "manifest", str(tmp_path))


def test_a_prompt_for_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        run("generate", "hello", "--endpoint", "127.0.0.1:1", "--model", str(tmp_path))
