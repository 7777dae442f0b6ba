"""What other threads hand to the event loop's thread.

As `call_soon_threadsafe`, with less work on both sides: one write to a pipe and one read, where asyncio writes to a socket for every call, reads it until
there is nothing left, and makes a handle with a context for each call.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable

Call = Callable[[], None]


class LoopInbox:
    """`put` calls from any thread; they run on the loop in that order. Make and close it on the loop's thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: deque[Call] = deque()
        self._lock = threading.Lock()
        self._is_rung = False
        self._is_closed = False
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        self._loop.add_reader(self._read_fd, self._run)

    def put(self, call: Call) -> None:
        """Run this on the loop soon; nothing happens once the inbox is closed."""
        with self._lock:
            if self._is_closed:
                return
            self._calls.append(call)
            if not self._is_rung:
                self._is_rung = True
                os.write(self._write_fd, b"\0")

    def close(self) -> None:
        """Drop what has not run. Safe to call again."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._loop.remove_reader(self._read_fd)
        self._calls.clear()
        os.close(self._read_fd)
        os.close(self._write_fd)

    def _run(self) -> None:
        os.read(self._read_fd, 1)
        self._is_rung = False  # first: what is put from here on rings again, whether or not this turn still finds it
        while self._calls and not self._is_closed:
            try:
                self._calls.popleft()()
            except Exception as error:  # noqa: BLE001  (one call must not take the others with it)
                self._loop.call_exception_handler({"message": "a call handed to the event loop failed", "exception": error})
