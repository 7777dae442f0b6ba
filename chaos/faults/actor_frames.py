"""Faults that an actor plays itself when a fault frame asks for it: begun by one frame, ended by `heal`, proven by the count that `state` tells."""

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


async def play(order: Order, injection: Injection, fault: str, settings: dict[str, Any], *, experts: frozenset[ExpertId] = frozenset()) -> None:
    """Have every struck actor play it."""
    given = settings | ({} if order.seconds is None else {"seconds": order.seconds})
    for actor in order.target.actors:
        before = (await _state(order, actor))["struck"].get(fault, 0)
        injection.strikes.append(Strike(fault, order.target.name, frozenset({actor.incarnation}), order.clock(), experts=experts, details=dict(given)))
        said = await order.cluster.ask(actor, fault, given)
        injection.strikes[-1].details["said"] = said
        injection.held[_key(actor)] = before


async def heal(order: Order, injection: Injection) -> None:
    """End what every struck actor plays, see that it ended, and how often it struck. One that is gone must have been replaced.

    Raises FleetError for an actor that outlived its fault without having been struck once: what was measured is then nobody's failover.
    """
    survived, spared = True, []
    for number, actor in enumerate(injection.target.actors):
        try:
            struck = await _healed(order, actor)
        except FleetError:
            survived = False
            await _see_it_gone(order, actor)
            continue
        if number < len(injection.strikes) and _note(injection, number, struck) <= injection.held.get(_key(actor), -1):
            spared.append(f"{injection.strikes[number].fault} struck nothing in {actor.incarnation}")
    mended(order, injection, is_mended=survived)
    if spared:
        message = f"{'; '.join(spared)}: it was there and no frame met it, so this repetition proves nothing; send more load, or strike for longer"
        raise FleetError(message)


async def _healed(order: Order, actor: ActorView) -> dict[str, int]:
    before = await _state(order, actor)
    await order.cluster.ask(actor, HEAL, {})
    after = await _state(order, actor)
    if after["active"]:
        message = f"{actor.incarnation}: still plays {', '.join(after['active'])} after it was healed"
        raise FleetError(message)
    struck: dict[str, int] = before["struck"]
    return struck


async def _state(order: Order, actor: ActorView) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(await order.cluster.ask(actor, STATE, {}))
    return found


def _key(actor: ActorView) -> str:
    """Where an injection holds how often the actor had been struck before: it counts from its own start on."""
    return f"struck before in {actor.incarnation}"


async def _see_it_gone(order: Order, actor: ActorView) -> None:
    """An actor that does not answer is healed only by not being there any more."""

    def is_gone() -> bool:
        found = look(order)
        return found is not None and actor.incarnation not in {known.incarnation for known in found.actors} and not order.cluster.is_alive(actor.process)

    await wait_until(order, is_gone, f"{actor.incarnation} answers no fault frame and is gone")


def _note(injection: Injection, number: int, struck: dict[str, int]) -> int:
    """Keep the proof; how often this fault has struck by now."""
    strike = injection.strikes[number]
    injection.strikes[number] = replace(strike, details=strike.details | {"struck": struck})
    return struck.get(strike.fault, 0)
