"""A node dies with all that it hosts, raylet and workers: a power cut. Recovery starts a node of its name again."""

from __future__ import annotations

import asyncio

from chaos.core.observations import Strike
from chaos.core.targets import NodeView
from chaos.faults.recovery import look, mended, wait_until
from chaos.port import FaultSettings, Injection, Order
from cluster.core.errors import ConfigError


class Settings(FaultSettings):
    """None."""


async def inject(order: Order, injection: Injection) -> None:
    """Kill it; the fault's time is that of its workers' end."""
    node = _node(order)
    injection.held["lost"] = node
    at_s = await asyncio.to_thread(order.cluster.kill_node, node)
    injection.strikes.append(Strike("lose_node", node.name, order.target.incarnations, at_s, details={"actors": len(order.target.actors)}))


async def recover(order: Order, injection: Injection) -> None:
    """Start the node again; wait until the cluster shows it as alive under its new id, and each of its actors serves in a later life."""
    node = _node(order)
    if injection.held.pop("lost", None) is not None:
        await asyncio.to_thread(order.cluster.start_node, node)

    def is_whole() -> bool:
        found = look(order)
        if found is None or not any(known.name == node.name and known.node_id != node.node_id for known in found.nodes):
            return False
        alive = {actor.incarnation.actor_id: actor.incarnation.generation for actor in found.actors}
        return all(alive.get(actor.incarnation.actor_id, -1) > actor.incarnation.generation for actor in injection.target.actors)

    await wait_until(order, is_whole, f"{node.name} is back and its actors serve")
    mended(order, injection, is_mended=False)


def _node(order: Order) -> NodeView:
    if order.target.node is None:
        message = "target: lose_node needs a target of kind node"
        raise ConfigError(message)
    return order.target.node
