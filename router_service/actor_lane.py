"""One actor as a router sees it: its lane of waiting rows, its link, and the loop that reconnects while the routing table names it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from functools import partial
from random import Random

import numpy as np

from cluster.core.errors import DeadlineExceeded, MoeError, ReplicaRejected, ReplicaUnavailable
from cluster.core.link_frames import Cool, Pong, Result, Warm
from cluster.core.link_limits import LinkLimits
from cluster.core.routing_table import ActorEndpoint
from router_service.core.balance import Pace
from router_service.core.batching import Lane, LaneLimits, PieceRows
from router_service.core.runs import TokenBudget
from router_service.core.segment_offer import offer_of
from router_service.core.segments import OnEnd, Rows, SegmentReply, SegmentRequest, Withdraw
from router_service.core.verdicts import State
from router_service.lane_watch import LaneWatch
from router_service.link_client import LinkClient, LinkPhase

_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 2.0
_SETTLED_S = 1.0
_LEAST_FRAME_S = 1e-4


@dataclass(frozen=True, slots=True)
class LinkState:
    """One link, for `status`: its phase, how fresh its signs of life are, what waits for it. `reason` says why it is not ready."""

    endpoint: ActorEndpoint
    phase: LinkPhase
    reason: str
    last_heard_age_s: float
    oldest_age_s: float
    queued_tokens: int
    frames_in_flight: int
    progress: Pong | None
    bytes_sent: int
    bytes_received: int
    num_connects: int
    standing: State = State.HEALTHY
    evidence: str = ""


@dataclass(slots=True, eq=False)
class _Waiter:
    """A segment that was begun, and what has come for it so far."""

    request: SegmentRequest
    rows: Rows
    on_end: OnEnd
    offered_s: float
    sent_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0
    answer: Rows | None = None


@dataclass(slots=True)
class _Totals:
    """Bytes of links that have ended."""

    sent: int = 0
    received: int = 0
    connects: int = 0


class ActorLane:
    """Rows to one incarnation of an actor. `start` opens the link and keeps it open; `retire` ends it after the last reply."""

    def __init__(self, endpoint: ActorEndpoint, key: bytes, *, router_id: str, limits: LinkLimits, budget: TokenBudget, rng: Random, watch: LaneWatch) -> None:
        self.endpoint = endpoint
        self.name = str(endpoint.incarnation)
        self._watch = watch
        self._key = key
        self._router_id = router_id
        self._limits = limits
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        own = LaneLimits(limits.max_tokens_per_frame, limits.max_frame_bytes, limits.frames_in_flight, limits.min_overlapping_tokens)
        self._lane = Lane(endpoint.incarnation.generation, own, budget)
        self._pace = Pace()
        self._waiters: dict[int, _Waiter] = {}
        self._link: LinkClient | None = None
        self._lost: asyncio.Future[None] = self._loop.create_future()
        self._reason = "connecting"
        self._may_wait = True
        self._is_pumping = False
        self._totals = _Totals()
        self._task: asyncio.Task[None] | None = None
        self.idle = asyncio.Event()
        self.settled = asyncio.Event()

    def start(self) -> None:
        """Begin to connect; rows may be submitted at once and wait for the first connection attempt."""
        self._task = self._loop.create_task(self._keep_connected(), name=f"link-{self.endpoint.incarnation}")

    @property
    def pending_tokens(self) -> int:
        """Rows that wait for a frame or are under way in one."""
        return self._lane.pending_tokens

    @property
    def burden(self) -> float:
        """About how long one more frame would take: what frames take of late, times those before it and itself."""
        num_before = self._lane.num_frames_in_flight + bool(self._lane.queued_tokens)
        return max(_LEAST_FRAME_S, self._pace.frame_s(self._loop.time())) * (1 + num_before)

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits here and no Result is due."""
        return self._lane.is_idle

    def state(self) -> LinkState:
        """How things stand."""
        link, now_s = self._link, self._loop.time()
        phase = link.phase if link is not None else (LinkPhase.CONNECTING if self._may_wait else LinkPhase.CLOSED)
        return LinkState(
            endpoint=self.endpoint,
            phase=phase,
            reason="" if phase is LinkPhase.READY else self._reason,
            last_heard_age_s=link.last_heard_age_s if link is not None else 0.0,
            oldest_age_s=self._lane.oldest_age_s(now_s),
            queued_tokens=self._lane.queued_tokens,
            frames_in_flight=self._lane.num_frames_in_flight,
            progress=link.progress if link is not None else None,
            bytes_sent=self._totals.sent + (link.bytes_sent if link is not None else 0),
            bytes_received=self._totals.received + (link.bytes_received if link is not None else 0),
            num_connects=self._totals.connects,
        )

    def begin(self, request: SegmentRequest, on_end: OnEnd) -> Withdraw:
        """Begin to carry one segment; see `Lanes.begin`."""
        try:
            self._check_open()
            rows, offer = offer_of(request)
            now_s = self._loop.time()
            run_id = self._lane.offer(offer, now_s)
        except MoeError as error:
            on_end(error)
            return nothing
        self._waiters[run_id] = _Waiter(request, rows, on_end, now_s)
        self.idle.clear()
        self._pump_soon()
        return partial(self._withdraw, run_id)

    def eject(self, reason: str) -> None:
        """Nobody here waits any longer: all rows may go elsewhere. What is under way still counts in the actor's window, and its answer as a sign of life."""
        for run_id in self._lane.abandon():
            self._fail(run_id, ReplicaUnavailable(reason))
        self._settle()

    def try_again(self) -> bool:
        """The actor is on trial. False: what it never answered holds its window still, so the link is made anew, and the trial begins when it is ready."""
        if self._link is None or not self._lane.num_frames_in_flight:
            return self._link is not None
        self._reason = "being made anew after an ejection"
        self._link.close()
        self._end_link()
        self._lose_all(ReplicaUnavailable(self._reason))
        return False

    def probe(self) -> None:
        """Ask the actor for its progress."""
        if self._link is not None:
            self._link.probe()

    def hint(self, hint: Warm | Cool) -> None:
        """Hint that rows for a shadow are likely, or not any more."""
        if self._link is not None and self._link.phase is LinkPhase.READY and (isinstance(hint, Warm) or self._link.knows_cool):
            self._link.send(hint)

    async def retire(self, reason: str, timeout_s: float) -> None:
        """Leave after the last reply, or after `timeout_s` without it. Whoever still waits then gets ReplicaUnavailable."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._lane.is_idle:
                    self.idle.clear()
                    await self.idle.wait()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._link is not None:
            self._link.leave(reason)
            self._end_link()
        self.settled.set()
        self._watch.left(self)
        self._lose_all(ReplicaUnavailable(f"the router left {self.endpoint.incarnation}: {reason}"))

    def _check_open(self) -> None:
        """Rows may wait for the first connection, never for a repeated one: another copy is faster."""
        if self._link is None and not self._may_wait:
            message = f"no link to {self.endpoint.incarnation}: {self._reason}"
            raise ReplicaUnavailable(message)
        if self._link is not None and self._link.phase is not LinkPhase.READY:
            message = f"{self.endpoint.incarnation} takes no more rows: {self._reason}"
            raise ReplicaRejected(message)

    def _pump_soon(self) -> None:
        """Send in the next turn of the loop, so that all segments submitted in this one share a frame."""
        if not self._is_pumping:
            self._is_pumping = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._is_pumping = False
        now_s = self._loop.time()
        while self._lane.queued_tokens and self._may_send() and (plan := self._lane.next_frame(now_s)) is not None:
            rows = []
            for run_id, start, stop in plan.pieces:
                waiter = self._waiters[run_id]
                waiter.sent_s = waiter.sent_s or now_s
                rows.append(waiter.rows[start:stop].data)
            self._watch.sent(self, plan.num_tokens, plan.num_bytes)
            assert self._link is not None  # noqa: S101  (else nothing may be sent)
            self._link.send(plan.forward, rows)
        for run_id in self._lane.expire(now_s):
            self._fail(run_id, DeadlineExceeded(f"the deadline passed while rows waited for {self.endpoint.incarnation}"))

    def _may_send(self) -> bool:
        return self._link is not None and self._link.phase is LinkPhase.READY and self._watch.may_send(self)

    def _withdraw(self, run_id: int) -> None:
        self._waiters.pop(run_id, None)
        for cancel in self._lane.withdraw(run_id):
            if self._link is not None:
                self._link.send(cancel)
        self._settle()

    def _on_result(self, result: Result, body: memoryview) -> None:
        now_s = self._loop.time()
        outcome = self._lane.frame_done(result, now_s)
        if outcome.num_tokens:
            self._pace.learn(outcome.took_s, now_s)
            self._watch.answered(self, outcome.num_tokens, len(body), outcome.took_s)
        if outcome.rows:
            received = np.frombuffer(body, np.uint8)
            for piece in outcome.rows:
                self._deliver(piece, result, received, now_s)
        for run_id, error in outcome.failed:
            self._fail(run_id, error)
        if self._lane.queued_tokens:
            self._pump_soon()
        self._settle()

    def _deliver(self, piece: PieceRows, result: Result, body: Rows, now_s: float) -> None:
        """Rows in one piece are a view of the frame's body; those of a run that was cut are copied together."""
        waiter = self._waiters[piece.run_id]
        num_rows, row_bytes = piece.stop - piece.start, waiter.rows.shape[1]
        rows = body[piece.offset_bytes : piece.offset_bytes + num_rows * row_bytes].reshape(num_rows, row_bytes)
        if num_rows == len(waiter.rows):
            waiter.answer = rows
        else:
            if waiter.answer is None:
                waiter.answer = np.empty_like(waiter.rows)
            waiter.answer[piece.start : piece.stop] = rows
        waiter.queue_s = max(waiter.queue_s, result.queue_s)
        waiter.compute_s += result.compute_s
        if piece.is_complete:
            del self._waiters[piece.run_id]
            waiter.on_end(self._reply(waiter, now_s))

    def _reply(self, waiter: _Waiter, now_s: float) -> SegmentReply:
        request, answer = waiter.request, waiter.answer
        assert answer is not None  # noqa: S101  (a complete run has rows)
        return SegmentReply(
            rows=answer,
            incarnation=self.endpoint.incarnation,
            version=request.copy.version,
            role=request.copy.role,
            attempt=request.attempt,
            queue_s=waiter.sent_s - waiter.offered_s + waiter.queue_s,
            compute_s=waiter.compute_s,
            transfer_s=max(0.0, now_s - waiter.sent_s - waiter.queue_s - waiter.compute_s),
            node_id=self.endpoint.node_id,
            bytes_sent=waiter.rows.nbytes,
            bytes_received=answer.nbytes,
        )

    def _fail(self, run_id: int, error: MoeError) -> None:
        """Each caller gets an exception of its own: a traceback belongs to one task."""
        waiter = self._waiters.pop(run_id, None)
        if waiter is not None:
            waiter.on_end(type(error)(f"{self.endpoint.incarnation}: {error}"))

    def _lose_all(self, error: MoeError) -> None:
        for run_id in self._lane.lose():
            self._fail(run_id, error)
        self.idle.set()

    def _settle(self) -> None:
        """After anything ended: an idle lane may be left, and an actor that said goodbye is."""
        if not self._lane.is_idle:
            return
        self.idle.set()
        if self._link is not None and self._link.phase is LinkPhase.DRAINING:
            self._link.leave("drained")
            self._end_link()

    def _on_goodbye(self, reason: str) -> None:
        self._reason = f"it said goodbye ({reason})"
        for run_id in self._lane.turn_away():
            self._fail(run_id, ReplicaUnavailable(self._reason))
        self._settle()

    def _on_lost(self, error: MoeError) -> None:
        """Tell everybody at once: each of them may have another copy to turn to."""
        self._reason = str(error)
        if self._link is not None:
            self._watch.lost(self)
        self._end_link()
        self._lose_all(ReplicaUnavailable(self._reason))

    def _end_link(self) -> None:
        if self._link is not None:
            self._totals.sent += self._link.bytes_sent
            self._totals.received += self._link.bytes_received
            self._link = None
        self._may_wait = False
        if not self._lost.done():
            self._lost.set_result(None)

    async def _keep_connected(self) -> None:
        """Connect again and again, ever more slowly while it fails; ends when `retire` cancels it."""
        num_failures = 0
        while True:
            opened_s = self._loop.time()
            self._lost = self._loop.create_future()
            try:
                link = await self._connect()
            except MoeError as error:
                self._on_lost(error)
            else:
                self._use(link)
                await self._lost
            self.settled.set()
            num_failures = 0 if self._loop.time() - opened_s > self._limits.connect_timeout_s + _SETTLED_S else num_failures + 1
            await asyncio.sleep(self._backoff_s(num_failures))

    async def _connect(self) -> LinkClient:
        return await LinkClient.connect(
            self.endpoint,
            self._key,
            router_id=self._router_id,
            limits=self._limits,
            on_result=self._on_result,
            on_lost=self._on_lost,
            on_goodbye=self._on_goodbye,
            on_progress=self._on_progress,
        )

    def _on_progress(self, progress: Pong) -> None:
        self._watch.heard(self, progress)

    def _use(self, link: LinkClient) -> None:
        self._totals.connects += 1
        if self._lost.done() or link.welcome is None:  # it was lost while this task waited for its turn
            return
        welcome, own = link.welcome, self._limits
        max_frame_bytes, overlap = min(welcome.max_frame_bytes, own.max_frame_bytes), min(own.min_overlapping_tokens, welcome.max_tokens_per_frame)
        self._lane.set_limits(LaneLimits(welcome.max_tokens_per_frame, max_frame_bytes, welcome.frames_in_flight, overlap))
        self._link = link
        self._watch.joined(self)
        self.settled.set()
        self._pump_soon()
        self._settle()

    def _backoff_s(self, num_failures: int) -> float:
        """Exponential with jitter, so that routers do not come back in step."""
        ceiling_s = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(num_failures, 10))
        return ceiling_s * (0.5 + 0.5 * self._rng.random())


def nothing() -> None:
    """Withdraws what never began."""
