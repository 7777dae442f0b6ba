"""Latency: the 99th percentile over the answered requests of the window, in ms."""

from __future__ import annotations

from chaos.core.measures import latencies_ms
from chaos.core.observations import Observations, quantile


def measure(seen: Observations) -> float | None:
    """None without an answer."""
    return quantile(latencies_ms(seen.requests), 0.99)
