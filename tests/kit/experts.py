"""Experts without a checkpoint for tests of an expert actor: blobs made of random numbers, frames that ask for them, replies caught in a queue."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from actors.core.slots import SizedCopy
from cluster.core.descriptors import DType, ExpertDescriptor
from cluster.core.errors import NotFound
from cluster.core.ids import CopyId, ExpertId
from cluster.core.link_frames import Forward, Result, Run, Segment

NUMPY_DTYPES = {DType.BF16: ml_dtypes.bfloat16, DType.FP16: np.float16, DType.FP32: np.float32}
DIM = 32
TIMEOUT_S = 20.0


def expert_copy(index: int, layer: int = 0) -> CopyId:
    """The copy of expert `index`; its version is made up."""
    return CopyId(ExpertId("tiny", layer, index), f"{layer:02x}{index:02x}" * 16)


def random_rows(seed: int, num_rows: int, dim: int = DIM, dtype: DType = DType.FP32) -> np.ndarray[Any, Any]:
    """Rows of standard normal numbers, [num_rows, dim]."""
    return np.random.default_rng(seed).standard_normal((num_rows, dim)).astype(NUMPY_DTYPES[dtype])


@dataclass
class RandomBlobs:
    """A source of expert blobs: any version it is asked for exists, unless it is in `missing`; every open waits for `gate`."""

    descriptor: ExpertDescriptor = field(default_factory=lambda: ExpertDescriptor(hidden_size=DIM, intermediate_size=16, dtype=DType.FP32))
    missing: set[str] = field(default_factory=set)
    opened: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    kind: str = "expert"

    def __post_init__(self) -> None:
        self.gate.set()

    def open(self, digest: str) -> Any:
        """A blob as `ExpertStore.open` gives it."""
        self.opened.append(digest)
        assert self.gate.wait(TIMEOUT_S)
        if digest in self.missing:
            message = f"blob {digest[:12]} is not in the store"
            raise NotFound(message)
        rng = np.random.default_rng(int(digest[:8], 16))
        shapes = self.descriptor.tensor_shapes()
        tensors = {name: (0.2 * rng.standard_normal(shape)).astype(NUMPY_DTYPES[self.descriptor.dtype]) for name, shape in shapes.items()}
        return SimpleNamespace(digest=digest, kind=self.kind, descriptor=self.descriptor, tensors=tensors, num_bytes=self.descriptor.num_bytes)

    def sized(self, *copies: CopyId) -> list[SizedCopy]:
        """The copies with what they weigh."""
        return [SizedCopy(copy, self.descriptor.num_bytes) for copy in copies]


@dataclass
class Ask:
    """A segment to ask for: rows in runs, each with its time left."""

    copy: CopyId
    rows: np.ndarray[Any, Any]
    runs: Sequence[tuple[int, int]] = ()
    dtype: DType = DType.FP32


def frame_of(*asks: Ask, generation: int = 1, frame_id: int = 1, traceparents: tuple[str, ...] = ()) -> tuple[Forward, memoryview]:
    """A frame and its body. Without `runs` a segment is one run with a minute left."""
    segments = []
    for number, ask in enumerate(asks):
        runs = tuple(Run(rows, timeout_ms, exact=False, epoch=1) for rows, timeout_ms in ask.runs or [(len(ask.rows), 60_000)])
        expert = ask.copy.expert
        place = (expert.model, expert.layer, expert.index, bytes.fromhex(ask.copy.version), ask.copy.role)
        segments.append(Segment(number, 1, *place, ask.dtype, ask.rows.shape[1], runs))
    body = bytearray(b"".join(np.ascontiguousarray(ask.rows).tobytes() for ask in asks))
    return Forward(frame_id, generation, traceparents, tuple(segments)), memoryview(body)


class Replies:
    """Catches replies; `next()` waits for one and gives (result, body)."""

    def __init__(self) -> None:
        self._caught: queue.Queue[tuple[Result, bytes]] = queue.Queue()

    def __call__(self, result: Result, buffers: Sequence[bytes | memoryview]) -> None:
        """The reply function that `submit` takes."""
        self._caught.put((result, b"".join(bytes(part) for part in buffers)))

    def next(self) -> tuple[Result, bytes]:
        """The next reply, within the test kit's limit."""
        return self._caught.get(timeout=TIMEOUT_S)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was caught that was not taken."""
        return self._caught.empty()


def rows_of(result: Result, body: bytes) -> list[np.ndarray[Any, Any]]:
    """The body of a result as one array per segment."""
    arrays, offset = [], 0
    for item in result.segments:
        part = np.frombuffer(body, NUMPY_DTYPES[item.dtype], item.num_rows * item.dim if item.num_bytes else 0, offset)
        arrays.append(part.reshape(-1, item.dim))
        offset += item.num_bytes
    assert offset == len(body)
    return arrays
