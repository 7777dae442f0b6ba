"""SIGSTOP of the controller for some seconds, then SIGCONT: it neither dies nor decides."""

from __future__ import annotations

from chaos.core.observations import Strike
from chaos.faults.recovery import look, mended, resume_stopped, wait_until
from chaos.port import FaultSettings, Injection, Order


class Settings(FaultSettings):
    """None; `seconds` of the action says for how long."""


async def inject(order: Order, injection: Injection) -> None:
    """Stop it."""
    injection.strikes.append(Strike("freeze_controller", order.target.name, frozenset(), order.clock(), details={"seconds": order.seconds}))
    for process in order.target.processes:
        order.cluster.stop(process)


async def recover(order: Order, injection: Injection) -> None:
    """Let it go on; see that it, or its successor, answers."""
    resume_stopped(order, injection)
    await wait_until(order, lambda: look(order) is not None, "the controller answers")
    mended(order, injection, is_mended=True)
