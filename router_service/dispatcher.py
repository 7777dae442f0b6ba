"""Carries out flights: what `core.flight` orders is sent through the lanes, and what the lanes bring is told to it. One call at a time is a `Job`.

Rows that are late are hedged by `pulse`, which the router's pulse calls; the flight, the hedge budget and the balancer decide.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.core.descriptors import DType
from cluster.core.errors import MoeError, ReplicaCorrupt, ReplicaError, ReplicaUnavailable
from cluster.core.ids import ExpertId, Role
from cluster.core.routing_table import RoutingTable, TableCopy
from cluster.telemetry.tracing import Tracing
from router_service.core.balance import pick_copy
from router_service.core.dispatch import DispatchOrder
from router_service.core.flight import Flight, Send, Why
from router_service.core.hedging import HedgeBudget, Lateness
from router_service.core.segments import OnEnd, SegmentReply, SegmentRequest, Withdraw
from router_service.core.trust import Trust
from router_service.dispatch_spans import DispatchSpans

MAX_REASON_CHARACTERS = 160


class LanesPort(Protocol):
    """What dispatch needs of the lanes to the actors."""

    def begin(self, request: SegmentRequest, on_end: OnEnd) -> Withdraw:
        """Begin to compute one segment; `on_end` gets its reply, or ReplicaError when this copy does not answer. What this gives withdraws the rows."""
        ...

    def burden(self, actor_id: str) -> float:
        """About how long one more frame would take at an actor."""
        ...


class ShadowsPort(Protocol):
    """Who has shadows made ready. Each `warm` is followed by one `release`."""

    def warm(self, expert: ExpertId, shadow: TableCopy) -> None:
        """Rows that this shadow may have to answer are under way."""
        ...

    def release(self, expert: ExpertId, shadow: TableCopy, *, is_back: bool) -> None:
        """They have ended; `is_back`: a replica answered them."""
        ...


class NoShadows:
    """Nothing is made ready before it is asked."""

    def warm(self, expert: ExpertId, shadow: TableCopy) -> None:
        """Ignored."""

    def release(self, expert: ExpertId, shadow: TableCopy, *, is_back: bool) -> None:
        """Ignored."""


@dataclass(slots=True, eq=False)
class Job:
    """One call's rows for its experts, sorted by expert, and the replies as they come, by expert index.

    `uses_shadows`: a shadow may answer where no replica does. `may_lose`: what nobody answers is not the end of the call. `trace`: the call's
    traceparent, empty when it is not recorded. `tenant` is whose rows they are. `avoid`: by expert index, copies that gave it numbers that are not finite.
    `is_again`: its rows were sent before, in a job that failed or was not believed.
    """

    model: str
    layer: int
    dtype: DType
    width: int
    order: DispatchOrder
    rows_NB: NDArray[np.uint8]
    table: RoutingTable
    deadline_s: float
    exact: bool = False
    uses_shadows: bool = True
    may_lose: bool = False
    trace: str = ""
    tenant: str = ""
    is_again: bool = False
    num_rechecks: int = 0
    avoid: dict[int, set[TableCopy]] = field(default_factory=dict)
    replies: dict[int, SegmentReply] = field(default_factory=dict)

    def expert(self, index: int) -> ExpertId:
        """An expert of the call's layer."""
        return ExpertId(self.model, self.layer, index)


