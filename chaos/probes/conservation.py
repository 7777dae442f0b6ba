"""Conservation: every (token, choice) of an answered request ended as exactly one outcome."""

from __future__ import annotations

from chaos.core import measures
from chaos.core.observations import Observations


def measure(seen: Observations) -> float | None:
    """Choices too many or too few; None without an answer."""
    return measures.num_unaccounted(seen) if any(request.is_ok for request in seen.requests) else None
