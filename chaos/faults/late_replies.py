"""An actor's replies leave late."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from chaos.faults.actor_frames import heal, play
from chaos.port import FaultSettings, Injection, Order


class Settings(FaultSettings):
    """How late, and how many; all while it lasts, by default."""

    delay_s: float = Field(0.1, gt=0.0, le=60.0)
    count: PositiveInt | None = None


async def inject(order: Order, injection: Injection) -> None:
    """Delay them."""
    await play(order, injection, "late_replies", order.settings.model_dump(exclude_none=True))


recover = heal
