"""The device an actor computes on: which one, how much memory, whether it works, and what an error of it means."""

from __future__ import annotations

import contextlib
from enum import Enum
from pathlib import Path

import psutil
import torch

from actors.core.memory import MeasuredMemory
from actors.gpu_watch import device_name
from cluster.core.errors import ConfigError

STICKY_EXIT_CODE = 70
_CUDA_OUT_OF_MEMORY = 2
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class ErrorKind(Enum):
    """What an error of a forward means: no memory now; a device that answers nothing any more; or a fault of this computation alone."""

    OUT_OF_MEMORY = "out_of_memory"
    STICKY = "sticky"
    FAULT = "fault"


class SelfTestFailed(Exception):
    """The device computes or copies wrongly; it must serve nothing."""


def choose_device(wanted: str) -> torch.device:
    """The device of `auto`, `cpu` or `cuda`. Raises ConfigError for a CUDA device that is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        message = "actors.device is 'cuda' and this process sees no CUDA device; set actors.device to 'auto', raise actors.num_gpus, or install torch for CUDA"
        raise ConfigError(message)
    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def measure_memory(device: torch.device) -> MeasuredMemory:
    """What the device has free now, this process's own context already taken."""
    if device.type == "cuda":
        torch.zeros(1, device=device)  # the context exists from here on
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        return MeasuredMemory(free_bytes, total_bytes, is_device=True)
    memory = psutil.virtual_memory()
    total_bytes = min(memory.total, _cgroup_limit_bytes(memory.total))
    return MeasuredMemory(min(memory.available, total_bytes), total_bytes, is_device=False)


def _cgroup_limit_bytes(default: int) -> int:
    for path in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):
            return int(Path(path).read_text())
    return default


def error_kind(error: BaseException) -> ErrorKind:
    """Tell running out of memory from a broken device from a fault of one computation (reference: torch's OutOfMemoryError and AcceleratorError)."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return ErrorKind.OUT_OF_MEMORY
    if isinstance(error, torch.AcceleratorError):
        is_memory = getattr(error, "error_code", None) == _CUDA_OUT_OF_MEMORY
        return ErrorKind.OUT_OF_MEMORY if is_memory else ErrorKind.STICKY
    if isinstance(error, RuntimeError) and any(text in str(error) for text in ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")):
        return ErrorKind.OUT_OF_MEMORY
    return ErrorKind.STICKY if isinstance(error, SelfTestFailed) else ErrorKind.FAULT


def self_test(device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """A matrix product and a copy whose every number is exact. Raises SelfTestFailed when one of them is wrong."""
    size = 64
    left = (torch.arange(size * size, dtype=torch.int64).reshape(size, size) * 7 % 13 - 6).to(dtype)
    right = (torch.arange(size * size, dtype=torch.int64).reshape(size, size) * 5 % 11 - 5).to(dtype)
    expected = left.to(torch.int64) @ right.to(torch.int64)
    there = left.to(device)
    for what, is_right in {
        "a copy": torch.equal(there.cpu(), left),
        "a matrix product": torch.equal((there @ right.to(device)).cpu().to(torch.int64), expected),
    }.items():
        if not is_right:
            message = f"self-test of {device}: {what} came back wrong; take the device out of service"
            raise SelfTestFailed(message)


def device_label(device: torch.device) -> str:
    """How reports and spans name the device: a GPU by its UUID, where that can be read, for within the node each process counts its own from 0."""
    if device.type == "cpu":
        return "cpu"
    if torch.cuda.is_available() and (uuid := getattr(torch.cuda.get_device_properties(device), "uuid", None)) is not None:
        return device_name(str(uuid))
    return str(device)
