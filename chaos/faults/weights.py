"""What the faults of weights share: one replica of the load's layer in the struck actor, chosen by the seed. Only that actor's own copy is changed."""

from __future__ import annotations

from typing import Any

from chaos.faults.actor_frames import play
from chaos.port import Injection, Order
from cluster.core.errors import ConfigError


async def spoil(order: Order, injection: Injection, fault: str, settings: dict[str, Any]) -> None:
    """Spoil one expert. Raises ConfigError when the actor holds no replica of the layer."""
    for actor in order.target.actors:
        held = sorted(expert for expert in actor.replicas if (expert.model, expert.layer) == (order.model, order.layer))
        if not held:
            message = f"target: {actor.incarnation} holds no replica of layer {order.layer} of {order.model}"
            raise ConfigError(message)
        expert = order.rng.choice(held)
        place = {"model": expert.model, "layer": expert.layer, "index": expert.index}
        await play(order, injection, fault, settings | place, experts=frozenset({expert}))
