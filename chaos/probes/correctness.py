"""Correctness: answers that are neither the known answer nor what their own plan gives when it is replayed, bit for bit; and those nobody could replay."""

from __future__ import annotations

from chaos.core import measures
from chaos.core.observations import Observations


def measure(seen: Observations) -> float | None:
    """How many; None without an answer."""
    return measures.num_wrong(seen) + measures.num_unchecked(seen) if any(request.is_ok for request in seen.requests) else None
