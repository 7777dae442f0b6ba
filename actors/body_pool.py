"""Reusable receive buffers of one link: the next body of a size lands in memory that is already there."""

from __future__ import annotations

import numpy as np

_ROUND_BYTES = 64 << 10


class BodyPool:
    """Keeps at most `num_kept` buffers of at most `max_kept_bytes` each; larger bodies get memory of their own."""

    def __init__(self, *, num_kept: int, max_kept_bytes: int = 32 << 20) -> None:
        self._num_kept = num_kept
        self._max_kept_bytes = max_kept_bytes
        self._free: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []

    @property
    def kept_bytes(self) -> int:
        """Bytes held for later bodies."""
        return sum(buffer.nbytes for buffer in self._free)

    def take(self, num_bytes: int) -> memoryview:
        """A writable buffer of exactly `num_bytes`; its content is undefined."""
        rounded = -(-num_bytes // _ROUND_BYTES) * _ROUND_BYTES
        for index, buffer in enumerate(self._free):
            if buffer.nbytes == rounded:  # none fits better, and small bodies all have this size
                return self._free.pop(index).data[:num_bytes]
        fitting = [index for index, buffer in enumerate(self._free) if buffer.nbytes >= num_bytes]
        if fitting:
            best = min(fitting, key=lambda index: self._free[index].nbytes)
            return self._free.pop(best).data[:num_bytes]
        if self._free and num_bytes <= self._max_kept_bytes and len(self._free) >= self._num_kept:
            self._free.pop(min(range(len(self._free)), key=lambda index: self._free[index].nbytes))
        return np.empty(rounded, np.uint8).data[:num_bytes]

    def release(self, body: memoryview) -> None:
        """Give back what `take` gave, once nobody reads it any more."""
        buffer = body.obj
        if isinstance(buffer, np.ndarray) and buffer.nbytes <= self._max_kept_bytes and len(self._free) < self._num_kept:
            self._free.append(buffer)
