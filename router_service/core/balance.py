"""The balancer: which copy of an expert serves a request's rows. Replicas by power of two choices; a shadow when no replica is left.

Trust goes first: a good shadow is asked before a doubtful replica, and a copy that is not trusted at all never.
An actor's burden is how long its frames take of late, times those before the next one: a slow actor gets fewer rows than a long queue alone would tell.
Sources: Mitzenmacher, The Power of Two Choices in Randomized Load Balancing (1996), as in Ray Serve; the peak EWMA of Finagle's balancers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence

from cluster.core.ids import Role
from cluster.core.routing_table import TableCopy
from router_service.core.trust import Rank


def pick_copy(
    copies: Sequence[TableCopy],
    *,
    tried: Collection[TableCopy] = (),
    exact: bool = False,
    burden: Callable[[str], float],
    rng: random.Random,
    rank: Callable[[TableCopy], Rank] | None = None,
) -> TableCopy | None:
    """A copy that was not tried: of two random replicas the less burdened, else a shadow unless `exact`; None when none is left.

    `burden` tells about how long one more frame would take at an actor, by its id; `rank` how far a copy is trusted, None: all alike.
    """
    if len(copies) == 1 and rank is None and not tried and not (exact and copies[0].role is not Role.REPLICA):
        return copies[0]
    fresh = [copy for copy in copies if copy not in tried] if tried else list(copies)
    if exact:
        fresh = [copy for copy in fresh if copy.role is Role.REPLICA]
    if rank is not None:
        fresh = _most_trusted(fresh, rank)
    if len(fresh) > 1:
        fresh = [copy for copy in fresh if copy.role is Role.REPLICA] or fresh
    if not fresh:
        return None
    if len(fresh) == 1:
        return fresh[0]
    return min(rng.sample(fresh, 2), key=lambda copy: burden(copy.incarnation.actor_id))


def _most_trusted(copies: Sequence[TableCopy], rank: Callable[[TableCopy], Rank]) -> list[TableCopy]:
    ranked = [(rank(copy), copy) for copy in copies]
    best = min((found for found, _ in ranked), default=Rank.NEVER)
    return [copy for found, copy in ranked if found is best is not Rank.NEVER]


class Pace:
    """How long an actor's frames take of late: at once up with a slow one, slowly down, and forgotten while it is not asked, so that it is tried again."""

    def __init__(self) -> None:
        self._frame_s = 0.0
        self._at_s = 0.0

    def learn(self, took_s: float, now_s: float) -> None:
        """A frame took so long."""
        before_s = self.frame_s(now_s)
        self._frame_s = took_s if took_s > before_s else before_s + _WEIGHT * (took_s - before_s)
        self._at_s = now_s

    def frame_s(self, now_s: float) -> float:
        """About what a frame takes; 0 when nothing is known any more."""
        return self._frame_s * 0.5 ** ((now_s - self._at_s) / _HALF_LIFE_S) if self._frame_s else 0.0


_WEIGHT = 0.2
_HALF_LIFE_S = 3.0
