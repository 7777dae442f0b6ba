"""Every frame of an actor takes a multiple of its time: a throttled or shared GPU."""

from __future__ import annotations

from pydantic import Field

from chaos.faults.actor_frames import heal, play
from chaos.port import FaultSettings, Injection, Order


class Settings(FaultSettings):
    """How slow."""

    factor: float = Field(10.0, gt=1.0, le=1000.0)


async def inject(order: Order, injection: Injection) -> None:
    """Slow it down."""
    await play(order, injection, "slow_compute", order.settings.model_dump())


recover = heal
