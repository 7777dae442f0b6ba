"""The run folder of a local cluster: its state, its token, its logs. Everything that must be ended is written here before it is started."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.core.errors import ConfigError

FORMAT = 1
DEFAULT_NAME = "default"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ProcessRecord(_Record):
    """A process by what no other process ever shares: its id and its start time (seconds since 1970)."""

    kind: str
    pid: int
    start_s: float


class NodeRecord(_Record):
    """One logical node."""

    name: str
    node_id: str
    num_gpus: int
    raylet: ProcessRecord


class LocalState(_Record):
    """A local cluster. `marker` is in the environment of all its processes; `keeper` leads their session and adopts their orphans."""

    format: int = FORMAT
    name: str
    phase: Literal["starting", "ready"]
    marker: str
    boot_id: str
    created_unix_s: float
    temp_dir: Path
    token_path: Path
    keeper: ProcessRecord | None = None
    gcs_address: str = ""
    dashboard_url: str = ""
    nodes: tuple[NodeRecord, ...] = ()


class RunFolder:
    """`.moelastic/local/NAME/` below the working directory, or any other folder."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    @classmethod
    def named(cls, name: str = DEFAULT_NAME, base: Path | None = None) -> RunFolder:
        """The folder of a local cluster of this name, below the working directory."""
        return cls((base or Path.cwd()) / ".moelastic" / "local" / name)

    @property
    def state_path(self) -> Path:
        """Where the state lies."""
        return self.path / "state.json"

    @property
    def launch_log(self) -> Path:
        """What starting it wrote."""
        return self.path / "launch.log"

    @property
    def token_path(self) -> Path:
        """The token of its Ray cluster."""
        return self.path / "ray_token"

    def read(self) -> LocalState | None:
        """The recorded state, or None; raises ConfigError when the file is not one of ours."""
        try:
            text = self.state_path.read_text()
        except FileNotFoundError:
            return None
        try:
            return LocalState.model_validate_json(text)
        except ValidationError as error:
            message = f"{self.state_path}: not the state of a local cluster ({error.error_count()} errors); remove the file once its processes are gone"
            raise ConfigError(message) from error

    def write(self, state: LocalState) -> None:
        """Replace the state in one step; it is on disk when this returns."""
        temporary = self.state_path.with_suffix(".new")
        with temporary.open("w") as file:
            file.write(state.model_dump_json(indent=2))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.state_path)

    def forget(self) -> None:
        """Remove the state and the token: nothing of the cluster is left."""
        self.state_path.unlink(missing_ok=True)
        self.token_path.unlink(missing_ok=True)

    def make_token(self) -> Path:
        """Write a new token that only its owner can read."""
        self.token_path.unlink(missing_ok=True)
        descriptor = os.open(self.token_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        return self.token_path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against a second start or stop; raises ConfigError when another one is at work."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                message = f"{self.path}: another command is starting or stopping this local cluster; wait for it, or choose another --run-dir"
                raise ConfigError(message) from error
            yield


def boot_id() -> str:
    """Which boot of the machine this is: after another one, no recorded process can be alive."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
