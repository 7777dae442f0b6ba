"""An event loop on a manual clock: whoever would wait sets the clock to what is due next. Nothing in it depends on the machine's time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

_R = TypeVar("_R")


class _NeverReady(selectors.DefaultSelector):
    """Waits for nothing: the clock jumps to the end of the wait."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            message = "everybody waits and nothing is due: a deadlock"
            raise AssertionError(message)
        self.now_s += max(0.0, timeout)
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return super().get_map()


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs coroutines in virtual time. `jump` is a pause of the whole process: time passes and nobody runs."""

    def __init__(self) -> None:
        self._virtual = _NeverReady()
        super().__init__(self._virtual)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._virtual.now_s

    def jump(self, by_s: float) -> None:
        self._virtual.now_s += by_s


def run_in_virtual_time(work: Coroutine[Any, Any, _R], loop: VirtualLoop) -> _R:
    """Run to the end; whatever is still under way then is cancelled."""
    try:
        return loop.run_until_complete(work)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.close()
