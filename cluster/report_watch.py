"""Asking processes how they are without waiting for those that do not answer: at most one question to each is under way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Report = TypeVar("Report")

PATIENCE_S = 0.25
MOMENT_S = 0.005  # for an answer that is already here


@dataclass(frozen=True, slots=True)
class Look(Generic[Report]):
    """What one look gave: a report, or an error, or neither in time. `was_heard`: it has answered at some time.

    `silent_s`: how long the question under way has waited; 0 when it was answered. `is_outdated`: the report was asked for before the last command.
    """

    report: Report | None = None
    error: BaseException | None = None
    was_heard: bool = False
    silent_s: float = 0.0
    is_outdated: bool = False


class ReportWatch(Generic[Report]):
    """One process. `ask` puts one question; its answer may come during a later look.

    A look waits a moment only, once for each question, and then takes the last report while that is younger than the time limit. Only for a
    process that was never heard, and was not just started, it waits up to the limit: of that nothing is known.
    """

    def __init__(self, ask: Callable[[], Awaitable[Report]], *, is_new: bool = False) -> None:
        """`is_new`: the process was just started, so its silence means nothing yet."""
        self._ask = ask
        self._is_new = is_new
        self._asked_s = 0.0
        self._commanded_s = 0.0
        self._question: asyncio.Task[Report] | None = None
        self._last: Report | None = None
        self._last_asked_s = 0.0
        self._was_heard = False

    @property
    def last(self) -> Report | None:
        """The newest report, however old."""
        return self._last

    def note_command(self) -> None:
        """A command was sent: reports asked for before it no longer count."""
        self._commanded_s = asyncio.get_running_loop().time()

    async def look(self, limit_s: float, patience_s: float = PATIENCE_S) -> Look[Report]:
        """Ask, and wait as long as it is worth: at most `patience_s` for one that has answered before."""
        loop = asyncio.get_running_loop()
        is_asked = self._question is not None
        if self._question is None:
            self._asked_s = loop.time()
            self._question = asyncio.ensure_future(self._answer())
        if self._was_heard:
            wait_s = 0.0 if is_asked else patience_s
        else:
            wait_s = patience_s if self._is_new else max(patience_s, limit_s - (loop.time() - self._asked_s))
        done, _ = await asyncio.wait({self._question}, timeout=min(limit_s, max(MOMENT_S, wait_s)))
        if done:
            return self._take()
        silent_s = loop.time() - self._asked_s
        if self._last is not None and loop.time() - self._last_asked_s < limit_s:
            return Look(self._last, was_heard=True, silent_s=silent_s, is_outdated=self._last_asked_s <= self._commanded_s)
        return Look(was_heard=self._was_heard, silent_s=silent_s)

    def close(self) -> None:
        """Give up the question under way."""
        if self._question is not None:
            self._question.cancel()
            self._question = None

    async def _answer(self) -> Report:
        return await self._ask()

    def _take(self) -> Look[Report]:
        question, self._question = self._question, None
        if question is None or question.cancelled():
            return Look(was_heard=self._was_heard)
        error = question.exception()
        if error is not None:
            return Look(error=error, was_heard=self._was_heard)
        self._last, self._last_asked_s, self._was_heard = question.result(), self._asked_s, True
        return Look(self._last, was_heard=True, is_outdated=self._asked_s <= self._commanded_s)
