"""The files of the expert store: blobs named by digest, read-only, written whole or not at all, verified once, mapped.

    ROOT/blobs/ab/<sha256>      one expert, gate or shadow (`expert_blob`)
    ROOT/blobs/ab/<sha256>.ok   fingerprint of the file that was verified; another file, or a changed one, is verified again
    ROOT/tmp/                   files being written, each locked by its writer

Any number of processes may write and open at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from actors.expert_blob import Array, Descriptor, Kind, decode, views
from cluster.core.descriptors import CodecRecord, ExpertDescriptor
from cluster.core.errors import CheckpointError, ConfigError, NotFound

Parts = Sequence[bytes | memoryview]

_DIGEST = re.compile(r"[0-9a-f]{64}")
_MARKER_SUFFIX = ".ok"
_READ_ONLY = 0o444
_CREATE_ATTEMPTS = 16


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """One opened blob. `tensors` are read-only views of the mapping, 64-byte aligned; they keep it alive.

    The mapping is private and copy-on-write, and nobody writes: its pages are the page cache's, shared by every process on the node.
    """

    digest: str
    kind: Kind
    descriptor: Descriptor
    tensors: dict[str, Array]
    num_bytes: int
    codec: CodecRecord | None = None
    primary: str = ""


class BlobFiles:
    """Blobs under one folder. Methods block on the disk."""

    def __init__(self, root: Path, *, max_bytes: int | None = None) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._known_bytes: int | None = None
        for folder in ("blobs", "tmp"):
            (root / folder).mkdir(parents=True, exist_ok=True)

    def has(self, digest: str) -> bool:
        """Whether a blob of this name is there."""
        return _DIGEST.fullmatch(digest) is not None and self._path(digest).exists()

    def num_bytes(self, digest: str) -> int:
        """Size of a blob in bytes, its bytes unread. Raises NotFound, or CheckpointError when it cannot be read."""
        with self._opened(digest) as file:
            return os.fstat(file).st_size

    def expert_bytes(self, digest: str) -> int:
        """Bytes of the expert that a blob holds, or stands for as its shadow; its header is read and trusted. Raises NotFound or CheckpointError."""
        with self._opened(digest) as file:
            size = os.fstat(file).st_size
            blob = memoryview(mmap.mmap(file, size, access=mmap.ACCESS_READ) if size else b"")
        descriptor = decode(blob, digest[:12]).descriptor
        return descriptor.num_bytes if isinstance(descriptor, ExpertDescriptor) else 0

    def is_whole(self, digest: str) -> bool:
        """Whether a blob is there and its bytes are those of its name."""
        try:
            with self._opened(digest) as file:
                self._verify(digest, file)
        except (NotFound, CheckpointError):
            return False
        return True

    def distrust(self, digest: str) -> None:
        """Forget that a blob was verified: its next reader digests it again."""
        if _DIGEST.fullmatch(digest) is not None:
            self._path(digest + _MARKER_SUFFIX).unlink(missing_ok=True)

    def open(self, digest: str) -> StoredBlob:
        """Verify a blob, unless this very file was verified before, and map it. Raises NotFound, or CheckpointError when a byte is wrong."""
        with self._opened(digest) as file:
            self._verify(digest, file)
            size = os.fstat(file).st_size
            # Private and writable in name only: torch warns of memory it might not write to, and unwritten pages stay shared.
            mapping = mmap.mmap(file, size, access=mmap.ACCESS_COPY)
        mapping.madvise(mmap.MADV_WILLNEED)
        blob = memoryview(mapping)
        header = decode(blob, digest[:12])
        return StoredBlob(digest, header.kind, header.descriptor, views(blob, header), size, header.codec, header.primary)

    def put(self, digest: str, parts: Parts) -> None:
        """Keep a blob whose digest is that of `parts`, unless it is there and whole. Raises ConfigError when there is no room for it."""
        if self.is_whole(digest):
            return
        path = self._path(digest)
        replaced_bytes = path.stat().st_size if path.exists() else 0
        self._reserve(sum(len(part) for part in parts) - replaced_bytes)
        with self.writing(path, mode=_READ_ONLY) as file:
            for part in parts:
                write_all(file, part)
        # Read back what now lies under the name (perhaps another process's equal file): the marker is of that file, so no later open verifies again.
        with self._opened(digest) as file:
            self._verify(digest, file)

    @property
    def used_bytes(self) -> int:
        """Bytes of all blobs, counted now."""
        return sum(path.stat().st_size for path in self._root.glob("blobs/*/*") if path.suffix != _MARKER_SUFFIX)

    def check_room(self, num_bytes: int, what: str) -> None:
        """Refuse what could not fit even into an empty store. Raises ConfigError with both numbers."""
        if self._max_bytes is not None and num_bytes > self._max_bytes:
            message = f"store.max_bytes: {what} needs {num_bytes} bytes, the store may hold {self._max_bytes}; raise the limit"
            raise ConfigError(message)

    def sweep(self) -> None:
        """Remove what writers that died left behind, and count the bytes in use anew."""
        self._known_bytes = None
        for path in (self._root / "tmp").iterdir():
            # Locked: somebody writes it. Gone: somebody finished it.
            with suppress(OSError):
                file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                finally:
                    os.close(file)

    @contextmanager
    def writing(self, path: Path, *, mode: int = _READ_ONLY) -> Iterator[int]:
        """A new file that appears at `path` whole, synced to disk, when the block ends well. Raises ConfigError when the disk refuses."""
        try:
            path.parent.mkdir(exist_ok=True)
            file, temporary = self._new_file()
            try:
                yield file
                os.fsync(file)
                os.fchmod(file, mode)
                temporary.rename(path)
            finally:
                temporary.unlink(missing_ok=True)
                os.close(file)
            _sync_folder(path.parent)
        except OSError as error:
            message = f"store.dir: cannot write {path.name[:12]}: {error.strerror}; make room or choose another folder"
            raise ConfigError(message) from error

    def _new_file(self) -> tuple[int, Path]:
        for _ in range(_CREATE_ATTEMPTS):
            file, name = tempfile.mkstemp(dir=self._root / "tmp")
            fcntl.flock(file, fcntl.LOCK_EX)
            # A sweep may have come between the two calls; then the name is gone and the file is nobody's.
            if Path(name).exists():
                return file, Path(name)
            os.close(file)
        message = f"store.dir: no file in {self._root / 'tmp'} lasts; end the process that removes them"
        raise ConfigError(message)

    def _reserve(self, num_bytes: int) -> None:
        if self._max_bytes is None:
            return
        if self._known_bytes is None:
            self._known_bytes = self.used_bytes
        if self._known_bytes + num_bytes > self._max_bytes:
            message = f"store.max_bytes: {num_bytes} bytes more do not fit, {self._known_bytes} of {self._max_bytes} are in use; raise the limit"
            raise ConfigError(message)
        self._known_bytes += num_bytes

    @contextmanager
    def _opened(self, digest: str) -> Iterator[int]:
        if not self.has(digest):
            message = f"the store of this node has no blob {digest[:12]}; import the model"
            raise NotFound(message, resource="blob", name=digest[:64])
        try:
            file = os.open(self._path(digest), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            message = f"blob {digest[:12]} of the store cannot be read: {error.strerror}"
            raise CheckpointError(message) from error
        try:
            yield file
        finally:
            os.close(file)

    def _verify(self, digest: str, file: int) -> None:
        marker = self._path(digest + _MARKER_SUFFIX)
        fingerprint = _fingerprint(file)
        with suppress(OSError):
            if marker.read_bytes() == fingerprint:
                return
        with os.fdopen(os.dup(file), "rb") as reader:
            found = hashlib.file_digest(reader, "sha256").hexdigest()
        if found != digest:
            message = f"blob {digest[:12]} of the store is damaged: its SHA-256 is {found[:12]}; import the model again"
            raise CheckpointError(message)
        # Without it the next open verifies again, nothing worse.
        with suppress(OSError):
            marker.write_bytes(fingerprint)

    def _path(self, name: str) -> Path:
        return self._root / "blobs" / name[:2] / name


def write_all(file: int, part: bytes | memoryview) -> None:
    """Write every byte of `part`; a short write goes on where it ended."""
    view = memoryview(part).cast("B")
    while view:
        view = view[os.write(file, view) :]


def _fingerprint(file: int) -> bytes:
    status = os.fstat(file)
    return json.dumps([status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]).encode()


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
