"""Faults that an actor plays itself when a fault frame asks for it: begun by one frame, ended by `heal`, proven by the count that `state` tells.

A fault that was there and struck no frame proves nothing: its repetition fails.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from chaos.core.observations import Strike
from chaos.core.targets import ActorView
from chaos.faults.recovery import look, mended, wait_until
from chaos.port import Injection, Order
from cluster.core.errors import FleetError
from cluster.core.ids import ExpertId

HEAL = "heal"
STATE = "state"
COUNTS = "counts"


async def play(order: Order, injection: Injection, fault: str, settings: dict[str, Any], *, experts: frozenset[ExpertId] = frozenset()) -> None:
    """Have every struck actor play it."""
    injection.held[COUNTS] = [await _struck(order, actor) for actor in order.target.actors]
    given = settings | ({} if order.seconds is None else {"seconds": order.seconds})
    for actor in order.target.actors:
        injection.strikes.append(Strike(fault, order.target.name, frozenset({actor.incarnation}), order.clock(), experts=experts, details=dict(given)))
        said = await order.cluster.ask(actor, fault, given)
        injection.strikes[-1].details["said"] = said


async def heal(order: Order, injection: Injection) -> None:
    """End what every struck actor plays, and see that it ended; note how often it struck. One that is gone must have been replaced.

    Raises FleetError when one did not end, or was healed and had struck nothing.
    """
    survived = True
    for number, actor in enumerate(injection.target.actors):
        try:
            after = await _healed(order, actor)
        except FleetError:
            survived = False
            await _see_it_gone(order, actor)
        else:
            _note(injection, number, after)
    mended(order, injection, is_mended=survived)
    for strike in injection.strikes:
        if strike.details.get("struck", {strike.fault: 1}).get(strike.fault, 0) == 0:
            message = f"{strike.target}: {strike.fault} was there and struck no frame: nothing is proven; let it last longer, or send more load"
            raise FleetError(message)


async def _healed(order: Order, actor: ActorView) -> dict[str, int]:
    before = json.loads(await order.cluster.ask(actor, STATE, {}))
    await order.cluster.ask(actor, HEAL, {})
    after = json.loads(await order.cluster.ask(actor, STATE, {}))
    if after["active"]:
        message = f"{actor.incarnation}: still plays {', '.join(after['active'])} after it was healed"
        raise FleetError(message)
    struck: dict[str, int] = before["struck"]
    return struck


async def _struck(order: Order, actor: ActorView) -> dict[str, int]:
    """How often each fault has struck in this life of an actor: earlier repetitions count, too."""
    struck: dict[str, int] = json.loads(await order.cluster.ask(actor, STATE, {}))["struck"]
    return struck


async def _see_it_gone(order: Order, actor: ActorView) -> None:
    """An actor that does not answer is healed only by not being there any more."""

    def is_gone() -> bool:
        found = look(order)
        return found is not None and actor.incarnation not in {known.incarnation for known in found.actors} and not order.cluster.is_alive(actor.process)

    await wait_until(order, is_gone, f"{actor.incarnation} answers no fault frame and is gone")


def _note(injection: Injection, number: int, after: dict[str, int]) -> None:
    """How often faults struck since this one was asked for; of one that was never taken nothing is said."""
    if number < len(injection.strikes) and "said" in (strike := injection.strikes[number]).details:
        before = injection.held[COUNTS][number]
        struck = {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}
        injection.strikes[number] = replace(strike, details=strike.details | {"struck": struck})
