"""How large a local cluster is, and the environment of its processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from cluster.local.processes import MARKER_VARIABLE
from cluster.scheduling import START_NICENESS, may_come_forward

PROJECT_ROOT = Path(__file__).resolve().parents[2]
OBJECT_STORE_BYTES = 80 << 20
RUN_DIR_VARIABLE = "MOELASTIC_LOCAL_RUN_DIR"


class LocalSettings(BaseModel):
    """One head without GPUs and `num_nodes` nodes of logical GPUs, each node with a temp dir of its own as if it were a machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("default", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$")
    num_nodes: NonNegativeInt = 4
    gpus_per_node: NonNegativeInt = 1
    cpus_per_node: PositiveInt = 2
    object_store_bytes: PositiveInt = Field(OBJECT_STORE_BYTES, description="of each node; Ray refuses less than 75 MiB")
    nodes_at_a_time: PositiveInt = 2
    start_timeout_s: PositiveFloat = 120.0
    ray_config: dict[str, str] = Field(default_factory=dict, description="RAY_<name> settings of every node")


RAY_CONFIG = {
    "enable_worker_prestart": "0",
    "prestart_worker_first_driver": "0",
    "memory_monitor_refresh_ms": "0",  # it would pick an expert when the developer's browser fills the memory
    "enable_metrics_collection": "0",
    "USAGE_STATS_ENABLED": "0",
    "USE_UVLOOP": "0",  # Ray takes it wherever it is installed; what our processes run on shall not depend on that
    "AUTH_MODE": "token",
    # Otherwise Ray turns 127.0.0.1 into the machine's own address, where nothing of a local cluster listens, and waits there.
    "ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


def server_environment(settings: LocalSettings, *, marker: str, run_dir: Path, token_path: Path, temp_dir: Path) -> dict[str, str]:
    """The environment of the cluster's processes: nothing of the caller's own Ray, our interpreter first, our packages importable."""
    environment = _without_ray(os.environ)
    # What serves comes forward when it is ready, where it may; Ray's default of 15 would starve it beside any load generator where it may not.
    niceness = {"worker_niceness": str(START_NICENESS if may_come_forward() else 0)}
    for name, value in (RAY_CONFIG | niceness | settings.ray_config).items():
        environment[f"RAY_{name}"] = value
    environment["RAY_AUTH_TOKEN_PATH"] = str(token_path)
    environment["RAY_TMPDIR"] = str(temp_dir)
    environment[MARKER_VARIABLE] = marker
    environment[RUN_DIR_VARIABLE] = str(run_dir)
    # `ray job submit` runs its entrypoint through a shell, which must find this interpreter's `python`.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    return environment


def client_environment(*, gcs_address: str, dashboard_url: str, token_path: Path) -> dict[str, str]:
    """The environment of a process that talks to a local cluster, as `ray` and `python -m cluster.deploy` read it."""
    environment = _without_ray(os.environ)
    environment |= {f"RAY_{name}": RAY_CONFIG[name] for name in ("AUTH_MODE", "ENABLE_WINDOWS_OR_OSX_CLUSTER", "USAGE_STATS_ENABLED")}
    environment |= {
        "RAY_ADDRESS": gcs_address,
        "RAY_API_SERVER_ADDRESS": dashboard_url,
        "RAY_AUTH_TOKEN_PATH": str(token_path),
    }
    return environment


def _without_ray(source: os._Environ[str]) -> dict[str, str]:
    environment = {name: value for name, value in source.items() if not name.startswith("RAY_") and name not in {MARKER_VARIABLE, RUN_DIR_VARIABLE}}
    paths = [str(PROJECT_ROOT), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    # A proxy of the environment is not asked for loopback addresses.
    for name in ("NO_PROXY", "no_proxy"):
        environment[name] = ",".join(filter(None, [environment.get(name, ""), "127.0.0.1", "localhost"]))
    return environment
