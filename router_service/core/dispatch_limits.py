"""Bounds on what dispatch makes of a message: a token is sent once for each choice, so few bytes may name many rows."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.core.errors import Overloaded

REQUEST_SHARE = 4
_RETRY_AFTER_S = 0.1


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """`max_choices`: rows that may wait for actors (router.max_queued_tokens); `max_bytes`: rows of all requests together (router.max_dispatch_bytes)."""

    max_choices: int = 262_144
    max_bytes: int = 2 << 30

    def choices_per_request(self, row_bytes: int) -> int:
        """T x K that one request may have where a row is so wide: more could never be dispatched, or only by itself."""
        return max(1, min(self.max_choices, self.max_bytes // REQUEST_SHARE // row_bytes))


class DispatchBudget:
    """Bytes of rows that requests under way may have, all together. Belongs to one event loop."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Hold bytes until `give_back`. Raises Overloaded when they are not free."""
        if self.held_bytes + num_bytes > self.limit_bytes:
            message = f"rows on their way to experts fill the router's budget of {self.limit_bytes} bytes (router.max_dispatch_bytes); try again later"
            raise Overloaded(message, retry_after_s=_RETRY_AFTER_S)
        self.held_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """What was taken is free again."""
        self.held_bytes -= num_bytes
