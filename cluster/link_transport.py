"""One expert link as a stream of frames over a non-blocking socket: receives in place, sends by scatter/gather, never joins or copies a body.

asyncio's own transports copy: `writelines` joins on Python 3.11, and `write` copies what the socket does not take at once. So this works on the
socket itself with the loop's readiness callbacks. All methods belong to the loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np

from cluster.core.errors import InvalidRequest, InvariantBroken, MoeError, Overloaded, ReplicaUnavailable
from cluster.core.link_codec import body_bytes_of, encode
from cluster.core.link_frames import Frame
from cluster.core.link_reader import FrameReader

Buffers = Sequence[bytes | memoryview]
_TURN_BYTES = 1 << 20
_MAX_PARTS = 256
_USER_TIMEOUT_MS = 10_000


def new_body(num_bytes: int) -> memoryview:
    """A writable buffer for one body; unlike a bytearray its pages are not touched before data arrives."""
    return np.empty(num_bytes, np.uint8).data


def tune(sock: socket.socket) -> None:
    """Make a connected socket fit for a link: not blocking, no Nagle delay, unanswered data gives up in seconds."""
    sock.settimeout(0)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)


def _check_body(frame: Frame, header: bytes, views: Sequence[memoryview]) -> None:
    """A body of another length than its header says would make everything after it garbage."""
    found, wanted = sum([view.nbytes for view in views]), body_bytes_of(header)
    if found != wanted:
        message = f"a {type(frame).__name__} was given {found} body bytes where its header says {wanted}"
        raise InvariantBroken(message)


class FrameStream:
    """Frames over one connected socket.

    `on_frame(frame, body)` is called for every whole frame; what it raises of the error tree closes the stream. `on_closed(error)` is called once,
    from the loop, with None only after `close()` without an error. A close drops what was not sent yet; `finish()` sends it first.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        on_frame: Callable[[Frame, memoryview], None],
        on_closed: Callable[[MoeError | None], None],
        max_body_bytes: int,
        max_pending_bytes: int,
        allocate: Callable[[int], memoryview] = new_body,
    ) -> None:
        tune(sock)
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._fd = sock.fileno()
        self._on_frame = on_frame
        self._on_closed = on_closed
        self.max_pending_bytes = max_pending_bytes
        self._reader = FrameReader(max_body_bytes=max_body_bytes, allocate=allocate)
        self._parts: deque[memoryview] = deque()
        self._sent_marks: deque[tuple[int, Callable[[], None]]] = deque()
        self._queued_bytes = 0
        self._is_writing = False
        self._is_finishing = False
        self.is_closed = False
        self.bytes_sent = 0
        self.bytes_received = 0
        self.last_heard_s = self._loop.time()
        self.last_taken_s = self.last_heard_s
        self._loop.add_reader(self._fd, self._readable)

    @property
    def pending_bytes(self) -> int:
        """Bytes handed to `send` that the socket has not taken."""
        return self._queued_bytes - self.bytes_sent

    def open_gate(self) -> None:
        """The peer has proven itself: from now on all but handshake frames pass."""
        self._reader.handshake = False

    def silence_s(self) -> float:
        """Seconds without a sign of life: no byte came, and none was taken while some were waiting."""
        last_s = max(self.last_heard_s, self.last_taken_s) if self.pending_bytes else self.last_heard_s
        return self._loop.time() - last_s

    def stalled_s(self) -> float:
        """Seconds since the peer last took anything of what waits to be sent; 0 when nothing waits."""
        return self._loop.time() - self.last_taken_s if self.pending_bytes else 0.0

    def send(self, frame: Frame, buffers: Buffers = (), on_sent: Callable[[], None] | None = None) -> None:
        """Send a frame and its body; the buffers must keep their content until `on_sent`. On a closed stream nothing happens.

        Raises InvalidRequest when the header is too large, InvariantBroken when the buffers do not have the frame's body length.
        A peer that lets more than `max_pending_bytes` wait loses the link.
        """
        if self.is_closed or self._is_finishing:
            return
        header = encode(frame)
        views = [view.cast("B") for view in [memoryview(part) for part in buffers] if view.nbytes]
        _check_body(frame, header, views)
        if not self._parts:
            self.last_taken_s = self._loop.time()
        for view in (memoryview(header), *views):
            self._parts.append(view)
            self._queued_bytes += view.nbytes
        if on_sent is not None:
            self._sent_marks.append((self._queued_bytes, on_sent))
        if not self._is_writing:
            self._write_turn()
        if self._parts and self.pending_bytes > self.max_pending_bytes:
            self.close(Overloaded(f"the peer reads too slowly: more than {self.max_pending_bytes} bytes wait to be sent"))

    def finish(self) -> None:
        """Send what is waiting, then close. The owner bounds the wait with `close`."""
        self._is_finishing = True
        if not self.pending_bytes:
            self.close()

    def close(self, error: MoeError | None = None) -> None:
        """Close now. Safe to call again; only the first reason counts."""
        if self.is_closed:
            return
        self._end()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._loop.call_soon(self._on_closed, error)

    def detach(self) -> socket.socket:
        """Stop, and give the socket to the caller, open; bytes that were read and not handed over are dropped. `on_closed` is told as of a `close()`."""
        self._end()
        self._loop.call_soon(self._on_closed, None)
        return self._sock

    def has_unread(self) -> bool:
        """Whether something has come, if only the end, that this process has not got round to reading."""
        if self.is_closed:
            return False
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(0))

    def _end(self) -> None:
        self.is_closed = True
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._parts.clear()
        self._sent_marks.clear()

    def _readable(self) -> None:
        """One receive per turn, so that a large body does not starve the loop."""
        try:
            count = self._sock.recv_into(self._reader.buffer()[:_TURN_BYTES])
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(ReplicaUnavailable(f"the link was lost ({error.strerror or type(error).__name__})"))
            return
        if not count:
            self.close(ReplicaUnavailable("the link was closed by the other side"))
            return
        self.bytes_received += count
        self.last_heard_s = self._loop.time()
        self._reader.received(count)
        self._hand_over()

    def _hand_over(self) -> None:
        try:
            while not (self.is_closed or self._is_finishing) and (item := self._reader.next()) is not None:
                self._on_frame(*item)
        except MoeError as error:
            self.close(error)
        except Exception as error:
            self.close(InvalidRequest(f"a frame could not be handled ({type(error).__name__})", field="link"))
            raise

    def _write_turn(self) -> None:
        """Send at most about one turn's bytes; the rest follows when the socket is ready again."""
        try:
            taken = self._send_some()
        except OSError as error:
            self.close(ReplicaUnavailable(f"the link was lost ({error.strerror or type(error).__name__})"))
            return
        if taken:
            self.bytes_sent += taken
            self.last_taken_s = self._loop.time()
        self._watch_writable(wanted=bool(self._parts))
        while self._sent_marks and self._sent_marks[0][0] <= self.bytes_sent:
            self._sent_marks.popleft()[1]()
        if self._is_finishing and not self._parts:
            self.close()

    def _send_some(self) -> int:
        taken = 0
        while self._parts and taken < _TURN_BYTES:
            try:
                count = self._sock.sendmsg(self._parts if len(self._parts) <= _MAX_PARTS else islice(self._parts, _MAX_PARTS))
            except (BlockingIOError, InterruptedError):
                break
            self._drop(count)
            taken += count
        return taken

    def _drop(self, count: int) -> None:
        while count:
            first = self._parts[0]
            if count < first.nbytes:
                self._parts[0] = first[count:]
                return
            count -= first.nbytes
            self._parts.popleft()

    def _watch_writable(self, *, wanted: bool) -> None:
        if wanted == self._is_writing or self.is_closed:
            return
        self._is_writing = wanted
        if wanted:
            self._loop.add_writer(self._fd, self._write_turn)
        else:
            self._loop.remove_writer(self._fd)
