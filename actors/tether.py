"""Holds connections that end the moment this process is killed, also when its sentinel is killed with it: each in a thread with descriptors of its own.

The kernel frees a killed process's memory before it closes what is in the table of descriptors that its threads share. A thread with a table of its own
closes that as it ends itself, which takes no time unless it happens to be the last one: the last one frees the memory first. So it asks to go early.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import ctypes
import gc
import logging
import signal
import socket
import threading
from collections.abc import Callable
from typing import Final

from cluster.core.link_codec import encode
from cluster.core.link_frames import Welcome
from cluster.scheduling import SHORT_SLICE_NS, ask_for_slices

_UNSHARE: Final = 2  # CLOSE_RANGE_UNSHARE
_MAX_FD: Final = 0xFFFFFFFF
Hold = Callable[[socket.socket], Callable[[], object] | None]
_starting = threading.Lock()
logger = logging.getLogger(__name__)


class HeldTether:
    """The tether of one link, from its handshake on: handed to `hold`, then told of to the router; `end` it with its link."""

    def __init__(self, hold: Hold, connection: socket.socket, welcome: Welcome) -> None:
        """Takes the connection over."""
        self._let_go: Callable[[], object] | None = None
        self._is_over = False
        self._beginning = asyncio.get_running_loop().create_task(self._begin(hold, connection, encode(welcome)), name="link-tether")

    @property
    def is_held(self) -> bool:
        """Whether it ends with the process."""
        return self._let_go is not None

    def end(self) -> None:
        """The link has ended."""
        self._is_over = True
        let_go, self._let_go = self._let_go, None
        if let_go is not None:
            let_go()

    async def _begin(self, hold: Hold, connection: socket.socket, welcome: bytes) -> None:
        with connection:
            self._let_go = await asyncio.to_thread(hold, connection)
            if self._let_go is not None:
                with contextlib.suppress(OSError):
                    connection.send(welcome)
        if self._is_over:
            self.end()


def hold(connection: socket.socket) -> Callable[[], object] | None:
    """Have a thread hold a connection that is to be closed everywhere else. Blocks until it does; what is returned lets go of it and is to be called once.

    None, with a line in the log, where that cannot be: it only makes the loss of a node known later.
    """
    try:
        return _start(connection.fileno())
    except (OSError, AttributeError, RuntimeError) as error:
        logger.warning("no tether: routers hear of a lost node only when the kernel has freed its actors' memory (%s)", error)
        return None


def _start(fd: int) -> Callable[[], object]:
    close_range = ctypes.CDLL(None, use_errno=True).close_range
    close_range.argtypes = (ctypes.c_uint, ctypes.c_uint, ctypes.c_int)
    taken, over = _thread.allocate_lock(), _thread.allocate_lock()
    taken.acquire()
    over.acquire()
    is_held = [False]
    with _starting:
        is_collecting = gc.isenabled()
        gc.disable()
        try:
            _thread.start_new_thread(_hold, (fd, close_range, is_held, taken.release, over.acquire))
            taken.acquire()
        finally:
            if is_collecting:
                gc.enable()
    if not is_held[0]:
        over.release()
        message = "the kernel gives a thread no descriptors of its own"
        raise OSError(message)
    return over.release


def _hold(fd: int, close_range: Callable[[int, int, int], int], is_held: list[bool], taken: Callable[[], object], over: Callable[[], object]) -> None:
    """Keep one descriptor in a table of this thread's own until `over` returns.

    A descriptor's number means something else here than elsewhere. So this thread runs nothing that may use one: it collects no garbage, of which some
    might close its files (`_start` sees to that, and the last two calls make no objects), and takes no signals, which are told through a descriptor.
    """
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        ask_for_slices(SHORT_SLICE_NS)
        is_held[0] = close_range(fd + 1, _MAX_FD, _UNSHARE) == 0 and (fd == 0 or close_range(0, fd - 1, _UNSHARE) == 0)
    finally:
        taken()
    over()
