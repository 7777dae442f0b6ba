"""`bench.json`: one entry for each section, with the machine and the load it was taken under. A run replaces the sections that it took.

Run as a module it puts the tables of the JSON file into the README beside it, between its marks, so that no figure is typed by hand.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.settings import Settings
from bench.tables import Section, Table
from cluster.local.settings import PROJECT_ROOT

FOLDER = PROJECT_ROOT / "docs" / "bench"
NAME = "bench.json"
BEGIN, END = "<!-- tables of bench.json; written by `python -m bench.document`, not by hand -->", "<!-- end of the tables -->"


def machine() -> dict[str, Any]:
    """What this ran on."""
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.machine())
    return {
        "cpu": model,
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": psutil.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(folder: Path, settings: Settings, sections: Mapping[str, Section]) -> Path:
    """Put these sections into the folder's `bench.json`; the others stay as they were taken. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    document = json.loads(path.read_text()) if path.is_file() else {}
    taken = {"machine": machine(), "taken_at": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "settings": asdict(settings)}
    for name, section in sections.items():
        document[name] = {**taken, "data": section.data, "tables": [asdict(table) for table in section.tables]}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def tables_of(document: Mapping[str, Any]) -> list[str]:
    """All tables as Markdown, each section with what it was taken on."""
    lines: list[str] = []
    for name, section in document.items():
        found = section["machine"]
        load = ", ".join(f"{value:.1f}" for value in found["load_average"])
        where = f"{found['cores']} cores of {found['cpu']}, {found['memory_bytes'] >> 30} GiB; load average after the run {load}"
        lines += ["", f"### {name}", "", f"{section['taken_at']} UTC; {where}."]
        for table in section["tables"]:
            lines += Table(**table).markdown()
    return [line for number, line in enumerate(lines) if line or lines[number - 1]]


def fill_readme(folder: Path = FOLDER) -> Path:
    """Write the tables into the README, between its marks. Raises ValueError when it has none."""
    path = folder / "README.md"
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        message = f"{path} has no marks: {BEGIN} ... {END}"
        raise ValueError(message)
    document = json.loads((folder / NAME).read_text())
    path.write_text("\n".join([before + BEGIN, *tables_of(document), END]) + after, encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.stdout.write(f"wrote {fill_readme(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)}\n")
