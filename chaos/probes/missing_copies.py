"""Coverage: replicas that the router's table lacks, or whose link is not ready."""

from __future__ import annotations

from chaos.core import measures
from chaos.core.observations import Observations


def measure(seen: Observations) -> float | None:
    """How many at the last look; None when the router did not answer."""
    return measures.num_missing_copies(seen)
