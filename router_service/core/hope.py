"""Whether rows are worth taking that others wait before: what could only be late is refused at once, while its caller still has time to go elsewhere.

Without this a crowd that is larger than the actors can serve fills the queue with rows that are late when their turn comes, and hardly anything
is answered in time: in the overload simulation 2 % of what the actors could do.
"""

from __future__ import annotations

from typing import Final

from cluster.core.errors import Overloaded

# Of the time left, the share that may pass with waiting: the rate is an estimate, and rows must still be computed, sent back and combined.
MAX_SHARE: Final = 0.5
MIN_RETRY_AFTER_S: Final = 0.01
MAX_RETRY_AFTER_S: Final = 5.0


def check_hope(number: int, per_s: float, left_s: float, *, what: str = "rows", share: float = MAX_SHARE) -> None:
    """Raises Overloaded when so many rows, one's own the last of them, will hardly be computed in time. Without a rate nobody is turned away.

    `share` of the time left may pass with waiting.
    """
    if per_s <= 0:
        return
    wait_s = number / per_s
    if wait_s <= share * left_s:
        return
    message = f"{number} {what} would take about {wait_s:.2f} s and {left_s:.2f} s are left of the deadline; try again later, or allow more time"
    raise Overloaded(message, retry_after_s=min(max(wait_s - share * left_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S))
