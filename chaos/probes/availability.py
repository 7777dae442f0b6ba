"""Availability: the share of requests that were answered."""

from __future__ import annotations

from chaos.core import measures
from chaos.core.observations import Observations


def measure(seen: Observations) -> float | None:
    """1.0 when every request was answered; None without requests."""
    return measures.availability(seen)
