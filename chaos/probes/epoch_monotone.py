"""Epochs: no request is planned with an older table than one that had ended before it was sent."""

from __future__ import annotations

from chaos.core import measures
from chaos.core.observations import Observations


def measure(seen: Observations) -> float | None:
    """How many were."""
    return measures.num_epoch_regressions(seen)