@dataclass(frozen=True, slots=True)
class Hedging:
    """When rows are late, and how many may be sent twice for it.

    A shadow's answer is not exact, so it is asked only where the actor that has the rows stands still, by `standstill_s(incarnation, now_s)`: one that
    is merely busy keeps them, though not for ever. Where that is not known (None), lateness itself counts.
    """

    lateness: Lateness
    budget: HedgeBudget
    min_shadow_delay_s: float = 0.0
    standstill_s: Callable[[str, float], float | None] = lambda _actor, _now_s: None

    def charge(self, late_s: float, still_s: float | None, num_rows: int, other: TableCopy) -> bool:
        """Whether rows that are late by so much, at an actor that stands still for `still_s`, may be sent to this other copy, too; if so they are charged."""
        is_due = other.role is Role.REPLICA or self._is_shadow_due(late_s, still_s, num_rows)
        return is_due and self.budget.take(num_rows)

    def is_near(self, late_s: float, still_s: float | None, num_rows: int, other: TableCopy) -> bool:
        """Whether this other copy is a shadow that such rows may soon be sent to, so that it should be expanded by then.

        Not from the first moment: a hundredth of all rows are late, and expanding shadows for those would cost their holders more than it saves.
        """
        waited_s = late_s if still_s is None else still_s
        return other.role is Role.SHADOW and self.min_shadow_delay_s / 2 <= waited_s < self._shadow_delay_s(num_rows)

    def _is_shadow_due(self, late_s: float, still_s: float | None, num_rows: int) -> bool:
        delay_s = self._shadow_delay_s(num_rows)
        return (late_s if still_s is None else still_s) >= delay_s or late_s >= _BUSY_PATIENCE * delay_s

    def _shadow_delay_s(self, num_rows: int) -> float:
        return max(self.min_shadow_delay_s, _SHADOW_PATIENCE * self.lateness.delay_s(num_rows))


class Dispatcher:
    """Gets an answer for every expert of a call. `table` is the newest one: a copy published meanwhile may be asked in the place of a lost one."""

    def __init__(
        self,
        lanes: LanesPort,
        table: Callable[[], RoutingTable | None],
        rng: random.Random,
        *,
        tracing: Tracing,
        trust: Trust | None = None,
        hedging: Hedging | None = None,
        shadows: ShadowsPort | None = None,
    ) -> None:
        """Without `hedging` nothing is sent twice because it is late; without `shadows` none is made ready for it."""
        self.lanes = lanes
        self.table = table
        self.rng = rng
        self.tracing = tracing
        self.trust = trust or Trust()
        self.hedging = hedging
        self.shadows = shadows or NoShadows()
        self.stalled_s = 0.0
        self._due: list[tuple[float, int, _UnderWay]] = []
        self._num_due = 0

    async def run(self, job: Job) -> Mapping[int, str]:
        """Ask until every expert answered or has nobody left to ask; why, by expert index, for the latter. The answers are in `job.replies`.

        Nothing is sent when an expert has no copy at all, unless the job may lose it. Raises what else ends a segment, as Overloaded. The caller
        bounds the time; cancelling withdraws the rows.
        """
        return await _UnderWay(self, job).run()

    def pulse(self, now_s: float, late_s: float = 0.0) -> None:
        """Hedge what is late by now. `late_s` of the time since the last pulse this process did not run: no rows are late for that."""
        self.stalled_s += late_s
        while self._due and self._due[0][0] <= now_s:
            heapq.heappop(self._due)[2].look(now_s)

    def watch(self, under_way: _UnderWay, due_s: float) -> None:
        """Have `pulse` look at a call at this time."""
        self._num_due += 1
        heapq.heappush(self._due, (due_s, self._num_due, under_way))

    def pick(self, job: Job, expert: ExpertId, tried: Sequence[TableCopy]) -> TableCopy | None:
        """The next copy to ask: from the call's own table first, later from the newest one."""
        table = (self.table() or job.table) if tried else job.table
        rank = None if self.trust.is_calm else partial(self.trust.rank, expert)
        if job.avoid:
            tried = [*tried, *job.avoid.get(expert.index, ())]
        return pick_copy(table.copies_of(expert), tried=tried, exact=not job.uses_shadows, burden=self.lanes.burden, rng=self.rng, rank=rank)


