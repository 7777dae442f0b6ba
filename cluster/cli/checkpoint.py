"""`moelastic checkpoint manifest`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cluster.core.descriptors import DType
from cluster.core.errors import ConfigError

DTYPES = ("checkpoint", *(dtype.value for dtype in DType))


def write_manifest_of(path: Path, *, name: str, dtype: str) -> Path:
    """Write `moelastic.manifest.json` beside a checkpoint. Raises ConfigError for an unknown dtype, CheckpointError for what must not be served."""
    if dtype not in DTYPES:
        message = f"--dtype: {dtype} is not one of {', '.join(DTYPES)}"
        raise ConfigError(message)
    from actors.expert_store import write_manifest

    wanted: DType | Literal["checkpoint"] = "checkpoint" if dtype == "checkpoint" else DType(dtype)
    return write_manifest(path, name=name, dtype=wanted)
