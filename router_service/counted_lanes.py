"""The lanes as the pipeline sees them, with what is asked of them counted: rows by expert for the controller, retries for the metrics."""

from __future__ import annotations

from collections import Counter

from cluster.core.ids import ExpertId
from cluster.telemetry.metrics import RouterMetrics
from router_service.core.segments import OnEnd, SegmentRequest, Withdraw
from router_service.dispatcher import LanesPort


class CountedLanes:
    """The lanes, with what is asked of them counted: rows by expert since the last `take_loads`, and further tries."""

    def __init__(self, lanes: LanesPort, metrics: RouterMetrics, *, expert_series: bool = False) -> None:
        """`expert_series`: also as Prometheus series by expert, for operators (`telemetry.expert_load_series`)."""
        self._lanes = lanes
        self._metrics = metrics
        self._expert_series = expert_series
        self._loads: Counter[ExpertId] = Counter()

    def begin(self, request: SegmentRequest, on_end: OnEnd) -> Withdraw:
        """Begin, and count the rows once: neither a further try of the same segment nor rows that are dispatched again are new load."""
        if request.attempt:
            self._metrics.redispatched("hedge" if request.is_hedge else "failover")
        elif not request.is_again:
            self._loads[request.expert] += len(request.rows)
            if self._expert_series:
                expert = request.expert
                self._metrics.expert_tokens(expert.model, expert.layer, {expert.index: len(request.rows)})
        return self._lanes.begin(request, on_end)

    def burden(self, actor_id: str) -> float:
        """About how long one more frame would take at an actor."""
        return self._lanes.burden(actor_id)

    def take_loads(self) -> Counter[ExpertId]:
        """Rows by expert since the last call."""
        loads, self._loads = self._loads, Counter()
        return loads
