"""SIGKILL of the controller: routers keep their table, and it comes back where its records are."""

from __future__ import annotations

from chaos.core.observations import Strike
from chaos.faults.recovery import look, mended, wait_until
from chaos.port import FaultSettings, Injection, Order


class Settings(FaultSettings):
    """None."""


async def inject(order: Order, injection: Injection) -> None:
    """Kill it."""
    injection.strikes.append(Strike("kill_controller", order.target.name, frozenset(), order.clock()))
    for process in order.target.processes:
        order.cluster.kill(process)


async def recover(order: Order, injection: Injection) -> None:
    """Nothing to undo: wait until another process answers as the controller."""

    def is_back() -> bool:
        found = look(order)
        return found is not None and found.controller is not None and found.controller not in injection.target.processes

    await wait_until(order, is_back, "a new controller answers")
    mended(order, injection, is_mended=True)
