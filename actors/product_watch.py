"""Lets somebody see every matrix product of the forwards that run on this thread, without another way through the forward.

A watcher is called with the rows, the matrix and the raw product, before a bias is added and before anything is made of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

Watcher = Callable[[Tensor, Tensor, Tensor], None]
"""Rows [T, I], matrix [O, I], product [T, O]. What it raises fails the forward."""


class _Watching(threading.local):
    watcher: Watcher | None = None


_watching = _Watching()


def current_watcher() -> Watcher | None:
    """Who watches on this thread; nobody by default."""
    return _watching.watcher


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Show every product of this block to `watcher`, after whoever watches already."""
    before = _watching.watcher
    _watching.watcher = watcher if before is None else _both(before, watcher)
    try:
        yield
    finally:
        _watching.watcher = before


def _both(first: Watcher, second: Watcher) -> Watcher:
    def watch(x_TI: Tensor, weight_OI: Tensor, product_TO: Tensor) -> None:
        first(x_TI, weight_OI, product_TO)
        second(x_TI, weight_OI, product_TO)

    return watch
