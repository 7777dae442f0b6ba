"""What the kernel's scheduler is told where threads share cores: those that answer go before those that compute.

A router decides and an actor's link answers within a fraction of a millisecond, but on a busy node each waits for a computing thread's slice to end
first, several times for every request. Linux lets any thread ask for short slices (6.12 and later: `sched_attr.sched_runtime`, without privilege):
it then runs sooner when it wakes and gets no more of the processor than before. Elsewhere nothing happens.

And those that start come last: an actor that is being replaced must not take from those that answer what its imports cost. A process that starts at a
low priority comes forward when it is about to serve, where the system lets it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

# Of a process that starts beside those that answer: its imports alone take seconds of a core.
START_NICENESS: Final = 10
# Of one that decides what is mended, while others answer.
CONTROL_NICENESS: Final = 5
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


def come_forward(niceness: int, pid: int | None = None) -> bool:
    """Bring every thread of a process, this one if none is named, that has less priority than this up to it; whether all of them are there now.

    The system lets root do so, whoever has CAP_SYS_NICE, and as far as RLIMIT_NICE allows; to others nothing happens. Threads that shall give way
    are started afterwards.
    """
    tasks = Path("/proc", "self" if pid is None else str(pid), "task")
    try:
        threads = [int(entry.name) for entry in tasks.iterdir()]
    except OSError:
        return False
    return not [thread for thread in threads if not _brought_up(thread, niceness)]


def go_before_others(niceness: int) -> bool:
    """Bring the calling thread alone, and those that it will start, up to this; as `come_forward`."""
    return _brought_up(threading.get_native_id(), niceness)


def may_come_forward(niceness: int = 0) -> bool:
    """Whether a thread that gives way could come back to this; tried in one that ends at once."""

    def try_it() -> bool:
        own = threading.get_native_id()
        give_way(START_NICENESS)
        return _brought_up(own, niceness)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(try_it).result()


def _brought_up(thread: int, niceness: int) -> bool:
    try:
        if os.getpriority(os.PRIO_PROCESS, thread) > niceness:
            os.setpriority(os.PRIO_PROCESS, thread, niceness)
    except ProcessLookupError:  # it ended meanwhile
        return True
    except OSError:
        return False
    return True


def _release() -> tuple[int, ...]:
    numbers = os.uname().release.split("-")[0].split(".")[:2]
    return tuple(int(number) for number in numbers if number.isdigit())
