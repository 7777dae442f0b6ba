"""One heavy step in each turn of the event loop, in order: between two of them the loop hears its sockets.

Tensor work of small requests runs on the loop, since a thread costs more. When many requests come at once their steps would run back to back, and
whatever else the loop has to do, refusals and results of actors among them, would wait for all of them.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """Belongs to one event loop. Who waits is bounded by who was admitted."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_taken = False

    async def take(self) -> None:
        """Returns when it is the caller's turn; the step then follows without another await."""
        loop = asyncio.get_running_loop()
        if not self._is_taken:
            self._is_taken = True
            loop.call_soon(self._pass_on)
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _pass_on(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # its task was cancelled while it waited
                turn.set_result(None)
                asyncio.get_running_loop().call_soon(self._pass_on)
                return
        self._is_taken = False
