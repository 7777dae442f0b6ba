"""Slow imports take only the cores that nobody else wants, and leave the process as it was."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from actors.quiet_import import import_quietly
from cluster.scheduling import START_NICENESS

MODULE = """
import os, threading
found = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
"""


def test_a_module_is_imported_at_low_priority_and_the_caller_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "says_its_niceness.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    import_quietly("says_its_niceness")
    assert sys.modules["says_its_niceness"].found == max(START_NICENESS, before)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_an_import_that_fails_is_left_to_whoever_needs_it() -> None:
    import_quietly("no_such_module_anywhere")
    assert "no_such_module_anywhere" not in sys.modules
