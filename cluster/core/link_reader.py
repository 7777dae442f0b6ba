"""Bytes of an expert link in, frames out, whatever the pieces they arrive in. No I/O: the shell receives into `buffer()` and says how much came.

Prefixes, headers and small bodies pass through one small staging buffer, so that a small frame costs one receive call. The rest of a large body
is received straight into the buffer that the owner allocated for it, after both lengths and the header were checked.
"""

from __future__ import annotations

from collections.abc import Callable

from cluster.core.link_codec import PREFIX, Prefix, decode, decode_prefix
from cluster.core.link_frames import Frame

_STAGING_BYTES = 64 << 10
_EMPTY = memoryview(b"")


class FrameReader:
    """Cuts a byte stream into frames.

    `allocate(num_bytes)` gives the writable buffer of one body. Set `handshake` to False once the peer has proven itself: until then only
    handshake frames of at most 4 KiB pass. Errors of `next` are final: the stream cannot be trusted any further.
    """

    def __init__(self, *, max_body_bytes: int, allocate: Callable[[int], memoryview]) -> None:
        self.handshake = True
        self._max_body_bytes = max_body_bytes
        self._allocate = allocate
        self._staging = memoryview(bytearray(_STAGING_BYTES))
        self._start = 0
        self._stop = 0
        self._prefix: Prefix | None = None
        self._frame: Frame | None = None
        self._body = _EMPTY
        self._filled = 0

    def buffer(self) -> memoryview:
        """Where the next received bytes go; never empty."""
        if self._frame is not None and self._start == self._stop:
            return self._body[self._filled :]
        return self._staging[self._stop :]

    def received(self, num_bytes: int) -> None:
        """Say that the first `num_bytes` of `buffer()` were filled; then call `next` until it gives None."""
        if self._frame is not None and self._start == self._stop:
            self._filled += num_bytes
        else:
            self._stop += num_bytes

    def next(self) -> tuple[Frame, memoryview] | None:
        """The next whole frame with its body, or None when more bytes are needed. Raises ProtocolMismatch or InvalidRequest."""
        is_between_frames = self._start == self._stop and self._prefix is None
        frame = None if is_between_frames else self._frame or self._read_header()
        if frame is None:
            return None
        self._fill_body()
        if self._filled < len(self._body):
            return None
        body = self._body
        self._prefix, self._frame, self._body, self._filled = None, None, _EMPTY, 0
        return frame, body

    def _read_header(self) -> Frame | None:
        if self._prefix is None:
            if self._stop - self._start < PREFIX.size:
                self._make_room(PREFIX.size)
                return None
            data = self._staging[self._start : self._start + PREFIX.size]
            self._prefix = decode_prefix(data, max_body_bytes=self._max_body_bytes, handshake=self.handshake)
            self._start += PREFIX.size
        header_bytes = self._prefix.header_bytes
        if self._stop - self._start < header_bytes:
            self._make_room(header_bytes)
            return None
        self._frame = decode(self._prefix, self._staging[self._start : self._start + header_bytes])
        self._start += header_bytes
        if self._prefix.body_bytes:
            self._body = self._allocate(self._prefix.body_bytes)
        return self._frame

    def _fill_body(self) -> None:
        """Move what already lies in staging; whatever is missing then is received in place."""
        count = min(self._stop - self._start, len(self._body) - self._filled)
        if count:
            self._body[self._filled : self._filled + count] = self._staging[self._start : self._start + count]
            self._start += count
            self._filled += count
        if self._start == self._stop:
            self._start = self._stop = 0

    def _make_room(self, num_bytes: int) -> None:
        """Move the unread bytes to the front, so that `num_bytes` of them fit; a large header gets a larger staging buffer for good."""
        unread = self._staging[self._start : self._stop]
        if self._start + num_bytes > len(self._staging):
            target = self._staging if num_bytes <= len(self._staging) else memoryview(bytearray(num_bytes))
            target[: len(unread)] = bytes(unread)
            self._staging = target
            self._start, self._stop = 0, len(unread)
