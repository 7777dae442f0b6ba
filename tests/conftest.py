"""What holds for a whole run of the tests: it leaves nothing behind."""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest

from cluster.local.cluster import MARKER_FILE
from cluster.local.processes import MARKER_VARIABLE
from kit.waiting import wait_until

# A test that is itself a driver on the shared cluster imports ray, which reads these at its import. Otherwise Ray would turn 127.0.0.1 into the
# machine's own address, where nothing of a local cluster listens. What the tests start as processes gets an environment of its own.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("moelastic", deadline=None)
hypothesis.settings.load_profile("moelastic")

ROOT = Path(__file__).resolve().parents[1]
RUN_VARIABLE = "MOELASTIC_TEST_RUN"
LIMIT_S = 20.0
# Interpreters, event loops and libraries keep a few for as long as the process lives; a leak is one for each test or request.
MAX_NEW_DESCRIPTORS = {"socket": 32, "file": 64, "pipe": 32, "other": 32}
# What tools, or whoever works beside the tests, make in the project's folder; anything else that is new there is a stray.
OF_TOOLS = {".hypothesis", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".import_linter_cache", "__pycache__", ".git", ".coverage", "runs", ".moelastic"}


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """Set up before every other fixture, so torn down after them: processes, temp dirs, open descriptors and files of this run are gone.

    Other runs may go on beside this one: its processes are told by a variable that everything it starts inherits.
    """
    run = os.environ[RUN_VARIABLE] = secrets.token_hex(16)
    temp_dirs, entries, before = _temp_dirs(), _root_entries(), _descriptors()
    yield
    gc.collect()
    _require_none(lambda: _left(run), "processes that the tests started")
    _require_none(lambda: _abandoned(_temp_dirs() - temp_dirs), "temp dirs of local clusters that have ended")
    assert _root_entries() - entries <= OF_TOOLS, f"stray files in {ROOT}: {sorted(_root_entries() - entries - OF_TOOLS)}"
    grown = {kind: count - before[kind] for kind, count in _descriptors().items()}
    assert all(grown[kind] <= MAX_NEW_DESCRIPTORS[kind] for kind in grown), f"descriptors left open, by kind: {grown}"


def _require_none(find: Callable[[], list[Any]], what: str) -> None:
    """Nothing is found any more, within a limit: what was ended may take a moment to go."""
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not find(), what, timeout_s=LIMIT_S)
    left = find()
    assert not left, f"left behind: {what}: {left}"


def _left(run: str) -> list[str]:
    """Descendants of this process, and whatever else inherited the variable of this run."""
    descendants = {process.pid for process in psutil.Process().children(recursive=True)}
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            if process.status() != psutil.STATUS_ZOMBIE and (process.pid in descendants or process.environ().get(RUN_VARIABLE) == run):
                found.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
        except (psutil.Error, OSError):
            continue
    return found


def _temp_dirs() -> set[Path]:
    return {path for base in {tempfile.gettempdir(), "/tmp"} for path in Path(base).glob("mo-*") if (path / MARKER_FILE).is_file()}  # noqa: S108


def _abandoned(folders: set[Path]) -> list[Path]:
    """Those of which no process runs: a cluster that runs is somebody else's, since ours were looked for before."""
    running = set()
    for process in psutil.process_iter():
        try:
            running.add(process.environ().get(MARKER_VARIABLE))
        except (psutil.Error, OSError):
            continue
    return [folder for folder in folders if (folder / MARKER_FILE).is_file() and (folder / MARKER_FILE).read_text() not in running]


def _root_entries() -> set[str]:
    return {path.name for path in ROOT.iterdir()}


def _descriptors() -> Counter[str]:
    """Open descriptors of this process, by kind."""
    kinds: Counter[str] = Counter(dict.fromkeys(MAX_NEW_DESCRIPTORS, 0))
    for entry in Path("/proc/self/fd").glob("*"):
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        kind = target.partition(":")[0]
        kinds["file" if target.startswith("/") else kind if kind in MAX_NEW_DESCRIPTORS else "other"] += 1
    return kinds
