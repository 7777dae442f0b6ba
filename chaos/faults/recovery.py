"""Seeing that a fault is gone: what recoveries wait for, with an end to every wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from chaos.core.targets import ActorView, Inventory
from chaos.port import Injection, Order
from cluster.core.errors import FleetError

LOOK_S = 0.25


async def wait_until(order: Order, condition: Callable[[], bool], what: str) -> None:
    """Return once the condition holds; its questions run in a thread. Raises FleetError when it does not within the order's limit."""
    deadline_s = order.clock() + order.recover_limit_s
    while not await asyncio.to_thread(condition):
        if order.clock() > deadline_s:
            message = f"not within {order.recover_limit_s:g} s: {what}"
            raise FleetError(message)
        await order.pause(LOOK_S)


async def wait_until_replaced(order: Order, actors: tuple[ActorView, ...]) -> None:
    """Return once each of these actors serves in a later life."""

    def is_replaced() -> bool:
        found = look(order)
        alive = {} if found is None else {actor.incarnation.actor_id: actor.incarnation.generation for actor in found.actors}
        return all(alive.get(actor.incarnation.actor_id, -1) > actor.incarnation.generation for actor in actors)

    await wait_until(order, is_replaced, f"{', '.join(str(actor.incarnation) for actor in actors)} in a later life")


def resume_stopped(order: Order, injection: Injection) -> None:
    """Let stopped processes go on. Raises FleetError, all of them resumed, for one that was found running: it had not been stopped."""
    ran = [process.what for process in injection.target.processes if order.cluster.is_running(process)]
    for process in injection.target.processes:
        order.cluster.resume(process)
    if ran:
        message = f"{', '.join(ran)}: ran when it was to be resumed: it was not stopped, or somebody else let it go on; this repetition proves nothing"
        raise FleetError(message)


def look(order: Order) -> Inventory | None:
    """The inventory; None while the controller does not answer."""
    try:
        return order.cluster.inventory()
    except FleetError:
        return None


def mended(order: Order, injection: Injection, *, is_mended: bool) -> None:
    """Note that every strike was seen to be gone now. `is_mended`: the struck copies themselves serve again, rather than others in their place."""
    injection.strikes[:] = [
        replace(strike, gone_s=order.clock() if strike.gone_s is None else strike.gone_s, is_mended=is_mended) for strike in injection.strikes
    ]
