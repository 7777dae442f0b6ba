"""What passes through the lanes, counted: load once, rows with every try, tries again by their reason."""

from __future__ import annotations

import numpy as np

from cluster.core.descriptors import DType
from cluster.core.ids import ExpertId, Incarnation, Role
from cluster.core.routing_table import TableCopy
from cluster.telemetry.metrics import RouterMetrics
from router_service.core.segments import OnEnd, SegmentReply, SegmentRequest, Withdraw
from router_service.counted_lanes import CountedLanes

EXPERT = ExpertId("m", 0, 3)
ROWS, DIM = 5, 8


class SomeLanes:
    """Answers the copies in `quick`; the others never."""

    def __init__(self, quick: set[str]) -> None:
        self._quick = quick

    def begin(self, request: SegmentRequest, on_end: OnEnd) -> Withdraw:
        if request.copy.incarnation.actor_id in self._quick:
            rows = np.zeros_like(np.asarray(request.rows))
            copy = request.copy
            on_end(SegmentReply(rows, copy.incarnation, copy.version, copy.role, request.attempt, 0.0, 0.0, 0.0, "n", rows.nbytes, rows.nbytes))
        return lambda: None

    def burden(self, _actor_id: str) -> float:
        return 0.0


def asked(actor: str, attempt: int, *, is_hedge: bool = False) -> SegmentRequest:
    copy = TableCopy(Incarnation(actor, 1), "ab" * 32, Role.REPLICA)
    rows = np.zeros((ROWS, 2 * DIM), np.uint8)
    return SegmentRequest(EXPERT, copy, DType.BF16, DIM, rows, 1.0, exact=False, epoch=1, attempt=attempt, is_hedge=is_hedge)


def value(metrics: RouterMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_rows_of_a_hedge_and_of_the_try_that_loses_to_it_are_both_counted_as_sent() -> None:
    metrics = RouterMetrics()
    lanes = CountedLanes(SomeLanes({"quick"}), metrics)
    lanes.begin(asked("late", 0), lambda _outcome: None)
    lanes.begin(asked("quick", 1, is_hedge=True), lambda _outcome: None)
    assert value(metrics, "moe_link_bytes_total", direction="sent") == 2 * ROWS * 2 * DIM
    assert value(metrics, "moe_link_bytes_total", direction="received") == ROWS * 2 * DIM
    assert value(metrics, "moe_redispatches_total", reason="hedge") == 1
    assert lanes.take_loads() == {EXPERT: ROWS}
    assert lanes.take_loads() == {}
