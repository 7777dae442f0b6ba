"""Where a deployment is reached: addresses and the paths of its tokens, never the tokens. Written by `deploy`, read by the command line."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.core.errors import ConfigError

FILE_NAME = "connection.json"
PRINTED = "connection: "


class Connection(BaseModel):
    """One deployment, as its operators and clients reach it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    router_address: str = ""
    token_path: Path | None = None
    control_address: str = ""
    control_token_path: Path | None = None
    trace_dir: Path | None = None

    def write(self, path: Path) -> None:
        """Replace the file in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        temporary.write_text(self.model_dump_json(indent=2))
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> Connection | None:
        """The connection in this file; None when there is none. Raises ConfigError when it is something else."""
        try:
            text = path.read_text()
        except FileNotFoundError:
            return None
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            message = f"{path}: not a connection file ({error.error_count()} errors); deploy again, or remove it"
            raise ConfigError(message) from error


def read_token(path: Path | None) -> str | None:
    """The token in a file, without its line end; None without a path. Raises ConfigError when it cannot be read."""
    if path is None:
        return None
    try:
        return path.read_text().strip()
    except OSError as error:
        message = f"{path}: cannot read the token ({os.strerror(error.errno or 0)}); give its file with --token-file"
        raise ConfigError(message) from error
