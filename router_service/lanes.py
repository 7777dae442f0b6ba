"""All lanes of a router: one for each incarnation in the routing table. The pipeline submits segments here; rows of many requests leave together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from random import Random

from cluster.core.errors import DeadlineExceeded, MoeError, NotReady, ReplicaUnavailable
from cluster.core.ids import Incarnation
from cluster.core.link_frames import derive_link_key
from cluster.core.link_limits import LinkLimits
from cluster.core.routing_table import ActorEndpoint, RoutingTable
from router_service.actor_lane import ActorLane, LinkState, nothing
from router_service.core.runs import TokenBudget
from router_service.core.segments import OnEnd, SegmentReply, SegmentRequest, Withdraw
from router_service.lane_watch import LaneWatch, NoWatch

__all__ = ["Lanes", "LinkState", "SegmentReply", "SegmentRequest"]

_LINGER_S = 1.0


class Lanes:
    """Links to every actor of the newest table, and what waits for them. Belongs to one event loop."""

    def __init__(
        self,
        *,
        router_id: str,
        link_secret: bytes,
        limits: LinkLimits | None = None,
        max_queued_tokens: int = 262_144,
        drain_timeout_s: float = 10.0,
        rng: Random | None = None,
        watch: LaneWatch | None = None,
    ) -> None:
        """`watch` is told of every actor's signs of life."""
        self._router_id = router_id
        self._link_secret = link_secret
        self._limits = limits or LinkLimits()
        self._budget = TokenBudget(max_queued_tokens)
        self._drain_timeout_s = drain_timeout_s
        self._rng = rng or Random()  # noqa: S311  (jitter, not a secret)
        self._watch = watch or NoWatch()
        self._lanes: dict[Incarnation, ActorLane] = {}
        self._by_actor: dict[str, ActorLane] = {}
        self._leaving: dict[ActorLane, asyncio.Task[None]] = {}
        self._is_closed = False

    async def apply(self, table: RoutingTable) -> None:
        """Open links to the table's new endpoints, leave those it no longer names after their last reply. Waits for neither."""
        wanted = {endpoint.incarnation: endpoint for endpoint in table.actors.values()}
        for incarnation, lane in list(self._lanes.items()):
            if wanted.get(incarnation) != lane.endpoint:
                del self._lanes[incarnation]
                self._leave(lane, "the routing table no longer names this actor")
        if not self._is_closed:
            self._open_missing(wanted)
        self._by_actor = {incarnation.actor_id: lane for incarnation, lane in self._lanes.items()}

    async def wait_until_settled(self, timeout_s: float) -> bool:
        """Wait until every link is ready or has failed once; False when the time was too short."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                for lane in tuple(self._lanes.values()):
                    await lane.settled.wait()
                return True
        return False

    def begin(self, request: SegmentRequest, on_end: OnEnd) -> Withdraw:
        """Begin to carry rows to one copy; `on_end` is called once with its output or an error, maybe at once. Calling what this gives withdraws the rows.

        Errors: ReplicaRejected (the copy refuses), ReplicaUnavailable (no link, it was lost, or the actor was ejected), ReplicaFaulted (its forward
        raised), ReplicaCorrupt (wrong numbers), DeadlineExceeded, Overloaded (too many rows wait, with the time to wait), InvalidRequest (rows that are
        not what they say); never by itself because time passes while a frame is under way: the caller keeps the deadline.
        Raises NotReady when the router is stopping.
        """
        lane = self._lane_of(request.copy.incarnation)
        if lane is None:
            on_end(ReplicaUnavailable(f"{request.copy.incarnation} is not in the routing table of this router"))
            return nothing
        return lane.begin(request, on_end)

    async def submit(self, request: SegmentRequest) -> SegmentReply:
        """Carry rows to one copy and wait for its output, until the deadline at most. Raises what `begin` ends with."""
        ended: asyncio.Future[SegmentReply | MoeError] = asyncio.get_running_loop().create_future()
        withdraw = self.begin(request, ended.set_result)
        try:
            async with asyncio.timeout_at(request.deadline_s):
                outcome = await ended
        except TimeoutError:
            message = f"the deadline passed before {request.copy.incarnation} answered"
            raise DeadlineExceeded(message) from None
        finally:
            withdraw()
        if isinstance(outcome, MoeError):
            raise outcome
        return outcome

    def queued_tokens(self, actor_id: str) -> int:
        """Rows that wait for this actor or are under way to it."""
        return sum(lane.pending_tokens for incarnation, lane in self._lanes.items() if incarnation.actor_id == actor_id)

    def burden(self, actor_id: str) -> float:
        """About how long one more frame would take at this actor: what a balancer compares."""
        lane = self._by_actor.get(actor_id)
        return 0.0 if lane is None else lane.burden

    def status(self) -> list[LinkState]:
        """Every link of the table, ordered by incarnation."""
        return [self._lanes[incarnation].state() for incarnation in sorted(self._lanes)]

    async def close(self, timeout_s: float) -> None:
        """Take nothing new, wait for the replies that are due, leave all links. Idempotent."""
        self._is_closed = True
        for task in self._leaving.values():
            task.cancel()
        for lane in (*self._leaving, *self._lanes.values()):
            self._leave(lane, "the router is stopping", timeout_s)
        self._lanes.clear()
        if self._leaving:
            await asyncio.wait(tuple(self._leaving.values()))

    def _open_missing(self, wanted: Mapping[Incarnation, ActorEndpoint]) -> None:
        for incarnation, endpoint in wanted.items():
            if incarnation not in self._lanes:
                key = derive_link_key(self._link_secret, incarnation)
                lane = ActorLane(endpoint, key, router_id=self._router_id, limits=self._limits, budget=self._budget, rng=self._rng, watch=self._watch)
                self._lanes[incarnation] = lane
                lane.start()

    def _leave(self, lane: ActorLane, reason: str, timeout_s: float | None = None) -> None:
        """A lane that the table dropped still takes rows for a moment: requests planned on the older table are on their way."""
        linger_s = _LINGER_S if timeout_s is None else 0.0
        limit_s = self._drain_timeout_s if timeout_s is None else timeout_s
        task = asyncio.get_running_loop().create_task(self._retire(lane, reason, linger_s, limit_s), name=f"leave-{lane.endpoint.incarnation}")
        self._leaving[lane] = task
        task.add_done_callback(lambda _: self._left(lane, task))

    def _left(self, lane: ActorLane, task: asyncio.Task[None]) -> None:
        if self._leaving.get(lane) is task:
            del self._leaving[lane]

    async def _retire(self, lane: ActorLane, reason: str, linger_s: float, timeout_s: float) -> None:
        await asyncio.sleep(linger_s)
        await lane.retire(reason, timeout_s)

    def _lane_of(self, incarnation: Incarnation) -> ActorLane | None:
        if self._is_closed:
            message = "the router is stopping"
            raise NotReady(message)
        lane = self._lanes.get(incarnation)
        return lane or next((lane for lane in self._leaving if lane.endpoint.incarnation == incarnation), None)
