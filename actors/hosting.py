"""An expert actor that has a process to itself, and sets what only the owner of a process may set."""

from __future__ import annotations

from actors.expert_actor import ExpertActor
from cluster.core.status import ActorReport
from cluster.heap import settle_heap


class HostedExpertActor(ExpertActor):
    """What Ray hosts."""

    async def start(self, node_id: str, node_address: str = "") -> ActorReport:
        """As `ExpertActor.start`."""
        report = await super().start(node_id, node_address)
        settle_heap()
        return report
