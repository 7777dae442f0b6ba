"""Degradation: the share of answered choices that no full-precision copy answered."""

from __future__ import annotations

from chaos.core import measures
from chaos.core.observations import Observations


def measure(seen: Observations) -> float | None:
    """0.0 when all were exact; None without an answer."""
    return measures.degraded_share(seen)
