"""What passes through the lanes, counted: load once, further tries by their reason; row bytes with every frame, whoever loses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from cluster.core.descriptors import DType
from cluster.core.ids import ExpertId, Incarnation, Role
from cluster.core.routing_table import TableCopy
from cluster.telemetry.metrics import RouterMetrics
from router_service.actor_health import ActorHealth
from router_service.core.liveness import Liveness
from router_service.core.segments import OnEnd, SegmentReply, SegmentRequest, Withdraw
from router_service.core.trust import Trust
from router_service.core.verdicts import LivenessLimits
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


def test_a_hedge_is_no_new_load_and_counts_as_a_further_try() -> None:
    metrics = RouterMetrics()
    lanes = CountedLanes(SomeLanes({"quick"}), metrics)
    lanes.begin(asked("late", 0), lambda _outcome: None)
    lanes.begin(asked("quick", 1, is_hedge=True), lambda _outcome: None)
    assert value(metrics, "moe_redispatches_total", reason="hedge") == 1
    assert lanes.take_loads() == {EXPERT: ROWS}
    assert lanes.take_loads() == {}


async def test_row_bytes_count_with_every_frame_whether_it_is_answered_or_not() -> None:
    metrics = RouterMetrics()
    health = ActorHealth(Liveness(LivenessLimits()), Trust(), metrics)
    lane: Any = SimpleNamespace(name="a/g1")
    health.sent(lane, ROWS, 80)
    health.sent(lane, ROWS, 80)
    health.answered(lane, ROWS, 80, 0.001)
    health.close()
    assert value(metrics, "moe_link_bytes_total", direction="sent") == 160
    assert value(metrics, "moe_link_bytes_total", direction="received") == 80
