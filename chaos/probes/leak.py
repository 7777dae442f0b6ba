"""Leaks, the cheap part: processes of the cluster beyond those that ran when the session began."""

from __future__ import annotations

from chaos.core.observations import Observations


def measure(seen: Observations) -> float | None:
    """How many more there are now; None where they were not counted."""
    return seen.counts.get("more_processes")