class _UnderWay:
    """One job from its first order to its last answer."""

    def __init__(self, desk: Dispatcher, job: Job) -> None:
        self._desk = desk
        self._job = job
        self._loop = asyncio.get_running_loop()
        self._experts = {rows.index: job.expert(rows.index) for rows in job.order.experts}
        # Not a method of this object: that would be a cycle, which keeps every row of the call until the garbage collector comes by.
        pick = partial(_pick, desk, job, self._experts)
        self._flight = Flight(job.order.experts, pick, kind="full-precision copies" if job.exact else "copies")
        self._withdraws: dict[tuple[int, int], Withdraw] = {}
        self._sent_s: dict[tuple[int, int], float] = {}
        self._warmed: dict[int, TableCopy] = {}
        self._done: asyncio.Future[None] | None = None
        self._error: MoeError | None = None
        self._spans = DispatchSpans(desk.tracing, job.trace, layer=job.layer, epoch=job.table.epoch) if job.trace else None
        self._has_ended = False

    async def run(self) -> Mapping[int, str]:
        flight = self._flight
        orders = flight.begin()
        if flight.lost and not self._job.may_lose:
            return flight.lost
        try:
            by_actor: dict[str, list[Send]] = {}
            for order in orders:
                by_actor.setdefault(order.copy.incarnation.actor_id, []).append(order)
            for actor_id in sorted(by_actor):
                self._send(by_actor[actor_id])
            if self._error is None and not flight.has_ended:
                self._done = self._loop.create_future()
                self._watch_first()
                await self._done
            self._check()
        except BaseException as error:  # kept in no variable of this frame: that would be a cycle
            self._close(error)
            raise
        self._close(None)
        return flight.lost

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def look(self, now_s: float) -> None:
        """Hedge the parts that are late; come back for the others."""
        hedging = self._desk.hedging
        if self._has_ended or hedging is None:
            return
        for number, part in enumerate(self._flight.parts):
            if not self._flight.can_hedge(number):
                continue
            attempt, copy = next(iter(part.live.items()))
            late_s = now_s - self._desk.stalled_s - self._sent_s[number, attempt]
            if late_s < hedging.lateness.delay_s(part.rows.num_rows):
                continue
            still_s = hedging.standstill_s(str(copy.incarnation), now_s)
            if (order := self._flight.hedge(number, partial(self._charge, hedging, number, late_s, still_s))) is not None:
                self._send([order])
        self._watch()

    def _charge(self, hedging: Hedging, number: int, late_s: float, still_s: float | None, num_rows: int, other: TableCopy) -> bool:
        """Whether a late part may be sent to this other copy, too. A shadow is made ready for it, once: before its time where that is seen to come."""
        may_send = hedging.charge(late_s, still_s, num_rows, other)
        is_wanted = may_send or hedging.is_near(late_s, still_s, num_rows, other)
        if is_wanted and other.role is Role.SHADOW and number not in self._warmed:
            self._warmed[number] = other
            self._desk.shadows.warm(self._experts[self._flight.parts[number].rows.index], other)
        return may_send

    def _release(self, number: int, *, is_back: bool) -> None:
        """The shadow that was made ready for a part, if any, is not waited for any more."""
        shadow = self._warmed.pop(number, None)
        if shadow is not None:
            self._desk.shadows.release(self._experts[self._flight.parts[number].rows.index], shadow, is_back=is_back)

    def _watch(self) -> None:
        """Be looked at when the first of the parts that wait alone is late."""
        hedging = self._desk.hedging
        if hedging is None or self._has_ended:
            return
        now_s = self._loop.time()
        due_s = [
            self._sent_s[number, next(iter(part.live))] + hedging.lateness.delay_s(part.rows.num_rows)
            for number, part in enumerate(self._flight.parts)
            if self._flight.can_hedge(number)
        ]
        if due_s:
            self._desk.watch(self, max(min(due_s) + self._desk.stalled_s, now_s + _LOOK_AGAIN_S))

    def _watch_first(self) -> None:
        """Nothing is late before the least delay, and most calls have ended by then: until then no delay is worked out."""
        hedging = self._desk.hedging
        if hedging is not None:
            self._desk.watch(self, self._loop.time() + hedging.lateness.min_delay_s)

    def _send(self, orders: Sequence[Send]) -> None:
        """Carry out orders to one actor."""
        traceparent = (self._spans.asking(orders) or None) if self._spans is not None else None
        job, desk, parts = self._job, self._desk, self._flight.parts
        sent_s = self._loop.time() - desk.stalled_s
        begin, deadline_s, rows_NB = desk.lanes.begin, job.deadline_s, job.rows_NB
        for order in orders:
            if self._has_ended or self._error is not None:
                return
            part = parts[order.part]
            rows = part.rows
            key = (order.part, order.attempt)
            request = SegmentRequest(
                expert=self._experts[rows.index],
                copy=order.copy,
                dtype=job.dtype,
                dim=job.width,
                rows=rows_NB[rows.start : rows.stop],
                deadline_s=deadline_s,
                exact=job.exact,
                epoch=job.table.epoch,
                attempt=order.attempt,
                traceparent=traceparent,
                flow=id(self),
                is_hedge=order.why is Why.HEDGE,
                is_again=job.is_again,
            )
            if desk.hedging is not None and order.why is not Why.HEDGE:  # hedges were charged
                is_first = order.why is Why.FIRST and not job.is_again
                (desk.hedging.budget.asked if is_first else desk.hedging.budget.resent)(rows.num_rows)
            self._sent_s[key] = sent_s
            withdraw = begin(request, partial(self._ended, key))
            if order.attempt in part.live:
                self._withdraws[key] = withdraw

    def _ended(self, key: tuple[int, int], outcome: SegmentReply | MoeError) -> None:
        """A try ended: take its answer, or ask another copy at once."""
        if self._has_ended:
            return
        self._withdraws.pop(key, None)
        if isinstance(outcome, SegmentReply):
            self._take(key, outcome)
        elif isinstance(outcome, ReplicaError):
            self._fail_over(key, outcome)
        else:
            self._error = outcome
        if self._done is not None and not self._done.done() and (self._error is not None or self._flight.has_ended):
            self._done.set_result(None)

    def _take(self, key: tuple[int, int], reply: SegmentReply) -> None:
        losers = self._flight.answered(*key)
        if losers is None:
            return
        hedging, rows = self._desk.hedging, self._flight.parts[key[0]].rows
        if hedging is not None:
            now_s = self._loop.time()
            for attempt in (key[1], *losers):  # also of those who lost: else only the fast would be seen
                hedging.lateness.observe(rows.num_rows, now_s - self._desk.stalled_s - self._sent_s[key[0], attempt], now_s)
        self._job.replies[rows.index] = reply
        if self._spans is not None:
            self._spans.answered(*key, reply)
        for attempt in losers:
            self._withdraws.pop((key[0], attempt))()
        self._release(key[0], is_back=reply.role is Role.REPLICA)

    def _fail_over(self, key: tuple[int, int], error: ReplicaError) -> None:
        part = self._flight.parts[key[0]]
        if isinstance(error, ReplicaCorrupt):
            self._desk.trust.accuse(self._experts[part.rows.index], part.tried[key[1]], "checksum", by=self._job.tenant, now_s=self._loop.time())
        if self._spans is not None:
            self._spans.failed(*key, error)
        order = self._flight.failed(*key, _words(error))
        if order is not None:
            self._send([order])

    def _close(self, error: BaseException | None) -> None:
        """Nobody waits any more: withdraw what is under way, let go of the rows."""
        self._has_ended = True
        for part, attempt in self._flight.withdraw_all():
            withdraw = self._withdraws.pop((part, attempt), None)
            if withdraw is not None:
                withdraw()
        for number in tuple(self._warmed):
            self._release(number, is_back=False)
        if self._spans is not None:
            self._spans.end(error)


_LOOK_AGAIN_S = 0.005
# On a machine that is merely busy a shadow is no faster, and its answer is not exact.
_SHADOW_PATIENCE = 1.5
# Rows whose answers never come from an actor that advances (its replies are lost, others' rows go first) go to a shadow after so many times as long.
_BUSY_PATIENCE = 4.0


def _pick(desk: Dispatcher, job: Job, experts: Mapping[int, ExpertId], index: int, tried: Sequence[TableCopy]) -> TableCopy | None:
    return desk.pick(job, experts[index], tried)


def _words(error: ReplicaError) -> str:
    """Why a copy did not answer, for the caller: a link's own words hold addresses, which are nobody's business out there."""
    text = "its link was lost or could not be made" if isinstance(error, ReplicaUnavailable) else str(error)[:MAX_REASON_CHARACTERS]
    return f"{error.reason}: {text}"
