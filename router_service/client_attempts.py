"""When to try again, decided without waiting: one deadline for all attempts, pauses that grow and are jittered, and never a retry that cannot end in time."""

from __future__ import annotations

import random
from typing import Final

from cluster.core.errors import DeadlineExceeded, MessageTooLarge, MoeError, Overloaded

FIRST_PAUSE_S: Final = 0.05
MAX_PAUSE_S: Final = 1.0
# Less time than this is not worth an attempt: it would only add load.
MIN_ATTEMPT_S: Final = 0.001


class Attempts:
    """The attempts of one call. Every call here is safe to repeat: an expert's forward is a pure function."""

    def __init__(self, *, deadline_s: float, rng: random.Random) -> None:
        """`deadline_s` is on the clock that `now_s` is given in."""
        self._deadline_s = deadline_s
        self._rng = rng
        self._next_pause_s = FIRST_PAUSE_S
        self._last: MoeError | None = None
        self.num_failed = 0

    def remaining_s(self, now_s: float) -> float:
        """Time left for the next attempt."""
        return max(MIN_ATTEMPT_S, self._deadline_s - now_s)

    def pause_s(self, error: MoeError, now_s: float) -> float:
        """How long to wait before the next attempt. Raises the error when it cannot be cured, or not in time.

        A deadline that passes during a retry names what the attempts before it failed of. A last attempt that is turned away, since too little of the time
        was left for it, says nothing of what took the time: then what the one before it failed of is raised.
        """
        self.num_failed += 1
        if isinstance(error, DeadlineExceeded) and self._last is not None:
            message = f"{error}; {self.num_failed - 1} attempts before it failed, the last with: {self._last}"
            raise DeadlineExceeded(message) from self._last
        pause_s = max(self._next_pause_s * self._rng.uniform(0.5, 1.0), float(getattr(error, "retry_after_s", 0.0)))
        if not error.retryable or isinstance(error, MessageTooLarge) or now_s + pause_s + MIN_ATTEMPT_S >= self._deadline_s:
            try:
                raise self._telling(error)
            finally:
                del error  # a frame that its own error holds is a cycle
        self._last = error
        self._next_pause_s = min(2 * self._next_pause_s, MAX_PAUSE_S)
        return pause_s

    def _telling(self, error: MoeError) -> MoeError:
        last, self._last = self._last, None  # it would be held by its own traceback
        was_turned_away = isinstance(error, Overloaded) and error.retryable
        return last if was_turned_away and last is not None and not isinstance(last, Overloaded) else error
