"""Ending all that a deployment runs: routers first, so that nothing is dispatched any more; then actors; then the nodes' agents."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from cluster.core.errors import MoeError
from cluster.core.status import ActorState, FleetObservation
from cluster.fleet import Fleet

DOWN_PAUSE_S = 0.1


Look = Callable[[], Awaitable[FleetObservation]]


async def stop_routers(fleet: Fleet, look: Look, *, timeout_s: float) -> None:
    """Until a look sees none."""
    while routers := [router.router_id for router in (await look()).routers if router.state is not ActorState.DEAD]:
        await _all(fleet.stop_router(name, timeout_s=timeout_s) for name in routers)


async def stop_actors(fleet: Fleet, look: Look, *, timeout_s: float) -> None:
    """Until a look sees none."""
    while actors := [actor.incarnation for actor in (await look()).actors if actor.state is not ActorState.DEAD]:
        await _all(fleet.stop_actor(incarnation, timeout_s=timeout_s) for incarnation in actors)


async def _all(stops: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all; what failed is looked at again, after a breath."""
    results = await asyncio.gather(*stops, return_exceptions=True)
    if any(isinstance(result, MoeError) for result in results):
        await asyncio.sleep(DOWN_PAUSE_S)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, MoeError):
            raise result
