"""Pieces of work spread over turns of the event loop, so that no turn is long.

What is ready runs in one turn, all of it: sixteen answers that come in one frame hold the loop for as long as they take together, and whoever only needs
a word, as a call that is to be refused, waits for all of them, once for each of its own steps. So in one turn go on only as many as take about `TURN_S`
together: one where each takes as long, many where they are small, since a turn costs something, too.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final

TURN_S: Final = 0.001
MAX_PIECES: Final = 64


class Turns:
    """Who takes a turn goes on in this turn of the loop or a later one, in the order of coming. `clock` is the processor time of the loop's thread."""

    def __init__(self, *, clock: Callable[[], float] = time.thread_time) -> None:
        self._clock = clock
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._num_pieces = self._num_left = 1
        self._is_counting = False
        self._began_s = 0.0

    async def take(self) -> None:
        """Go on at once if this turn of the loop has room, else in one's own."""
        loop = asyncio.get_running_loop()
        if self._num_left and not self._waiting:
            self._num_left -= 1
            if not self._is_counting:
                self._is_counting = True
                self._began_s = self._clock()
                loop.call_soon(self._next_turn)
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next_turn(self) -> None:
        now_s = self._clock()
        if now_s - self._began_s > TURN_S:
            self._num_pieces = max(1, self._num_pieces // 2)
        elif self._waiting:
            self._num_pieces = min(MAX_PIECES, 2 * self._num_pieces)
        self._began_s, self._num_left = now_s, self._num_pieces
        while self._num_left and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # else its task was cancelled
                turn.set_result(None)
                self._num_left -= 1
        self._is_counting = self._num_left < self._num_pieces
        if self._is_counting:
            asyncio.get_running_loop().call_soon(self._next_turn)
