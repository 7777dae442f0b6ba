"""`moelastic checkpoint manifest` and `calibrate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def calibrate_folder(
    path: Path, texts: Sequence[Path], *, memory_fraction: float, rows: int, text_bytes: int, scored_bytes: int, say: Callable[[str], None]
) -> None:
    """Write the ladder file beside a checkpoint. Raises ConfigError for text that cannot be used, CheckpointError for what must not be served."""
    from router_service.calibration.run import Options, calibrate, prepare_threads

    prepare_threads()
    options = Options(memory_fraction=memory_fraction, max_rows=rows, scored_bytes=scored_bytes)
    calibrate(path, [_start_of(text, text_bytes) for text in texts], options, say)


def _start_of(path: Path, num_bytes: int) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(num_bytes)
    except OSError as error:
        message = f"--text: cannot read {path.name}: {error.strerror}"
        raise ConfigError(message) from error
    # The last character may have been cut; any other that is not UTF-8 is left out likewise.
    return raw.decode(errors="ignore")
