"""SIGKILL of the router: callers see their connection break, try again, and find it where it was."""

from __future__ import annotations

import asyncio

from chaos.core.observations import Strike
from chaos.faults.recovery import look, mended, wait_until
from chaos.port import FaultSettings, Injection, Order


class Settings(FaultSettings):
    """None."""


async def inject(order: Order, injection: Injection) -> None:
    """Kill it; it may have siblings behind the same address."""
    found = await asyncio.to_thread(look, order)
    injection.held["num_routers"] = len(found.routers) if found is not None else 1
    injection.strikes.append(Strike("kill_router", order.target.name, frozenset(), order.clock()))
    for process in order.target.processes:
        order.cluster.kill(process)


async def recover(order: Order, injection: Injection) -> None:
    """Nothing to undo: wait until the status names as many router processes again, none of them the killed one."""

    def is_back() -> bool:
        found = look(order)
        return found is not None and len(found.routers) >= injection.held["num_routers"] and not set(found.routers) & set(injection.target.processes)

    await wait_until(order, is_back, "a new router runs")
    mended(order, injection, is_mended=True)
