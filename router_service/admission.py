"""Bounds on what the router holds at once: bytes of request messages (first come, first served, with a bounded wait) and requests.

A call waits here before its message is read, so that waiting costs no memory. The budget is held until the call has ended, on every path.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Final, NoReturn

from cluster.core.errors import MessageTooLarge, Overloaded
from router_service.core.hope import check_hope

MAX_WAITING: Final = 4096
MAX_LIARS: Final = 1024
RATE_SAMPLES: Final = 64
FEW_REQUESTS: Final = 8
# Less than the lanes allow: what they refuse has been read, checked and sorted before.
MAX_WAIT_SHARE: Final = 0.35


class ByteLease:
    """Bytes held by one call. `shrink` gives back what turned out not to be needed, `release` the rest; both may be called again."""

    def __init__(self, budget: ByteBudget, num_bytes: int) -> None:
        self._budget = budget
        self.num_bytes = num_bytes

    def shrink(self, num_bytes: int) -> None:
        """Keep at most this many bytes."""
        surplus = self.num_bytes - max(0, num_bytes)
        if surplus > 0:
            self.num_bytes -= surplus
            self._budget._give_back(surplus)  # noqa: SLF001  (the two halves of one thing)

    def release(self) -> None:
        """Give everything back."""
        self.shrink(0)


class ByteBudget:
    """At most `limit_bytes` held at once; who comes later waits in order, so that small calls never starve a large one."""

    def __init__(self, limit_bytes: int, *, name: str, max_waiting: int = MAX_WAITING) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._name = name
        self._max_waiting = max_waiting
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def num_waiting(self) -> int:
        """Calls that wait for bytes."""
        return len(self._waiting)

    def take(self, num_bytes: int) -> ByteLease | None:
        """Bytes that are free now, or None."""
        if self._waiting or self.held_bytes + num_bytes > self.limit_bytes:
            return None
        self.held_bytes += num_bytes
        return ByteLease(self, num_bytes)

    async def acquire(self, num_bytes: int, *, timeout_s: float) -> ByteLease:
        """Wait for bytes. Raises MessageTooLarge when they can never fit, Overloaded when they do not come free in time."""
        if num_bytes > self.limit_bytes:
            message = f"a message of {num_bytes} bytes can never fit into the router's budget of {self.limit_bytes} ({self._name}); send fewer tokens at once"
            raise MessageTooLarge(message, limit_bytes=self.limit_bytes)
        lease = self.take(num_bytes)
        if lease is not None:
            return lease
        if len(self._waiting) >= self._max_waiting:
            self._refuse("too many calls wait for it already")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((num_bytes, turn))
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except TimeoutError:
            self._leave(num_bytes, turn)
            self._refuse(f"it did not come free within {timeout_s:.2f} s")
        except BaseException:
            self._leave(num_bytes, turn)
            raise
        return ByteLease(self, num_bytes)

    def _refuse(self, why: str) -> NoReturn:
        message = f"the router's byte budget ({self._name} = {self.limit_bytes}) is full and {why}; try again later, or declare the size in metadata"
        raise Overloaded(message, retry_after_s=0.2)

    def _leave(self, num_bytes: int, turn: asyncio.Future[None]) -> None:
        if turn.done() and not turn.cancelled():
            self._give_back(num_bytes)
            return
        turn.cancel()
        with contextlib.suppress(ValueError):
            self._waiting.remove((num_bytes, turn))
        self._wake()

    def _give_back(self, num_bytes: int) -> None:
        self.held_bytes -= num_bytes
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            num_bytes, turn = self._waiting[0]
            if turn.done():
                # Its task was cancelled and has not run since.
                self._waiting.popleft()
                continue
            if self.held_bytes + num_bytes > self.limit_bytes:
                return
            self._waiting.popleft()
            self.held_bytes += num_bytes
            turn.set_result(None)


class RequestLimit:
    """At most `limit` requests at once; one more is refused at once, because the byte budget is where waiting happens.

    How fast requests end of late says whether another one will be answered in time: one that will not is refused before its message is read.
    """

    def __init__(self, limit: int, *, name: str = "router.max_concurrent_requests", clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.count = 0
        self._name = name
        self._clock = clock
        self._ended_s: deque[float] = deque(maxlen=RATE_SAMPLES)

    @property
    def ended_per_s(self) -> float:
        """Requests that ended per second while others waited; 0 while that is not known."""
        if len(self._ended_s) < RATE_SAMPLES // 2:
            return 0.0
        # Up to now, not to the last one: a router that serves nobody any more must not be taken for as fast as it was.
        return (len(self._ended_s) - 1) / max(self._clock() - self._ended_s[0], 1e-6)

    def enter(self, left_s: float | None = None) -> None:
        """Take a place. Raises Overloaded when there is none, or when `left_s` until the deadline will hardly do."""
        if left_s is not None and self.count > FEW_REQUESTS:
            check_hope(self.count + 1, self.ended_per_s, left_s, what="requests", share=MAX_WAIT_SHARE)
        if self.count >= self.limit:
            message = f"the router works on {self.count} requests already ({self._name} = {self.limit}); try again later"
            raise Overloaded(message, retry_after_s=0.1)
        self.count += 1

    def leave(self, *, in_vain: bool = False) -> None:
        """Give the place back. One that was refused further on, or given up, says nothing of how fast requests are served, and would let too many in."""
        self.count -= 1
        if in_vain and self.count:
            return
        if self.count:
            self._ended_s.append(self._clock())
        else:
            self._ended_s.clear()


class Liars:
    """Callers that sent more than they had declared: what they declare counts for nothing from then on. Remembers the last MAX_LIARS."""

    def __init__(self, limit: int = MAX_LIARS) -> None:
        self._limit = limit
        self._known: OrderedDict[Hashable, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, caller: Hashable) -> bool:
        return caller in self._known

    def add(self, caller: Hashable) -> None:
        """Remember a caller; the one that lied longest ago is forgotten when there are too many."""
        self._known[caller] = None
        self._known.move_to_end(caller)
        if len(self._known) > self._limit:
            self._known.popitem(last=False)
