"""What `python -m cluster.deploy` is made of, without Ray."""

from __future__ import annotations

import io
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from cluster.config import parse_config
from cluster.core.errors import ConfigError
from cluster.deploy.code_digest import PACKAGES, PROJECT_ROOT, code_digest
from cluster.deploy.connection import Connection, read_token
from cluster.deploy.progress import Progress, phase_of, state_line
from cluster.deploy.secrets import load_or_make, with_tenant_tokens


def spec_of(text: str) -> str:
    return f"models: [{{name: a, path: /w}}]\n{text}"


def test_secrets_are_made_once_and_only_their_owner_can_read_them(tmp_path: Path) -> None:
    first = load_or_make(tmp_path / "state")
    again = load_or_make(tmp_path / "state")
    assert first == again
    assert first.link_secret != first.control_token
    assert len(first.link_secret) == len(first.control_token) == 32
    for path in (tmp_path / "state").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert first.control_token.hex() not in repr(first)
    assert read_token(first.control_token_path) == first.control_token.hex()


@pytest.mark.parametrize("content", ["", "not hex", "abcd"])
def test_a_secret_of_another_form_is_refused_by_path(tmp_path: Path, content: str) -> None:
    (tmp_path / "link_secret").write_text(content)
    with pytest.raises(ConfigError, match="link_secret"):
        load_or_make(tmp_path)


def test_without_tenants_one_is_made_and_with_tenants_or_without_auth_nothing_is(tmp_path: Path) -> None:
    origin = tmp_path / "c.yaml"
    made = with_tenant_tokens(parse_config(spec_of(""), origin=origin), tmp_path)
    assert made.auth.tokens == {"default": tmp_path / "tokens" / "default"}
    assert len(made.auth.tokens["default"].read_text()) == 64
    assert with_tenant_tokens(made, tmp_path) == made
    for text in ("auth: {tokens: {alice: t}}", "auth: {enabled: false}"):
        spec = parse_config(spec_of(text), origin=origin)
        assert with_tenant_tokens(spec, tmp_path / "other") == spec
    assert not (tmp_path / "other").exists()


def test_the_code_digest_changes_with_served_code_only(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(PROJECT_ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    digest = code_digest(tmp_path)
    assert digest == code_digest(PROJECT_ROOT)
    (tmp_path / "cluster" / "cli" / "app.py").write_text("# other")
    (tmp_path / "cluster" / "notes.txt").write_text("other")
    assert code_digest(tmp_path) == digest
    (tmp_path / "actors" / "new_module.py").write_text("")
    assert code_digest(tmp_path) != digest


def test_a_connection_reads_back_and_holds_no_secret(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("the-secret")
    connection = Connection(name="d", router_address="h:1", token_path=token)
    connection.write(tmp_path / "c" / "connection.json")
    assert Connection.read(tmp_path / "c" / "connection.json") == connection
    assert "the-secret" not in (tmp_path / "c" / "connection.json").read_text()
    assert Connection.read(tmp_path / "none.json") is None
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"bad\.json"):
        Connection.read(tmp_path / "bad.json")


def test_progress_off_a_terminal_is_one_plain_line_for_each_change() -> None:
    file = io.StringIO()
    with Progress(Console(file=file, width=40)) as progress:
        for text in ("one", "one", "two [not markup]", "one"):
            progress.show(text)
        progress.say("end")
    assert file.getvalue().splitlines() == ["one", "two [not markup]", "one", "end"]


def test_progress_off_a_terminal_says_a_change_within_a_phase_only_some_seconds_after_the_last_line() -> None:
    file, clock = io.StringIO(), [100.0]
    with Progress(Console(file=file), clock=lambda: clock[0]) as progress:
        for at_s, phase in ((0, "A"), (1, "A"), (4.9, "A"), (5, "A"), (6, "A"), (7, "B"), (8, "B"), (13, "B"), (13.5, "B"), (14, "A")):
            clock[0] = 100.0 + at_s
            progress.show(f"{phase} at {at_s}", phase=phase)
        clock[0] = 200.0
        progress.show("A at 14", phase="A")
        progress.show("A at 13.9", phase="A")
    assert file.getvalue().splitlines() == ["A at 0", "A at 5", "B at 7", "B at 13", "A at 14", "A at 13.9"]


def test_a_terminal_shows_every_change_at_once() -> None:
    file = io.StringIO()
    with Progress(Console(file=file, force_terminal=True, width=80), clock=lambda: 0.0) as progress:
        spinner = progress._spinner
        assert spinner is not None
        for text in ("one", "two"):
            progress.show(text, phase="same")
            assert str(spinner.status) == text


def test_a_state_line_says_how_far_and_what_is_missing() -> None:
    status = {
        "state": "DEPLOYING",
        "actors": [{"state": "ready"}, {"state": "starting"}],
        "routers": [{"state": "ready"}],
        "num_copies_ready": 3,
        "num_copies_wanted": 8,
        "imports": [{"model": "tiny", "num_done": 4, "num_wanted": 9}],
        "message": "actor-1 waits for a GPU",
    }
    line = state_line(status)
    for part in ("DEPLOYING", "actors 1/2", "copies 3/8", "routers 1/1", "tiny: 4/9", "actor-1 waits for a GPU"):
        assert part in line
    assert "waits" not in state_line(status | {"state": "SERVING"})


def test_a_phase_is_what_is_waited_for_not_how_far_it_is() -> None:
    def phase(state: str, ready: int, wanted: int, *routers: str) -> str:
        return phase_of({"state": state, "num_copies_ready": ready, "num_copies_wanted": wanted, "routers": [{"state": router} for router in routers]})

    steps = [phase("DEPLOYING", 0, 0), phase("DEPLOYING", 0, 8), phase("DEPLOYING", 8, 8, "starting"), phase("SERVING", 8, 8, "ready")]
    assert len(set(steps)) == len(steps)
    assert phase("DEPLOYING", 7, 8, "starting") == phase("DEPLOYING", 0, 8, "ready")
    assert phase("DEGRADED", 7, 8, "ready") != phase("SERVING", 8, 8, "ready")


@pytest.mark.parametrize(("config", "named"), [("nodels: []", "nodels: unknown key; did you mean `models`?"), (spec_of(""), "no Ray cluster to deploy on")])
def test_a_deployment_that_cannot_begin_says_why_and_fails(tmp_path: Path, config: str, named: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(config)
    environment = {"PATH": "/usr/bin", "PYTHONPATH": str(PROJECT_ROOT), "RAY_ADDRESS": "", "RAY_TMPDIR": str(tmp_path), "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "cluster.deploy", "--config", str(path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert named in done.stderr
    assert "Traceback" not in done.stderr
