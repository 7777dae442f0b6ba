"""What the kernel's scheduler is told where threads share cores: those that answer go before those that compute.

A router decides and an actor's link answers within a fraction of a millisecond, but on a busy node each waits for a computing thread's slice to end
first, several times for every request. Linux lets any thread ask for short slices (6.12 and later: `sched_attr.sched_runtime`, without privilege):
it then runs sooner when it wakes and gets no more of the processor than before. Elsewhere nothing happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import sys
import threading
from typing import Final

SHORT_SLICE_NS: Final = 100_000
# sched_setattr and sched_getattr, which the C library has no names for on every system that we run on.
_CALLS: Final = {"x86_64": (314, 315), "aarch64": (274, 275)}
# struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period, util_min, util_max.
_ATTR: Final = struct.Struct("IIQiIQQQII")
_SCHED_OTHER: Final = 0


def ask_for_slices(nanoseconds: int) -> bool:
    """Ask for slices of this length for the calling thread and those that it will start; False where the kernel knows of no such thing."""
    numbers = _CALLS.get(platform.machine()) if sys.platform == "linux" else None
    if numbers is None or _release() < (6, 12):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_ATTR.size)
    if libc.syscall(numbers[1], 0, buffer, _ATTR.size, 0) != 0:
        return False
    size, policy, flags, nice, *_ = _ATTR.unpack(buffer.raw)
    if policy != _SCHED_OTHER:
        return False
    return bool(libc.syscall(numbers[0], 0, _ATTR.pack(size, policy, flags, nice, 0, nanoseconds, 0, 0, 0, 0), 0) == 0)


def give_way(niceness: int) -> None:
    """Let others go before the calling thread, on systems whose threads have a priority of their own; never raises it again."""
    with contextlib.suppress(OSError):
        own = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, own, max(niceness, os.getpriority(os.PRIO_PROCESS, own)))


def _release() -> tuple[int, ...]:
    numbers = os.uname().release.split("-")[0].split(".")[:2]
    return tuple(int(number) for number in numbers if number.isdigit())
