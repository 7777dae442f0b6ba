"""Safetensors files as an index of byte ranges: headers are read and checked when a folder is opened, tensors one slice at a time when asked for.

Reads are `pread`s into fresh memory, never a mapping: a source file that is truncated under a reader gives an error by name instead of ending the process.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cluster.core.errors import CheckpointError

# The longest header known is 9 MB (the index of DeepSeek-V3, 92 thousand tensors); parsed, JSON takes about ten times its length.
MAX_HEADER_BYTES = 32 << 20
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LENGTH_BYTES = 8
_READ_BYTES = 1 << 20

Array = NDArray[Any]

# Bits of an element; files may hold types that no expert is made of.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    "F4": 4,
}
_NUMPY: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
    "F8_E8M0": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: its file, its element type as safetensors names it, its shape, and where its bytes begin in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


class TensorFiles:
    """Every tensor of a checkpoint folder, by key. Files stay open, so that a re-export by rename cannot mix two checkpoints."""

    def __init__(self, folder: Path, file: str | None = None) -> None:
        """Open a folder with one safetensors file or a sharded index, or one `file` of it. Raises CheckpointError, naming what is wrong.

        `metadata` is what all files say beside their tensors: text by key, not checked by anybody.
        """
        self.folder = folder
        self.metadata: dict[str, str] = {}
        self._starts: dict[str, int] = {}
        self._descriptors: dict[str, int] = {}
        self._close = weakref.finalize(self, _close_all, self._descriptors)
        try:
            self.entries = self._open_all() if file is None else self._open_file(file)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files; garbage collection does it otherwise."""
        self._close()

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def entry(self, key: str) -> TensorEntry:
        """The entry of a key; CheckpointError when the checkpoint lacks it."""
        entry = self.entries.get(key)
        if entry is None:
            message = f"the checkpoint has no tensor {key}"
            raise CheckpointError(message)
        return entry

    def data_start(self, file: str) -> int:
        """Where the tensors of a file begin."""
        return self._starts[file]

    def read(self, key: str, index: int | None = None) -> Array:
        """A tensor, or its slice at `index` of the leading axis, in its own element type (E8M0 as uint8).

        Raises CheckpointError for a missing key, an element type that no expert is made of, or bytes that are no longer there.
        """
        entry = self.entry(key)
        dtype = _NUMPY.get(entry.dtype)
        if dtype is None:
            message = f"{key} is stored as {entry.dtype}, which is not served; one of {', '.join(_NUMPY)} is needed"
            raise CheckpointError(message)
        shape, begin = entry.shape, entry.begin
        if index is not None:
            shape = shape[1:]
            begin += index * math.prod(shape) * dtype.itemsize
        raw = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
        self._fill(entry.file, begin, raw.data, key)
        return raw.view(dtype).reshape(shape)

    def _fill(self, file: str, begin: int, target: memoryview, key: str) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._descriptors[file], [target[done:]], begin + done)
            if count == 0:
                message = f"{file} ends inside {key}: the file was truncated while it was read"
                raise CheckpointError(message)
            done += count

    def _open_all(self) -> dict[str, TensorEntry]:
        index = self.folder / INDEX_FILE
        if (self.folder / SINGLE_FILE).exists() or not index.exists():
            return self._open_file(SINGLE_FILE)
        places = _weight_map(index)
        entries: dict[str, TensorEntry] = {}
        for file in sorted(set(places.values())):
            entries.update((key, entry) for key, entry in self._open_file(file).items() if places.get(key) == file)
        missing = sorted(places.keys() - entries.keys())
        if missing:
            message = f"{INDEX_FILE} names {missing[0]} in {places[missing[0]]}, which does not hold it ({len(missing)} such tensors)"
            raise CheckpointError(message)
        return entries

    def _open_file(self, file: str) -> dict[str, TensorEntry]:
        try:
            descriptor = self._descriptors[file] = os.open(self.folder / file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            message = f"cannot open {file} of the checkpoint: {error.strerror}; a folder of whole safetensors files is needed"
            raise CheckpointError(message) from error
        size = os.fstat(descriptor).st_size
        header = self._header(file, descriptor, size)
        start = self._starts[file] = _LENGTH_BYTES + len(header)
        records = parse_object(header, f"the header of {file}")
        metadata = records.pop("__metadata__", None)
        if isinstance(metadata, dict):
            self.metadata |= {key: text for key, text in metadata.items() if isinstance(text, str)}
        return dict(_entries(file, records, start, size - start))

    def _header(self, file: str, descriptor: int, size: int) -> bytes:
        prefix = os.pread(descriptor, _LENGTH_BYTES, 0)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            message = f"{file} is not a whole safetensors file: its header ends outside of its {size} bytes"
            raise CheckpointError(message)
        if length > MAX_HEADER_BYTES:
            message = f"{file} has a header of {length} bytes; at most {MAX_HEADER_BYTES} are read, save the model in more shards"
            raise CheckpointError(message)
        return os.pread(descriptor, length, _LENGTH_BYTES)


def _close_all(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def file_sha256(path: Path, start: int) -> str:
    """SHA-256 in hex of a file's bytes from `start` on. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            digest = hashlib.sha256()
            while part := file.read(_READ_BYTES):
                digest.update(part)
    except OSError as error:
        message = f"cannot read {path.name}: {error.strerror}"
        raise CheckpointError(message) from error
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises CheckpointError, naming the file."""
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            message = f"{path.name} has more than {MAX_HEADER_BYTES} bytes"
            raise CheckpointError(message)
        return parse_object(path.read_bytes(), path.name)
    except OSError as error:
        message = f"cannot read {path.name} of the checkpoint: {error.strerror}"
        raise CheckpointError(message) from error


def parse_object(text: bytes, name: str) -> dict[str, Any]:
    """A JSON object without repeated keys. Raises CheckpointError, saying where it came from."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        message = f"{name} is not valid JSON"
        raise CheckpointError(message) from error
    if not isinstance(value, dict):
        message = f"{name} is not a JSON object"
        raise CheckpointError(message)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        message = "repeated key"
        raise ValueError(message)
    return value


def _weight_map(path: Path) -> dict[str, str]:
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        message = f"{path.name} has no weight_map"
        raise CheckpointError(message)
    for file in places.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            message = f"{path.name} names a shard that is not a safetensors file of this folder"
            raise CheckpointError(message)
    return places


def _entries(file: str, records: Mapping[str, Any], start: int, data_bytes: int) -> Iterable[tuple[str, TensorEntry]]:
    """Entries in the order of their bytes, which must follow on one another to the end of the file: no overlap, no hole, nothing outside."""
    end = 0
    for key, record in sorted(records.items(), key=lambda item: _range(file, *item)):
        begin, stop = _range(file, key, record)
        entry = TensorEntry(file, *_type_and_shape(file, key, record), start + begin, stop - begin)
        if math.prod(entry.shape) * _BITS[entry.dtype] != entry.num_bytes * 8:
            message = f"{file}: {key} has {entry.num_bytes} bytes, which is not what its shape and type need"
            raise CheckpointError(message)
        if begin != end:
            message = f"{file}: {key} begins at byte {begin} of the data instead of {end}; tensors must neither overlap nor leave holes"
            raise CheckpointError(message)
        end = stop
        yield key, entry
    if end != data_bytes:
        message = f"{file} holds {data_bytes} bytes of tensors, but its header describes {end}; the file is truncated or was damaged"
        raise CheckpointError(message)


def _range(file: str, key: str, record: object) -> tuple[int, int]:
    offsets = record.get("data_offsets") if isinstance(record, dict) else None
    match offsets:
        case [int(begin), int(stop)] if 0 <= begin <= stop:
            return begin, stop
    message = f"{file}: {key} has no valid data_offsets"
    raise CheckpointError(message)


def _type_and_shape(file: str, key: str, record: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    dtype, shape = record.get("dtype"), record.get("shape")
    if not isinstance(dtype, str) or dtype not in _BITS:
        message = f"{file}: {key} has no valid dtype"
        raise CheckpointError(message)
    if not isinstance(shape, list) or not all(type(dim) is int and dim >= 0 for dim in shape):
        message = f"{file}: {key} has no valid shape"
        raise CheckpointError(message)
    return dtype, tuple(shape)
