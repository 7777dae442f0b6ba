"""Rows between a frame's body and the device. The CPU computes on the body itself where it can; CUDA goes through pinned memory on a stream of its own.

Shape legend: N rows of a group, D model width.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from actors.core.frames import Group
from actors.device import ErrorKind, error_kind
from actors.expert_layouts import TORCH_DTYPES

_ALIGNMENT_BYTES = 4


class Staging(Protocol):
    """How one compute thread moves rows. All calls come from that thread."""

    device: torch.device

    def scope(self) -> AbstractContextManager[object]:
        """What forwards run inside."""
        ...

    def load(self, group: Group, body: memoryview) -> torch.Tensor:
        """The group's rows on the device, [N, D]; they may be views of `body`, so nothing may write to them."""
        ...

    def unload(self, y_ND: torch.Tensor) -> memoryview:
        """The rows as bytes on the host, complete when this returns."""
        ...

    def settle(self) -> None:
        """Wait for the device; raises what an earlier kernel left behind."""
        ...

    def free(self) -> None:
        """Give back what is cached."""
        ...


def open_staging(device: torch.device) -> Staging:
    """The staging that fits the device."""
    return CudaStaging(device) if device.type == "cuda" else CpuStaging()


def judged(error: Exception, staging: Staging) -> tuple[ErrorKind, Exception]:
    """What an error of the work on a device means, and the error that says so: a kernel that failed before may show only when the device is asked.

    To be called where the error is handled: afterwards nothing is under way there any more that reads or writes what the error's traceback holds.
    """
    kind = error_kind(error)
    if kind is ErrorKind.STICKY:
        return kind, error
    try:
        staging.settle()
    except Exception as later:  # noqa: BLE001  (whatever it is, it is what the device has to say)
        return error_kind(later), later
    return kind, error


@contextlib.contextmanager
def forwarding(staging: Staging) -> Iterator[None]:
    """What a thread that computes frames is inside of from its start to its end, so that no frame has to enter it."""
    with staging.scope(), torch.inference_mode():
        yield


class CpuStaging:
    """No copy for rows that lie together, one for rows that do not."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def scope(self) -> AbstractContextManager[object]:
        """Nothing to enter."""
        return contextlib.nullcontext()

    def load(self, group: Group, body: memoryview) -> torch.Tensor:
        """A view of the body where rows lie together and are aligned for their dtype, else a copy."""
        ranges = group.ranges
        if len(ranges) == 1 and not body.readonly:
            rows = _typed(body, ranges[0][0], group)
            if rows.data_ptr() % _ALIGNMENT_BYTES == 0:
                return rows
        return _typed(_gather(group, body), 0, group)

    def unload(self, y_ND: torch.Tensor) -> memoryview:
        """The tensor's own memory."""
        return _bytes_of(y_ND)

    def settle(self) -> None:
        """CPU errors are raised where they happen."""

    def free(self) -> None:
        """Cycles may hold tensors of the failed forward."""
        gc.collect()


class CudaStaging:
    """Pinned blocks come from torch's caching host allocator: reused without a new registration, and only once their copies are done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def scope(self) -> AbstractContextManager[object]:
        """This thread's own stream."""
        return torch.cuda.stream(self._stream)

    def load(self, group: Group, body: memoryview) -> torch.Tensor:
        """Rows packed into pinned memory, then copied without blocking."""
        pinned = torch.empty(group.num_rows, group.dim, dtype=TORCH_DTYPES[group.dtype], pin_memory=True)
        target = _bytes_of(pinned)
        offset = 0
        for start, stop in group.ranges:
            target[offset : offset + stop - start] = body[start:stop]
            offset += stop - start
        return pinned.to(self.device, non_blocking=True)

    def unload(self, y_ND: torch.Tensor) -> memoryview:
        """Copied into pinned memory; waits for this copy alone, by its event."""
        pinned = torch.empty(y_ND.shape, dtype=y_ND.dtype, pin_memory=True)
        pinned.copy_(y_ND, non_blocking=True)
        done: torch.cuda.Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(self._stream)
        done.synchronize()
        return _bytes_of(pinned)

    def settle(self) -> None:
        """A failed kernel shows at the next synchronisation."""
        self._stream.synchronize()

    def free(self) -> None:
        """Cached device blocks go back to the driver."""
        gc.collect()
        torch.cuda.empty_cache()


def _gather(group: Group, body: memoryview) -> memoryview:
    packed = bytearray(group.num_rows * group.row_bytes)
    offset = 0
    for start, stop in group.ranges:
        packed[offset : offset + stop - start] = body[start:stop]
        offset += stop - start
    return memoryview(packed)


def _typed(body: memoryview, start: int, group: Group) -> torch.Tensor:
    num_rows = group.num_rows
    return torch.frombuffer(body, dtype=TORCH_DTYPES[group.dtype], count=num_rows * group.dim, offset=start).view(num_rows, group.dim)


def _bytes_of(y_ND: torch.Tensor) -> memoryview:
    return y_ND.contiguous().view(torch.uint8).numpy().reshape(-1).data
