"""`python -I -S sentinel_process.py CONTROL_FD PAGE_FD`: ends an expert actor's links the moment the actor is killed. Needs nothing but Python's library.

It waits for a robust mutex that a thread of the actor holds for life. The kernel hands that over when the thread ends, before it frees the process's
memory, and long before it closes the sockets. Each link's socket comes over the control socket, as a descriptor of this process's own: shutting it
down tells the router. A link that ends otherwise is let go.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import select
import socket
import sys
import threading


class _Links:
    """Descriptors of the links that are open. `collect` runs in a thread of its own, until the control socket ends."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._poll = select.epoll()
        self._open: dict[int, socket.socket] = {}
        self._is_over = False

    def collect(self) -> None:
        """Take links as they come, let go of those that are closed on both sides."""
        control_fd = self._control.fileno()
        self._poll.register(control_fd, select.EPOLLIN)
        while True:
            for fd, _ in self._poll.poll():
                if fd != control_fd:
                    self._poll.unregister(fd)
                    self._open.pop(fd).close()
                elif not self._take():
                    return

    def cut(self) -> None:
        """End every link, and those that are still to be collected as they come."""
        self._is_over = True
        for link in list(self._open.values()):
            _end(link)

    def _take(self) -> bool:
        """The next link; False when the actor has closed its end, or is gone."""
        message, fds, _, _ = socket.recv_fds(self._control, 1, 1)
        for fd in fds:
            self._open[fd] = socket.socket(fileno=fd)
            self._poll.register(fd, 0)  # asks for nothing: a hang-up on both sides, and an error, are always told
            if self._is_over:
                _end(self._open[fd])
        return bool(message)


def _end(link: socket.socket) -> None:
    with contextlib.suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)


def main() -> None:
    """Collect links until the actor's thread is gone; then end them, and this process. A mutex that is let go means that the actor needs no sentinel."""
    links = _Links(socket.socket(fileno=int(sys.argv[1])))
    collecting = threading.Thread(target=links.collect, daemon=True)
    collecting.start()
    page = mmap.mmap(int(sys.argv[2]), mmap.PAGESIZE)
    if ctypes.CDLL(None).pthread_mutex_lock(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(page)))) == errno.EOWNERDEAD:
        links.cut()
        collecting.join()
    os._exit(0)


if __name__ == "__main__":
    main()
