"""SIGKILL of the router: callers see their connection break, try again, and find it where it was."""

from __future__ import annotations

from chaos.core.observations import Strike
from chaos.faults.recovery import look, mended, wait_until
from chaos.port import FaultSettings, Injection, Order


class Settings(FaultSettings):
    """None."""


async def inject(order: Order, injection: Injection) -> None:
    """Kill it."""
    injection.strikes.append(Strike("kill_router", order.target.name, frozenset(), order.clock()))
    for process in order.target.processes:
        order.cluster.kill(process)


async def recover(order: Order, injection: Injection) -> None:
    """Nothing to undo: wait until the status names a router process again, another one."""

    def is_back() -> bool:
        found = look(order)
        return found is not None and bool(found.routers) and not set(found.routers) & set(injection.target.processes)

    await wait_until(order, is_back, "a new router runs")
    mended(order, injection, is_mended=True)
