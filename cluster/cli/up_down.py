"""`up` and `down`, on this machine and on a Ray cluster elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.cli.endpoints import run_folder
from cluster.config import dump_config, load_config
from cluster.core.errors import ConfigError, FleetError, MoeError
from cluster.core.spec import ClusterSpec
from cluster.deploy.code_digest import PACKAGES, PROJECT_ROOT
from cluster.deploy.connection import FILE_NAME, PRINTED, Connection
from cluster.local.cluster import LocalCluster, end_leftovers
from cluster.local.run_folder import RunFolder
from cluster.local.settings import LocalSettings

EXAMPLE_CONFIG = PROJECT_ROOT / "examples" / "configs" / "tiny_moe_lm.yaml"
CONFIG_NAME = "config.yaml"
GRACE_S = 10.0
LOCAL_DRAIN_S = 15.0
REMOTE_DRAIN_S = 60.0
DEPLOYER_START_S = 20.0  # imports, and a driver on the cluster


def up_local(config: Path | None, *, run_dir: Path | None, nodes: int, gpus: int, replace: bool, wait_s: float) -> None:
    """Start a local cluster unless one runs in this folder, then deploy on it; returns when it serves."""
    spec = load_config(config or EXAMPLE_CONFIG)
    folder, console = run_folder(run_dir), Console(highlight=False, soft_wrap=True)
    cluster = LocalCluster.find(folder)
    if cluster is None or not cluster.is_usable:  # starting ends what a killed start, or a head that died, left
        forget_deployment(folder)
        with console.status("starting a local cluster"):
            cluster = LocalCluster.start(LocalSettings(num_nodes=nodes, gpus_per_node=gpus), folder)
        console.print(f"local cluster: head + {nodes} nodes x {gpus} logical GPUs, token auth on, {folder.path}", markup=False)
    deploy_local(cluster, spec, replace=replace, wait_s=wait_s)
    console.print("next: moelastic status, moelastic generate PROMPT, moelastic down --local", markup=False)


def deploy_local(cluster: LocalCluster, spec: ClusterSpec, *, replace: bool = False, wait_s: float) -> None:
    """Deploy on a local cluster from a process of its own; raises FleetError when that fails."""
    config = cluster.folder.path / CONFIG_NAME
    config.write_text(dump_config(spec))
    command = [sys.executable, "-m", "cluster.deploy", "--config", str(config), "--wait-s", str(wait_s)]
    command += ["--connection-file", str(cluster.folder.path / FILE_NAME), *(["--replace"] if replace else [])]
    _run(command, cluster.environment(), what="the deployment")


def down_local(*, run_dir: Path | None, drain_s: float) -> None:
    """End a local cluster with everything on it, whatever its deployment says; before that, for up to `drain_s`, requests under way finish."""
    folder, console = run_folder(run_dir), Console(highlight=False, soft_wrap=True)
    try:
        if drain_s > 0:
            _drain_local(folder, console, drain_s)
    finally:  # an interrupt ends the draining, not the ending
        with folder.locked():
            ended = end_leftovers(folder)
        forget_deployment(folder)
        console.print(f"ended {ended} processes, nothing left behind" if ended else f"nothing ran in {folder.path}", markup=False)


def _drain_local(folder: RunFolder, console: Console, drain_s: float) -> None:
    """Take the recorded deployment down in order; one that cannot be is told of, since what follows ends it anyway."""
    config, cluster = folder.path / CONFIG_NAME, LocalCluster.find(folder)
    if cluster is None or not cluster.is_usable or not config.is_file():
        return
    command = [sys.executable, "-m", "cluster.deploy", "--config", str(config), "--down", "--wait-s", str(drain_s)]
    try:
        _run(command, cluster.environment(), what="taking the deployment down in order", limit_s=drain_s + DEPLOYER_START_S)
    except MoeError as error:
        console.print(f"{error}; ending everything now", markup=False)


def forget_deployment(folder: RunFolder) -> None:
    """Remove what a deployment left in a run folder for the commands to find."""
    for name in (FILE_NAME, CONFIG_NAME):
        (folder.path / name).unlink(missing_ok=True)


def up_remote(config: Path | None, *, run_dir: Path | None, address: str | None, replace: bool, wait_s: float) -> None:
    """Submit the deployment as a job to the Ray cluster at `address`, follow it, and remember in the run folder how it is reached.

    Ending this does not end what it deployed.
    """
    folder, config = run_folder(run_dir), _require(config)
    if folder.read() is not None:
        message = f"{folder.path} belongs to a local cluster; choose another --run-dir for this deployment, or end that one with `moelastic down --local`"
        raise ConfigError(message)
    lines = _submit(config, address, ["--print-connection", "--wait-s", str(wait_s), *(["--replace"] if replace else [])])
    connection = connection_in(lines)
    if connection is not None:
        connection.write(folder.path / FILE_NAME)
        Console(highlight=False, soft_wrap=True).print(next_step(connection, folder), markup=False)


def down_remote(config: Path | None, *, run_dir: Path | None, address: str | None, wait_s: float, force: bool = False) -> None:
    """End a deployment on the Ray cluster at `address`: in order, or by force."""
    config = _require(config)
    _submit(config, address, ["--down", "--wait-s", str(wait_s), *(["--force"] if force else [])])
    path = run_folder(run_dir).path / FILE_NAME
    known = Connection.read(path)
    if known is not None and known.name == load_config(config).name:
        path.unlink()


def connection_in(lines: list[str]) -> Connection | None:
    """What a job printed about how its deployment is reached."""
    return next((Connection.model_validate_json(line.removeprefix(PRINTED)) for line in reversed(lines) if line.startswith(PRINTED)), None)


def next_step(connection: Connection, folder: RunFolder) -> str:
    """What works from here: everything, or what is missing for it. Tokens stay where they are; only their owner reads them."""
    if connection.token_path is None or os.access(connection.token_path, os.R_OK):
        return f"next: moelastic status, moelastic generate PROMPT (how it is reached: {folder.path / FILE_NAME})"
    remedy = "copy it here in a way that keeps it secret, then: moelastic status --token-file FILE"
    return f"the token lies on the head node, in {connection.token_path}; {remedy}"


def _require(config: Path | None) -> Path:
    if config is None:
        message = "CONFIG is missing: give the YAML file of the deployment, or --local for a cluster on this machine"
        raise ConfigError(message)
    return config


def _submit(config: Path, address: str | None, options: list[str]) -> list[str]:
    """Run a deployer as a job; returns the lines that it printed."""
    spec = load_config(config)
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        message = "no Ray cluster is named: give --address http://HOST:8265 (Ray's job server), set RAY_API_SERVER_ADDRESS, or use --local"
        raise ConfigError(message)
    with tempfile.TemporaryDirectory(prefix="moelastic-job-") as staged:
        stage(Path(staged), spec)
        command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", address, "--working-dir", staged, "--"]
        return _followed([*command, "python", "-m", "cluster.deploy", "--config", CONFIG_NAME, *options], what="the job")


def stage(folder: Path, spec: ClusterSpec) -> None:
    """Put what a job needs into a folder: our packages and the config with absolute paths; nothing else of the working directory travels."""
    for package in PACKAGES:
        shutil.copytree(PROJECT_ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyi"))
    (folder / CONFIG_NAME).write_text(dump_config(spec))


def _followed(command: list[str], *, what: str) -> list[str]:
    """Run a command, passing its output on line by line; returns the lines."""
    lines = []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603  # our own command line, no shell
    try:
        for line in process.stdout or ():
            lines.append(line.rstrip("\n"))
            if not line.startswith(PRINTED):
                sys.stdout.write(line)
                sys.stdout.flush()
        code = process.wait()
    except KeyboardInterrupt:
        _end(process)
        raise
    finally:
        if process.stdout is not None:
            process.stdout.close()
    _check(code, what)
    return lines


def _run(command: list[str], environment: Mapping[str, str], *, what: str, limit_s: float | None = None) -> None:
    """Run a command in the foreground. Ctrl-C reaches it through the terminal; it then has a moment to end in order."""
    process = subprocess.Popen(command, env=dict(environment))  # noqa: S603  # our own command line, no shell
    try:
        code = process.wait(limit_s)
    except KeyboardInterrupt:
        _end(process)
        raise
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(GRACE_S)
        message = f"{what} took longer than {limit_s:.0f} s"
        raise FleetError(message) from None
    _check(code, what)


def _check(code: int, what: str) -> None:
    if code != 0:
        message = f"{what} failed (exit code {code}); the reason is above"
        raise FleetError(message)


def _end(process: subprocess.Popen[Any]) -> None:
    """Wait for a process that has been interrupted; kill it when it takes too long."""
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(GRACE_S)
