"""The compute thread of an actor holds a frame and does not go on, while its event loop answers every question at once: a hung kernel."""

from __future__ import annotations

from chaos.faults.actor_frames import heal, play
from chaos.port import FaultSettings, Injection, Order


class Settings(FaultSettings):
    """None; `seconds` of the action says for how long."""


async def inject(order: Order, injection: Injection) -> None:
    """Hold the next frame."""
    await play(order, injection, "stuck_compute", {})


recover = heal
