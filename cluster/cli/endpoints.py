"""Where a command finds a deployment: named by its options, else by the run folder of the local cluster."""

from __future__ import annotations

from pathlib import Path

from cluster.core.errors import ConfigError
from cluster.deploy.connection import FILE_NAME, Connection
from cluster.local.run_folder import RunFolder


def run_folder(run_dir: Path | None) -> RunFolder:
    """The run folder that was named, or the default one below the working directory."""
    return RunFolder(run_dir) if run_dir is not None else RunFolder.named()


def find_connection(run_dir: Path | None, *, endpoint: str | None = None, token_file: Path | None = None) -> Connection:
    """How the deployment is reached. Raises ConfigError, with what to do, when nothing says so."""
    path = run_folder(run_dir).path / FILE_NAME
    found = Connection.read(path)
    if endpoint is not None:
        known = found if found is not None and found.router_address == endpoint else None
        base = known or Connection(name=endpoint, router_address=endpoint)
        return base.model_copy(update={"token_path": token_file or base.token_path})
    if found is None:
        message = f"no deployment is known here: {path} does not exist; run `moelastic up --local`, or give --endpoint HOST:PORT and --token-file FILE"
        raise ConfigError(message)
    return found.model_copy(update={"token_path": token_file}) if token_file is not None else found


def find_trace_dir(run_dir: Path | None, trace_dir: Path | None) -> Path:
    """The folder of the deployment's traces. Raises ConfigError, naming the setting, when it writes none."""
    if trace_dir is not None:
        return trace_dir
    found = find_connection(run_dir)
    if found.trace_dir is None:
        message = (
            f"{found.name} writes no traces; set `telemetry.trace_dir` in its config (and `telemetry.sampling_ratio: 1.0` to keep every request), "
            "then deploy it again with --replace"
        )
        raise ConfigError(message)
    return found.trace_dir
