"""Waiting on a condition of another process, which tells nobody when it comes true."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

POLL_S = 0.02


def wait_until(condition: Callable[[], bool], what: str, *, timeout_s: float = 30.0) -> None:
    """Return as soon as the condition holds; fail by name when it does not within the limit."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(POLL_S)


async def until(condition: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    """Let the other tasks of this loop run until the condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - nobody tells when a condition of the code under test comes true
            await asyncio.sleep(0)
