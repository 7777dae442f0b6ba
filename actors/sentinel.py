"""A small process beside an expert actor that ends its links the moment it is killed, so that routers need not wait for the kernel.

The kernel frees a killed process's memory before it closes its sockets: tens of milliseconds for every 200 MB of its own, more while the cores are busy
(`python -m examples.failover.floor` measures it), and a device's context comes on top. A robust mutex is handed over before any of that. A sentinel that
is missing, or killed itself, costs nothing but that time; one that is stopped while its actor dies leaves it to the router's own watch, and one that is
killed with its actor, as on a lost node, to the tethers of the links (`actors.tether`).
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

_SCRIPT: Final = Path(__file__).with_name("sentinel_process.py")
_SHARED: Final = 1  # PTHREAD_PROCESS_SHARED
_ROBUST: Final = 1  # PTHREAD_MUTEX_ROBUST
_ATTRIBUTE_BYTES: Final = 64  # of a pthread_mutexattr_t, and more
_START_S: Final = 5.0
_END_S: Final = 0.25  # of its thread and of its process: an actor that stops has promised to be quick
logger = logging.getLogger(__name__)


class Sentinel:
    """The actor's end: `start` makes the process, `guard` hands it a link, `stop` ends it and leaves the links alone."""

    def __init__(self) -> None:
        """Raises OSError or AttributeError where the system has no robust mutexes or no anonymous files."""
        self._page_fd = os.memfd_create("sentinel", os.MFD_CLOEXEC)
        os.ftruncate(self._page_fd, mmap.PAGESIZE)
        self._page = mmap.mmap(self._page_fd, mmap.PAGESIZE)
        self._mutex = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(self._page)))
        self._held, self._over = threading.Event(), threading.Event()
        self._problem = ""
        # Held by a thread that does nothing else: the kernel hands the mutex over when its holder ends.
        self._holder = threading.Thread(target=self._hold, name="sentinel-holder", daemon=True)
        self._control, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(0)
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls) -> Self | None:
        """Make one. None, with a line in the log, where that cannot be: its absence only makes a death known later."""
        sentinel: Self | None = None
        try:
            sentinel = cls()
            sentinel._begin()
        except (OSError, AttributeError) as error:
            logger.warning("no sentinel: routers hear of this actor's death only when the kernel closes its sockets (%s)", error)
            if sentinel is not None:
                sentinel.stop()
            return None
        return sentinel

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return None if self._process is None else self._process.pid

    def guard(self, link: socket.socket) -> None:
        """Have a link ended with this process. Whoever closes it must shut it down first, as `FrameStream` does: its other descriptor stays open."""
        try:
            socket.send_fds(self._control, [b"+"], [link.fileno()])
        except OSError as error:
            logger.warning("the sentinel takes no links (%s)", error)

    def stop(self) -> None:
        """End the process. The links are the actor's to close."""
        self._over.set()
        self._control.close()
        self._theirs.close()
        if self._holder.ident is not None:
            self._holder.join(_END_S)
        if self._process is not None:
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._page_fd >= 0:
            os.close(self._page_fd)
            self._page_fd = -1

    def _begin(self) -> None:
        self._holder.start()
        if not self._held.wait(_START_S) or self._problem:
            raise OSError(self._problem or f"the mutex was not taken within {_START_S:g} s")
        self._process = subprocess.Popen(  # noqa: S603  (our own file, by this interpreter)
            [sys.executable, "-I", "-S", str(_SCRIPT), str(self._theirs.fileno()), str(self._page_fd)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(self._theirs.fileno(), self._page_fd),
            start_new_session=True,  # a terminal's interrupt is the actor's to handle
        )
        self._theirs.close()

    def _hold(self) -> None:
        libc = ctypes.CDLL(None)
        attributes = ctypes.create_string_buffer(_ATTRIBUTE_BYTES)
        steps: tuple[Callable[[], int], ...] = (
            lambda: libc.pthread_mutexattr_init(attributes),
            lambda: libc.pthread_mutexattr_setpshared(attributes, _SHARED),
            lambda: libc.pthread_mutexattr_setrobust(attributes, _ROBUST),
            lambda: libc.pthread_mutex_init(self._mutex, attributes),
            lambda: libc.pthread_mutex_lock(self._mutex),
        )
        try:
            codes = [step() for step in steps]
            self._problem = f"robust mutex: error {max(codes)}" if any(codes) else ""
        except AttributeError as error:
            self._problem = str(error)
        self._held.set()
        self._over.wait()
        if not self._problem:
            libc.pthread_mutex_unlock(self._mutex)
