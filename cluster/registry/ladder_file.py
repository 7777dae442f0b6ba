"""The ladder file beside a checkpoint: one safetensors file with a record (`LadderRecord`) in its metadata.

    generalist.LAYER.NAME      the tensors of a layer's narrow expert, in compute layout
    dense.LAYER.weight         the matrix [D, D] of a layer
    shadow.LAYER.INDEX.NAME    the arrays of a packed shadow

Reading checks header, digest and, before a tensor is read, its type and shape.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from cluster.core.errors import CheckpointError
from cluster.core.ladder_record import LadderRecord
from cluster.registry.tensor_files import TensorFiles, file_sha256

LADDER_FILE = "moelastic.ladder.safetensors"
METADATA_KEY = "moelastic.ladder"

Array = NDArray[Any]
_NAMES: Mapping[np.dtype[Any], str] = {
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float16): "F16",
    np.dtype(np.float32): "F32",
    np.dtype(np.uint8): "U8",
}


class Ladder:
    """An opened ladder file. Use it as a context manager; it holds its file open."""

    def __init__(self, folder: Path) -> None:
        """Open and verify. Raises CheckpointError, naming the file, when it is damaged or not a ladder."""
        self._files = TensorFiles(folder, LADDER_FILE)
        try:
            self.record = _record(self._files.metadata.get(METADATA_KEY))
            if file_sha256(folder / LADDER_FILE, self._files.data_start(LADDER_FILE)) != self.record.sha256:
                message = f"{LADDER_FILE} is damaged: its tensors are not those that were written; run `moelastic checkpoint calibrate` again"
                raise CheckpointError(message)  # noqa: TRY301  # the handler below closes the file for every error
        except BaseException:
            self._files.close()
            raise

    @classmethod
    def find(cls, folder: Path) -> Ladder | None:
        """The ladder beside a checkpoint, or None. Raises CheckpointError when there is one that cannot be used."""
        return cls(folder) if (folder / LADDER_FILE).exists() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.close()

    def read(self, prefix: str, wanted: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> dict[str, Array]:
        """Tensors by name, of exactly the types and shapes wanted. Raises CheckpointError, before anything is read, for any other."""
        for name, (dtype, shape) in wanted.items():
            entry = self._files.entry(f"{prefix}.{name}")
            if (entry.dtype, entry.shape) != (_NAMES[dtype], shape):
                message = f"{LADDER_FILE}: {prefix}.{name} is {entry.dtype} {list(entry.shape)} where {_NAMES[dtype]} {list(shape)} belongs; calibrate again"
                raise CheckpointError(message)
        return {name: self._files.read(f"{prefix}.{name}") for name in wanted}


def write_ladder(folder: Path, record: LadderRecord, tensors: Mapping[str, Array]) -> Path:
    """Write the ladder file, in place of an older one; equal arguments give equal bytes. Returns its path."""
    arrays = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    digest, end, header = hashlib.sha256(), 0, {}
    for name, array in arrays.items():
        digest.update(array.reshape(-1).view(np.uint8).data)
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    sealed = record.model_copy(update={"sha256": digest.hexdigest()})
    text = json.dumps(
        {"__metadata__": {METADATA_KEY: sealed.model_dump_json(exclude_defaults=True)}, **header}, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode()
    text += b" " * (-len(text) % 8)
    path = folder / LADDER_FILE
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return path


def _record(text: str | None) -> LadderRecord:
    if text is None:
        message = f"{LADDER_FILE} has no record of a ladder in its metadata; run `moelastic checkpoint calibrate` again"
        raise CheckpointError(message)
    try:
        return LadderRecord.model_validate_json(text)
    except ValidationError as error:
        message = f"{LADDER_FILE}: {error.error_count()} fields of its record are wrong; run `moelastic checkpoint calibrate` again"
        raise CheckpointError(message) from error
