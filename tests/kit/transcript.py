"""Golden transcripts: a text file of commands, each followed by what the code under test answered; read as a story, reviewed as a diff."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

REWRITE = "MOELASTIC_REWRITE_TRANSCRIPTS"
_INDENT = "    "


def replay(path: Path, run: Callable[[str], list[str]]) -> tuple[str, str]:
    """Run every command of a transcript through `run`, which answers with lines. Returns (the file as it is, the file as it would be).

    With MOELASTIC_REWRITE_TRANSCRIPTS=1 the file is rewritten with the new answers.
    """
    recorded = path.read_text(encoding="utf-8")
    lines: list[str] = []
    for line in recorded.splitlines():
        if line.startswith(_INDENT):
            continue
        lines.append(line)
        if line and not line.startswith("#"):
            lines.extend(_INDENT + answer for answer in run(line))
    replayed = "\n".join(lines) + "\n"
    if os.environ.get(REWRITE) == "1":
        path.write_text(replayed, encoding="utf-8")
        return replayed, replayed
    return recorded, replayed
