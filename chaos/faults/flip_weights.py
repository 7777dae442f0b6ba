"""Random bits of one replica's weights are flipped: silent corruption, caught by checksums or the next digest, if at all."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from chaos.faults.actor_frames import heal
from chaos.faults.weights import spoil
from chaos.port import FaultSettings, Injection, Order


class Settings(FaultSettings):
    """How many bits, and which."""

    flips: int = Field(1, ge=1, le=1 << 20)
    bits: Literal["any", "exponent"] = "exponent"


async def inject(order: Order, injection: Injection) -> None:
    """Flip them, where the seed says."""
    await spoil(order, injection, "flip_weights", order.settings.model_dump() | {"seed": order.rng.randrange(1 << 31)})


recover = heal
