"""All actors of one logical GPU die at once: the device fell off the bus."""

from __future__ import annotations

from chaos.core.observations import Strike
from chaos.faults.recovery import mended, wait_until_replaced
from chaos.port import FaultSettings, Injection, Order


class Settings(FaultSettings):
    """None."""


async def inject(order: Order, injection: Injection) -> None:
    """SIGKILL to each, one right after the other."""
    injection.strikes.append(Strike("lose_gpu", order.target.name, order.target.incarnations, order.clock(), details={"actors": len(order.target.actors)}))
    for process in order.target.processes:
        order.cluster.kill(process)


async def recover(order: Order, injection: Injection) -> None:
    """Nothing to undo: wait until the controller has started each again, wherever there is room."""
    await wait_until_replaced(order, injection.target.actors)
    mended(order, injection, is_mended=False)
