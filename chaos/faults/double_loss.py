"""An expert's only replica dies, and its shadow's actor a moment later: what is left is the next rung of the ladder."""

from __future__ import annotations

from pydantic import Field

from chaos.core.observations import Strike
from chaos.core.targets import Inventory, Target, shadow_holder
from chaos.faults.recovery import mended, wait_until_replaced
from chaos.port import FaultSettings, Injection, Order


class Settings(FaultSettings):
    """How much later the shadow's actor dies; a pair in the scenario is drawn by the seed."""

    delay_s: float = Field(0.25, ge=0.0, le=10.0)


def widen(inventory: Inventory, target: Target, model: str) -> Target:
    """The primary, and the actor that holds the shadow of one of its experts."""
    shadow = shadow_holder(inventory, target, model=model)
    return Target("actor", f"{target.name}, then {shadow.name}", target.actors + shadow.actors, target.processes + shadow.processes)


async def inject(order: Order, injection: Injection) -> None:
    """Kill one, wait, kill the other."""
    delay_s: float = order.settings.model_dump()["delay_s"]
    for number, (actor, process) in enumerate(zip(order.target.actors, order.target.processes, strict=True)):
        if number:
            await order.pause(delay_s)
        injection.strikes.append(Strike("double_loss", str(actor.incarnation), frozenset({actor.incarnation}), order.clock(), details={"delay_s": delay_s}))
        order.cluster.kill(process)


async def recover(order: Order, injection: Injection) -> None:
    """Nothing to undo: wait until the controller has started both again."""
    await wait_until_replaced(order, injection.target.actors)
    mended(order, injection, is_mended=False)
