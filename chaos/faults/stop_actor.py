"""SIGSTOP of expert actors for some seconds, then SIGCONT: a process that neither dies nor answers, and comes back with old answers in its hands."""

from __future__ import annotations

from chaos.core.observations import Strike
from chaos.faults.recovery import look, mended, resume_stopped, wait_until
from chaos.port import FaultSettings, Injection, Order
from cluster.core.errors import FleetError

LOOKS = 20
LOOK_S = 0.002


class Settings(FaultSettings):
    """None; `seconds` of the action says for how long."""


async def inject(order: Order, injection: Injection) -> None:
    """Stop them."""
    at_s = order.clock()
    injection.strikes.append(Strike("stop_actor", order.target.name, order.target.incarnations, at_s, details={"seconds": order.seconds}))
    for process in order.target.processes:
        order.cluster.stop(process)
    for _ in range(LOOKS):
        running = [process for process in order.target.processes if order.cluster.is_running(process)]
        if not running:
            return
        await order.pause(LOOK_S)
    message = f"{running[0].what}: process {running[0].pid} runs on after SIGSTOP"
    raise FleetError(message)


async def recover(order: Order, injection: Injection) -> None:
    """Let them go on; see that each runs, or, where it was given up meanwhile, was replaced."""
    resume_stopped(order, injection)
    survived = all(order.cluster.is_alive(process) for process in injection.target.processes)
    mended(order, injection, is_mended=survived)

    def is_over() -> bool:
        if all(order.cluster.is_running(process) for process in injection.target.processes):
            return True
        found = look(order)
        alive = {} if found is None else {actor.incarnation.actor_id: actor.incarnation.generation for actor in found.actors}
        return all(
            order.cluster.is_running(actor.process) or alive.get(actor.incarnation.actor_id, -1) > actor.incarnation.generation
            for actor in injection.target.actors
        )

    await wait_until(order, is_over, f"{injection.target.name} runs again, or was replaced")
