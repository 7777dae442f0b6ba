"""A router's data path in a simulation: the real lanes, flights, liveness and hedging, on links to simulated actors; it hears the controller late at times."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from cluster.core.descriptors import DType
from cluster.core.errors import DataLoss, ExpertUnavailable, MoeError, Overloaded
from cluster.core.health import LinkReport, Wrong
from cluster.core.ids import CopyId, ExpertId
from cluster.core.link_limits import LinkLimits
from cluster.core.routing_table import RoutingTable, TableCopy, newer
from cluster.telemetry.tracing import Tracing
from kit.sim_actors import COLUMNS, MAX_TOKENS, OVERFLOWS, WINDOW
from kit.sim_control import SimController
from router_service.actor_health import ActorHealth
from router_service.core.dispatch import DispatchOrder, ExpertRows
from router_service.core.doubt import bad_rows
from router_service.core.hedging import HedgeBudget, Lateness
from router_service.core.liveness import Liveness
from router_service.core.segments import OnEnd, SegmentReply, SegmentRequest, Withdraw
from router_service.core.trust import Trust
from router_service.core.verdicts import LivenessLimits, State, Verdict
from router_service.dispatcher import Dispatcher, Hedging, Job
from router_service.lanes import Lanes
from router_service.link_client import LinkPhase
from router_service.recheck import recheck

ROUTER_ID = "router-0"
BUDGET_FRACTION = 0.05
BURST_ROWS = 2 * MAX_TOKENS
HEAR_S, REPORT_S = 0.02, 1.0


class Recorder:
    """Who is told what happens in a router, to check it: what it asks, what it is answered, whom it accuses."""

    def asked(self, request: SegmentRequest) -> None: ...

    def ended(self, request: SegmentRequest, outcome: SegmentReply | MoeError) -> None: ...

    def judged(self, verdicts: Sequence[Verdict]) -> None: ...

    def accused(self, expert: ExpertId, copy: TableCopy, kind: str) -> None: ...

    def replies_of(self, number: int) -> dict[int, SegmentReply]: ...


class _WatchedLiveness(Liveness):
    recorder: Recorder

    def tick(self, now_s: float, *, late_s: float) -> list[Verdict]:
        return self._told(super().tick(now_s, late_s=late_s))

    def lost(self, actor: str, now_s: float) -> list[Verdict]:
        return self._told(super().lost(actor, now_s))

    def _told(self, verdicts: list[Verdict]) -> list[Verdict]:
        if verdicts:
            self.recorder.judged(verdicts)
        return verdicts


class _WatchedTrust(Trust):
    recorder: Recorder

    def accuse(self, expert: ExpertId, copy: TableCopy, kind: str, *, by: str, now_s: float) -> bool:
        self.recorder.accused(expert, copy, kind)
        return super().accuse(expert, copy, kind, by=by, now_s=now_s)


class _WatchedLanes:
    """The lanes, with a recorder on what goes in and what comes out."""

    def __init__(self, lanes: Lanes, recorder: Recorder) -> None:
        self._lanes, self._recorder = lanes, recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lanes, name)

    def begin(self, request: SegmentRequest, on_end: OnEnd) -> Withdraw:
        self._recorder.asked(request)

        def ended(outcome: SegmentReply | MoeError) -> None:
            self._recorder.ended(request, outcome)
            on_end(outcome)

        return self._lanes.begin(request, ended)


@dataclass
class Request:
    """One call and how it ended: `ok`, `unavailable`, `data_loss` or `deadline`."""

    number: int
    layer: int
    rows_of: dict[int, int]
    exact: bool
    overflows: bool
    begun_s: float
    deadline_s: float
    table: RoutingTable
    outcome: str = ""
    ended_s: float = 0.0
    lost: set[int] = field(default_factory=set)
    replies: dict[int, SegmentReply] = field(default_factory=dict)
    doubted: bool = False


class SimRouter:
    """One router. `stale_until_s`: until then it hears no new table."""

    def __init__(self, controller: SimController, recorder: Recorder, rng: Random, *, limits: LivenessLimits | None = None) -> None:
        self.controller, self.rng, self._recorder = controller, rng, recorder
        self.loop = asyncio.get_running_loop()
        self.table: RoutingTable | None = None
        self.stale_until_s = -math.inf
        self.liveness = _WatchedLiveness(limits or LivenessLimits())
        self.trust = _WatchedTrust()
        self.liveness.recorder = self.trust.recorder = recorder
        self.health = ActorHealth(self.liveness, self.trust)
        own = LinkLimits(max_tokens_per_frame=MAX_TOKENS, frames_in_flight=WINDOW, connect_timeout_s=0.5)
        self.lanes = Lanes(router_id=ROUTER_ID, link_secret=b"s" * 32, limits=own, drain_timeout_s=1.0, rng=rng, watch=self.health)
        self.budget = HedgeBudget(BUDGET_FRACTION, BURST_ROWS)
        hedging = Hedging(Lateness(0.99, 0.01), self.budget, standstill_s=self.health.standstill_s)
        lanes = _WatchedLanes(self.lanes, recorder)
        self.dispatcher = Dispatcher(lanes, lambda: self.table, rng, tracing=Tracing.disabled(), trust=self.trust, hedging=hedging, shadows=self.health)
        self.health.on_pulse = self.dispatcher.pulse
        self.health.start()
        self._next_report_s = 0.0
        self.on_table: Callable[[RoutingTable], None] = lambda _: None

    async def hear(self) -> None:
        """Take newer tables and report, for ever."""
        while True:
            await asyncio.sleep(HEAR_S)
            now_s, table = self.loop.time(), self.controller.table
            if table is not None and not self.controller.is_paused and now_s >= self.stale_until_s and (self.table is None or table.epoch > self.table.epoch):
                table = newer(self.table, table)
                await self.lanes.apply(table)
                await self.lanes.wait_until_settled(0.2)
                self.table = table
                self.health.adopt(table)
                self.on_table(table)
            if self.table is not None and (self.health.changed.is_set() or now_s >= self._next_report_s):
                self._report(self.table, now_s)

    def linked(self) -> list[str]:
        """The lives that liveness knows."""
        return list(self.liveness._watches)

    def _report(self, table: RoutingTable, now_s: float) -> None:
        links = []
        for link in self.lanes.status():
            standing = self.liveness.state(str(link.endpoint.incarnation))
            links.append(
                LinkReport(
                    link.endpoint.incarnation,
                    is_connected=link.phase is not LinkPhase.CLOSED,
                    is_ejected=standing is State.EJECTED,
                    is_suspected=standing is State.SUSPECTED,
                    oldest_age_s=link.oldest_age_s,
                    queued_tokens=link.queued_tokens,
                )
            )
        wrong = [Wrong(copy.incarnation, CopyId(expert, copy.version, copy.role), kind) for expert, copy, kind in self.trust.take_accusations()]
        if self.controller.report(ROUTER_ID, table.epoch, links, wrong):
            self.health.changed.clear()
            self._next_report_s = now_s + REPORT_S

    async def call(self, request: Request) -> Request:
        """One layer's call, from its choices on, as the pipeline makes it."""
        job = _job(request)
        request.replies = job.replies = self._recorder.replies_of(request.number)
        try:
            async with asyncio.timeout_at(request.deadline_s):
                await self._answer(job, request)
        except TimeoutError:
            request.outcome = "deadline"
            request.lost = {index for index in request.rows_of if index not in job.replies}
        except ExpertUnavailable:
            request.outcome = "unavailable"
        except DataLoss:
            request.outcome = "data_loss"
        except Overloaded:
            request.outcome = "overloaded"
        else:
            request.outcome = "ok"
        request.ended_s = self.loop.time()
        return request

    async def _answer(self, job: Job, request: Request) -> None:
        lost = await self.dispatcher.run(job)
        while True:
            request.lost = set(lost)
            if lost:
                message = "no copy answered"
                raise ExpertUnavailable(message)
            if all(not bad_rows(reply.rows, job.dtype).size for reply in job.replies.values()):
                return
            found = await recheck(self.dispatcher, job, lost)
            if found is None:
                return
            lost = found


def _job(request: Request) -> Job:
    experts, start = [], 0
    for index, num_rows in sorted(request.rows_of.items()):
        experts.append(ExpertRows(index, start, start + num_rows))
        start += num_rows
    rows = np.zeros((start, COLUMNS), np.int32)
    rows[:, 0], rows[:, 1] = request.number, np.arange(start)
    rows[:, 2] = OVERFLOWS if request.overflows else 0
    order = DispatchOrder(tuple(experts), np.arange(start), np.arange(start).reshape(-1, 1))
    model = next(iter(request.table.models))
    uses_shadows = not request.exact and "shadow" in request.table.models[model].ladder
    return Job(
        model=model,
        layer=request.layer,
        dtype=DType.FP32,
        width=COLUMNS,
        order=order,
        rows_NB=rows.view(np.uint8),
        table=request.table,
        deadline_s=request.deadline_s,
        exact=request.exact,
        uses_shadows=uses_shadows,
        tenant=f"tenant-{request.number % 7}",
    )
