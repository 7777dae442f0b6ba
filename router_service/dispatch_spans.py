"""The spans of dispatch: one for what one actor is asked at a time, below the call's own; a later try hangs below the one that it replaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.core.errors import ReplicaError
from cluster.telemetry.attributes import AttributeValue
from cluster.telemetry.tracing import Span, Tracing
from router_service.core.flight import Send, Why
from router_service.core.segments import SegmentReply


@dataclass(slots=True, eq=False)
class _Asked:
    """One actor, asked for some segments together."""

    span: Span
    num_open: int
    replies: list[SegmentReply] = field(default_factory=list)


class DispatchSpans:
    """The spans of one call that is recorded."""

    def __init__(self, tracing: Tracing, parent: str, *, layer: int, epoch: int) -> None:
        """`parent` is the traceparent that first tries hang below."""
        self._tracing = tracing
        self._parent = parent
        self._facts = {"layer": layer, "epoch": epoch}
        self._asked: dict[tuple[int, int], _Asked] = {}
        self._last: dict[int, _Asked] = {}

    def asking(self, orders: Sequence[Send]) -> str:
        """Orders to one actor, given together. The traceparent that their frames may carry; empty where an actor's spans are not wanted."""
        first = orders[0]
        replaced = self._last.get(first.part) if first.why is not Why.FIRST else None
        parent = self._parent if replaced is None else replaced.span.traceparent
        facts: dict[str, AttributeValue] = {**self._facts, "actor_id": first.copy.incarnation.actor_id, "segments": len(orders), "attempt": first.attempt}
        asked = _Asked(self._tracing.open("moe.dispatch", kind="client", parent=parent, attributes=facts), len(orders))
        for order in orders:
            self._asked[order.part, order.attempt] = self._last[order.part] = asked
        return asked.span.traceparent if self._tracing.names_actors else ""

    def answered(self, part: int, attempt: int, reply: SegmentReply) -> None:
        """A success came."""
        asked = self._asked.pop((part, attempt), None)
        if asked is not None:
            asked.replies.append(reply)
            self._close(asked)

    def failed(self, part: int, attempt: int, error: ReplicaError) -> None:
        """A try brought nothing."""
        asked = self._asked.pop((part, attempt), None)
        if asked is not None:
            asked.span.event("failover", reason=error.reason)
            self._close(asked)

    def end(self, error: BaseException | None = None) -> None:
        """End all that is open: withdrawn, or lost with the call."""
        for asked in set(self._asked.values()):
            if error is not None:
                asked.span.fail(error)
            asked.num_open = 1
            self._close(asked)
        self._asked.clear()

    def _close(self, asked: _Asked) -> None:
        asked.num_open -= 1
        if asked.num_open:
            return
        replies = asked.replies
        if replies:
            asked.span.set(
                node_id=replies[0].node_id,
                role=replies[0].role.name.lower(),
                tokens=sum(len(reply.rows) for reply in replies),
                bytes_sent=sum(reply.bytes_sent for reply in replies),
                bytes_received=sum(reply.bytes_received for reply in replies),
                queue_s=max(reply.queue_s for reply in replies),
                compute_s=max(reply.compute_s for reply in replies),
                transfer_s=max(reply.transfer_s for reply in replies),
            )
        asked.span.end()
