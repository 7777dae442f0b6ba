"""Every probe there is. A new one is a file beside this one and a line here."""

from __future__ import annotations

from chaos.core.measures import Measure
from chaos.probes import availability, conservation, correctness, degraded, epoch_monotone, latency, leak, missing_copies, recovery_time

PROBES: dict[str, Measure] = {
    "availability": availability.measure,
    "correctness": correctness.measure,
    "conservation": conservation.measure,
    "degraded": degraded.measure,
    "missing_copies": missing_copies.measure,
    "epoch_monotone": epoch_monotone.measure,
    "latency": latency.measure,
    "recovery_time": recovery_time.measure,
    "leak": leak.measure,
}
