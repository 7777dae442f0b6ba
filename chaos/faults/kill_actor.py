"""SIGKILL of expert actors: as the kernel's OOM killer, or a driver that takes its process along, would do it."""

from __future__ import annotations

from chaos.core.observations import Strike
from chaos.faults.recovery import mended, wait_until_replaced
from chaos.port import FaultSettings, Injection, Order


class Settings(FaultSettings):
    """None."""


async def inject(order: Order, injection: Injection) -> None:
    """Kill them all at once."""
    at_s = order.clock()
    injection.strikes.append(Strike("kill_actor", order.target.name, order.target.incarnations, at_s))
    for process in order.target.processes:
        order.cluster.kill(process)


async def recover(order: Order, injection: Injection) -> None:
    """Nothing to undo: wait until the controller has started each again."""
    await wait_until_replaced(order, injection.target.actors)
    mended(order, injection, is_mended=False)
