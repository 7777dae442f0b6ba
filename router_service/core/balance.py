"""The balancer: which copy of an expert serves a request's rows. Replicas by power of two choices on queued tokens; a shadow when no replica is left.

Source: Mitzenmacher, The Power of Two Choices in Randomized Load Balancing (1996), as in Ray Serve's replica scheduler.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence

from cluster.core.ids import Role
from cluster.core.routing_table import TableCopy


def pick_copy(
    copies: Sequence[TableCopy],
    *,
    tried: Collection[TableCopy] = (),
    exact: bool = False,
    queued_tokens: Callable[[str], int],
    rng: random.Random,
) -> TableCopy | None:
    """A copy that was not tried: of two random replicas the one with fewer queued tokens, else a shadow unless `exact`; None when none is left.

    `queued_tokens` tells the tokens that wait for an actor, by its id.
    """
    fresh = [copy for copy in copies if copy not in tried]
    replicas = [copy for copy in fresh if copy.role is Role.REPLICA]
    candidates = replicas if replicas or exact else fresh
    if not candidates:
        return None
    if len(candidates) == 1:
        return candidates[0]
    return min(rng.sample(candidates, 2), key=lambda copy: queued_tokens(copy.incarnation.actor_id))
