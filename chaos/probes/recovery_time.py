"""Recovery: seconds from the fault to the end of the last answer that was not exact."""

from __future__ import annotations

from chaos.core import measures
from chaos.core.observations import Observations


def measure(seen: Observations) -> float | None:
    """None when it is not over, or nothing was struck."""
    return measures.exact_again_s(seen)
