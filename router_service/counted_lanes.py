"""The lanes as the pipeline sees them, with what passes through counted: rows by expert for the controller, bytes and retries for the metrics."""

from __future__ import annotations

import asyncio
from collections import Counter

from cluster.core.ids import ExpertId
from cluster.telemetry.metrics import RouterMetrics
from router_service.lanes import SegmentReply, SegmentRequest
from router_service.pipeline import LanesPort


class CountedLanes:
    """The lanes, with what passes through them counted: rows by expert since the last `take_loads`, and bytes."""

    def __init__(self, lanes: LanesPort, metrics: RouterMetrics, *, expert_series: bool = False) -> None:
        """`expert_series`: also as Prometheus series by expert, for operators (`telemetry.expert_load_series`)."""
        self._lanes = lanes
        self._metrics = metrics
        self._expert_series = expert_series
        self._loads: Counter[ExpertId] = Counter()

    def begin(self, request: SegmentRequest) -> asyncio.Future[SegmentReply]:
        """Begin, and count the rows once: a retry of the same segment is no new load."""
        if request.attempt == 0:
            self._loads[request.expert] += len(request.rows)
            if self._expert_series:
                expert = request.expert
                self._metrics.expert_tokens(expert.model, expert.layer, {expert.index: len(request.rows)})
        else:
            self._metrics.redispatched("failover")
        future = self._lanes.begin(request)
        future.add_done_callback(self._count_bytes)
        return future

    def _count_bytes(self, ended: asyncio.Future[SegmentReply]) -> None:
        if not ended.cancelled() and ended.exception() is None:
            reply = ended.result()
            self._metrics.link_bytes("sent", reply.bytes_sent)
            self._metrics.link_bytes("received", reply.bytes_received)

    def queued_tokens(self, actor_id: str) -> int:
        """Rows that wait for an actor."""
        return self._lanes.queued_tokens(actor_id)

    def take_loads(self) -> Counter[ExpertId]:
        """Rows by expert since the last call."""
        loads, self._loads = self._loads, Counter()
        return loads
