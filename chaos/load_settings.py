"""What the runner and its load process say to each other: settings in a file, one JSON command per line, one JSON answer per line."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class LoadSettings(BaseModel):
    """One load process. `known_path` holds inputs and their exact answers; requests go to `records_path`, odd replies to `kept_dir`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    token_path: Path | None
    model: str
    layer: int
    fidelity: str
    timeout_s: float
    known_path: Path
    records_path: Path
    kept_dir: Path
    max_outstanding: int = 4096
    seed: int = 0


class Command(BaseModel):
    """`start`: a closed loop of `callers`, or an open loop of `rate` requests/s; `stop`: finish what is under way; `mark`: just answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    do: str
    callers: int = 0
    rate: float = 0.0
