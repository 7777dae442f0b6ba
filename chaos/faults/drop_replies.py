"""An actor computes, and its replies never leave: a link that is open and carries nothing back."""

from __future__ import annotations

from pydantic import PositiveInt

from chaos.faults.actor_frames import heal, play
from chaos.port import FaultSettings, Injection, Order


class Settings(FaultSettings):
    """How many; all while it lasts, by default."""

    count: PositiveInt | None = None


async def inject(order: Order, injection: Injection) -> None:
    """Keep them back."""
    await play(order, injection, "drop_replies", order.settings.model_dump(exclude_none=True))


recover = heal
