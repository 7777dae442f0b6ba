"""One weight of one replica becomes infinite."""

from __future__ import annotations

from chaos.faults.actor_frames import heal
from chaos.faults.weights import spoil
from chaos.port import FaultSettings, Injection, Order


class Settings(FaultSettings):
    """None."""


async def inject(order: Order, injection: Injection) -> None:
    """Spoil it."""
    await spoil(order, injection, "nan_weights", {"value": "inf"})


recover = heal
