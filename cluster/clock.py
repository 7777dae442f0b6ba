"""Time, as the shells read it: cores get `now_s` handed in, and tests bring a clock of their own."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where time comes from."""

    def now_s(self) -> float:
        """Monotonic seconds."""
        ...

    def unix_s(self) -> float:
        """Seconds since the Unix epoch, for people."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def now_s(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def unix_s(self) -> float:
        """Seconds since the Unix epoch."""
        return time.time()
