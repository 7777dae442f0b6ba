from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from cluster.cli import doctor
from cluster.cli.doctor import Finding, examine, show
from cluster.deploy.connection import FILE_NAME, Connection
from cluster.local import processes
from cluster.local.cluster import MARKER_FILE
from cluster.local.run_folder import LocalState, RunFolder, boot_id
from cluster.local.settings import RUN_DIR_VARIABLE

WAIT = "import time; print('up', flush=True); time.sleep(600)"


@pytest.fixture(autouse=True)
def own_temp_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Local clusters of this machine that are not the test's own are not looked at."""
    temp = tmp_path / "temp"
    temp.mkdir()
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: str(temp))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    return temp


def folder_with(path: Path, marker: str = "gone", *, phase: str = "ready") -> RunFolder:
    folder = RunFolder(path)
    folder.path.mkdir(parents=True, exist_ok=True)
    state = LocalState(
        name="t", phase="ready", marker=marker, boot_id=boot_id(), created_unix_s=time.time(), temp_dir=path / "x", token_path=folder.make_token()
    )
    folder.write(state.model_copy(update={"phase": phase}))
    return folder


def wrong(findings: list[Finding], word: str) -> Finding:
    found = [finding for finding in findings if finding.level == "fix" and word in finding.what]
    assert len(found) == 1, findings
    return found[0]


def test_a_clean_folder_has_nothing_to_fix_there(tmp_path: Path) -> None:
    findings = examine(tmp_path / "run")
    assert any(finding.level == "ok" and "no local cluster" in finding.what for finding in findings)


def test_records_of_a_cluster_that_is_gone_are_to_be_cleared(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "run")
    assert wrong(examine(folder.path), "is gone, its records are not").remedy == f"moelastic down --local --run-dir {folder.path}"


def test_a_start_that_was_cut_off_and_an_orphan_are_told_apart(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "run", "marker-of-this-test", phase="starting")
    environment = dict(os.environ) | {processes.MARKER_VARIABLE: "marker-of-this-test", RUN_DIR_VARIABLE: str(folder.path)}
    with subprocess.Popen([sys.executable, "-c", WAIT], env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            wrong(examine(folder.path), "was cut off; 1 processes are left")
            folder.forget()
            orphan = wrong([finding for finding in examine(folder.path) if str(folder.path) in finding.what], "does not know it")
            assert orphan.remedy == f"kill -9 {process.pid}"
        finally:
            process.kill()


def test_a_temp_dir_of_a_cluster_that_is_gone_is_named(tmp_path: Path, own_temp_dir: Path) -> None:
    left = own_temp_dir / "mo-left"
    left.mkdir()
    (left / MARKER_FILE).write_text("nobody's marker")
    assert wrong(examine(tmp_path / "run"), str(left)).remedy == f"rm -r {left}"


def test_a_token_that_others_can_read_is_to_be_closed(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "run")
    folder.token_path.chmod(0o644)
    assert "chmod 600" in wrong(examine(folder.path), "can be read by others").remedy


def test_a_service_that_does_not_answer_is_named_with_what_to_do(tmp_path: Path) -> None:
    Connection(name="d", router_address="127.0.0.1:1", control_address="127.0.0.1:2").write(tmp_path / FILE_NAME)
    findings = examine(tmp_path)
    assert "reconciles" in wrong(findings, "the router of d at 127.0.0.1:1").remedy
    wrong(findings, "the controller of d at 127.0.0.1:2")


def test_an_open_cluster_and_an_ignored_address_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    findings = examine(tmp_path)
    wrong(findings, "RAY_AUTH_MODE")
    assert any("RAY_ADDRESS is set" in finding.what for finding in findings)


def test_versions_that_differ_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_constraints", lambda: "ray==0.1\ntorch==0.2\n")
    finding = wrong(examine(tmp_path), "packages differ")
    assert "instead of 0.1" in finding.what
    assert "instead of 0.2" in finding.what


def test_it_succeeds_only_when_nothing_needs_fixing() -> None:
    console = Console(file=io.StringIO())
    assert show([Finding("ok", "a"), Finding("note", "b", "c")], console)
    assert not show([Finding("fix", "d", "e")], console)
    assert "-> e" in console.file.getvalue()  # type: ignore[attr-defined]
