"""How many requests a second a cluster answers when they come one by one: what shares of a peak in scenarios are shares of. Sans-io.

Callers who wait for their answers say too much: they come together, so their rows merge, and they fall silent while the cluster is behind. So rates are
tried downwards from what such callers reach, and the first one that the cluster keeps up with twice in a row is its peak: once may be luck.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from chaos.core.observations import Request

STEP = 0.9
NUM_STEPS = 16
NUM_PROOFS = 2
# Where a queue grows, latency leaves every bound within a second; a busy machine's own pauses touch fewer requests than this share.
KEPT_SHARE = 0.95
KEPT_WITHIN_S = 0.1


def rates_to_try(ceiling: float) -> Iterator[float]:
    """From the ceiling downwards; the last is a fifth of it."""
    return (ceiling * STEP**number for number in range(NUM_STEPS))


def keeps_up(requests: Iterable[Request], begin_s: float, end_s: float) -> bool:
    """Whether nearly all requests due in [begin_s, end_s) were answered soon after they were due. Those that have not ended yet must be among them."""
    due = [request for request in requests if begin_s <= request.due_s < end_s]
    soon = sum(request.is_ok and request.took_s <= KEPT_WITHIN_S for request in due)
    return bool(due) and soon >= KEPT_SHARE * len(due)
