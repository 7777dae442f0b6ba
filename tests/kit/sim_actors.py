"""Expert actors of a simulation as a router's links see them: they compute symbols instead of numbers, and can be broken in every way we know.

A row is six int32: request, row, whether it overflows healthy weights; the answer is request, row, expert, version, generation, attempt. So whoever gets
an answer can tell which copy computed it, for which try. Read as fp32 all of them are finite, but for the answers of broken weights and overflown rows.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np

from cluster.core.errors import MoeError, ReplicaUnavailable
from cluster.core.ids import CopyId, ExpertId, Incarnation, Role
from cluster.core.link_frames import Cancel, Cool, Forward, FrameStatus, Pong, Result, Segment, SegmentResult, SegmentStatus, Warm, Welcome
from cluster.core.status import SlotState
from kit.fleet import FakeFleet, FakeSlot
from router_service.link_client import LinkPhase

COLUMNS = 6
OVERFLOWS = 1
NAN_BITS = 0x7FC00000
FRAME_S, ROW_S, HOP_S = 0.002, 0.0002, 0.0002
MAX_TOKENS, WINDOW = 64, 2
LONG_AGO_S = -1e9


def tag_of(version: str) -> int:
    """A version as one symbol of an answer."""
    return zlib.crc32(version.encode()) & 0x3FFFFF


def device_of(incarnation: Incarnation) -> str:
    """Every node has two GPUs."""
    return f"cuda:{int(incarnation.actor_id.rpartition('-')[2]) // 3 % 2}"


def key_of(expert: ExpertId) -> int:
    return expert.layer * 1000 + expert.index


@dataclass
class _Job:
    link: SimLink
    frame: Forward
    rows: np.ndarray
    arrived_s: float
    cancelled: set[int] = field(default_factory=set)


class SimActor:
    """One life of an actor: a queue, one compute thread, an event loop, and what is broken about them. `ill_s`: until when it was last ill."""

    def __init__(self, world: SimActors, incarnation: Incarnation) -> None:
        self.world, self.incarnation = world, incarnation
        self.loop = world.loop
        known = world.fleet.actors.get(incarnation)
        self.node_id = known.node_id if known is not None else ""
        self.device = device_of(incarnation)
        self.stopped_s = 0.0
        self.queue: deque[_Job] = deque()
        self.links: list[SimLink] = []
        self.frames_done = 0
        self.is_stopped = False  # the whole process: SIGSTOP, or its node is frozen
        self.is_stuck = False  # the compute thread alone
        self.factor = 1.0
        self.corrupt: set[ExpertId] = set()
        self.spoilt: dict[ExpertId, FakeSlot] = {}  # slots whose weights are wrong until they are loaded anew
        self.num_to_drop = self.num_to_double = self.num_to_fail = self.num_to_forge = 0
        self.late_s = 0.0
        self.slow_s = LONG_AGO_S  # when it last was slow
        self.is_quiet = False  # its answers and Pongs are held up on the way
        self.ill_s = self.owed_s = LONG_AGO_S
        self.busy_until_s: float | None = None
        self._held: list[Callable[[], None]] = []
        self._unread_pings: list[tuple[SimLink, int]] = []

    @property
    def is_ill(self) -> bool:
        return (
            self.is_stopped or self.is_stuck or self.is_quiet or self.factor > 1 or bool(self.corrupt) or self.late_s > 0
            or self.num_to_drop + self.num_to_double + self.num_to_fail + self.num_to_forge > 0
        )  # fmt: skip

    def was_ill_since(self, since_s: float) -> bool:
        return self.is_ill or self.ill_s >= since_s

    @property
    def kept_back_s(self) -> float:
        """Until when a router was owed an answer that it never gets: as long as its link lasts."""
        return self.loop.time() if any(link.is_owed for link in self.links) else self.owed_s

    def is_wrong(self, expert: ExpertId) -> bool:
        """Whether what it holds of an expert gives wrong numbers now."""
        spoilt = self.spoilt.get(expert)
        return expert in self.corrupt or (spoilt is not None and spoilt is self.world.slot(self.incarnation, spoilt.copy))

    def is_linked_since(self, since_s: float) -> bool:
        """Whether a router's link was there all along: one that is made anew takes no rows meanwhile."""
        return any(link.phase is LinkPhase.READY and link.opened_s <= since_s for link in self.links)

    def stop(self) -> None:
        """The whole process stands still."""
        if not self.is_stopped:
            self.is_stopped, self.stopped_s = True, self.loop.time()

    def heal(self) -> None:
        """As it was; what waited goes on now."""
        if self.is_ill:
            self.ill_s = self.loop.time()
        if self.factor > 1 or self.late_s > 0:
            self.slow_s = self.loop.time()
        self.is_stopped = self.is_stuck = self.is_quiet = False
        self.factor, self.late_s = 1.0, 0.0
        self.corrupt.clear()
        self.num_to_drop = self.num_to_double = self.num_to_fail = self.num_to_forge = 0
        held, self._held = self._held, []
        for brought in held:
            self.loop.call_soon(brought)
        pings, self._unread_pings = self._unread_pings, []
        for link, sequence in pings:
            self.pinged(link, sequence)
        if self.busy_until_s is not None:
            self.loop.call_soon(self._finish, self.loop.time())
        else:
            self._start(self.loop.time())

    def arrived(self, job: _Job) -> None:
        self.queue.append(job)
        if self.busy_until_s is None:
            self._start(job.arrived_s)

    def pinged(self, link: SimLink, sequence: int) -> None:
        if self.is_stopped:
            self._unread_pings.append((link, sequence))
            return
        oldest_s = self.loop.time() - self.queue[0].arrived_s if self.queue else 0.0
        queued = sum(len(job.rows) for job in self.queue)
        pong = Pong(sequence, self.incarnation.generation, self.frames_done, max(0.0, oldest_s), queued, self.world.is_loading(self.incarnation))
        self._deliver(link, lambda: link.on_progress(pong), self.loop.time())

    def _start(self, at_s: float) -> None:
        if self.queue and not self.is_stopped and not self.is_stuck:
            self.busy_until_s = at_s + (FRAME_S + ROW_S * len(self.queue[0].rows)) * self.factor
            self.loop.call_at(self.busy_until_s, self._finish, self.busy_until_s)

    def _finish(self, due_s: float) -> None:
        if self.busy_until_s is None or self.is_stopped or self.is_stuck or not self.queue:
            return
        job = self.queue.popleft()
        self.busy_until_s = None
        result, body = self._compute(job)
        self.frames_done += 1
        if self.num_to_forge > 0:
            self.num_to_forge -= 1
            self.ill_s = self.loop.time()
            forged = replace(result, generation=result.generation - 1)
            self._deliver(job.link, lambda: job.link.on_result(forged, memoryview(bytes(len(body)))), due_s - HOP_S / 2)
        if self.num_to_drop > 0:
            self.num_to_drop -= 1
            self.ill_s = self.loop.time()
            job.link.is_owed = True
        else:
            self._deliver(job.link, lambda: job.link.on_result(result, memoryview(body)), due_s + self.late_s)
            if self.num_to_double > 0:
                self.num_to_double -= 1
                self._deliver(job.link, lambda: job.link.on_result(result, memoryview(body)), due_s + 0.03)
        self._start(due_s)

    def _deliver(self, link: SimLink, bring: Callable[[], None], at_s: float) -> None:
        def brought() -> None:
            if self.is_quiet:
                self._held.append(brought)
            elif link.phase is not LinkPhase.CLOSED and not self.is_stopped:
                bring()

        self.loop.call_at(at_s + HOP_S, brought)

    def _compute(self, job: _Job) -> tuple[Result, bytes]:
        results, parts, start = [], [], 0
        for segment in job.frame.segments:
            rows = job.rows[start : start + segment.num_rows]
            start += segment.num_rows
            status = self._status(segment, job)
            kept = rows if status is SegmentStatus.OK else rows[:0]
            results.append(SegmentResult(segment.segment_id, segment.attempt, status, segment.dtype, segment.dim, len(kept), (), ""))
            parts.append(self._answers(segment, kept))
        result = Result(job.frame.frame_id, self.incarnation.generation, FrameStatus.OK, 0.0, 0.001, tuple(results))
        return result, b"".join(part.tobytes() for part in parts)

    def _status(self, segment: Segment, job: _Job) -> SegmentStatus:
        expert = ExpertId(segment.model, segment.layer, segment.index)
        state = self.world.slot_state(self.incarnation, CopyId(expert, segment.version.hex(), segment.role))
        if segment.segment_id in job.cancelled:
            return SegmentStatus.OVERLOADED
        if self.num_to_fail > 0:
            self.num_to_fail -= 1
            self.ill_s = self.loop.time()
            return SegmentStatus.FAULTED
        if state is SlotState.READY:
            return SegmentStatus.OK
        return SegmentStatus.DRAINING if state is SlotState.DRAINING else SegmentStatus.NOT_HELD

    def _answers(self, segment: Segment, rows: np.ndarray) -> np.ndarray:
        expert = ExpertId(segment.model, segment.layer, segment.index)
        answers = np.empty_like(rows)
        answers[:, :2] = rows[:, :2]
        answers[:, 2:] = (key_of(expert), tag_of(segment.version.hex()), self.incarnation.generation, segment.attempt)
        if segment.role is Role.REPLICA and self.is_wrong(expert):
            answers[:] = NAN_BITS
        answers[rows[:, 2] == OVERFLOWS] = NAN_BITS
        return answers


class SimLink:
    """A router's end of a link to a simulated actor, as `LinkClient` is."""

    def __init__(
        self,
        actor: SimActor,
        *,
        on_result: Callable[[Result, memoryview], None],
        on_lost: Callable[[MoeError], None],
        on_progress: Callable[[Pong], None],
    ) -> None:
        self.actor = actor
        self.on_result, self.on_lost, self.on_progress = on_result, on_lost, on_progress
        self.phase = LinkPhase.READY
        self.welcome = Welcome(b"", 1 << 20, MAX_TOKENS, WINDOW)
        self.progress = None
        self.last_heard_age_s = 0.0
        self.bytes_sent = self.bytes_received = 0
        self.is_owed = False  # an answer is due on it that never comes
        self.knows_cool = True
        self._num_pings = 0
        self.opened_s = actor.loop.time()
        actor.links.append(self)

    def send(self, frame: Forward | Cancel | Warm | Cool, buffers: Iterable[memoryview] = ()) -> None:
        if self.phase is LinkPhase.CLOSED:
            return
        world, actor = self.actor.world, self.actor
        if isinstance(frame, Forward):
            rows = np.frombuffer(b"".join(buffers), np.int32).reshape(-1, COLUMNS)
            world.on_frame(actor, frame)
            job = _Job(self, frame, rows, world.loop.time() + HOP_S)
            world.loop.call_at(job.arrived_s, actor.arrived, job)
        elif isinstance(frame, Cancel):
            for job in actor.queue:
                if job.link is self and job.frame.frame_id == frame.frame_id:
                    job.cancelled.update(frame.segment_ids)

    def probe(self) -> None:
        if self.phase is not LinkPhase.CLOSED:
            self._num_pings += 1
            self.actor.loop.call_later(HOP_S, self.actor.pinged, self, self._num_pings)

    def leave(self, reason: str) -> None:  # noqa: ARG002
        self.close()

    def close(self) -> None:
        self.phase = LinkPhase.CLOSED
        if self in self.actor.links:
            self.actor.links.remove(self)
            if self.is_owed:
                self.actor.owed_s = self.actor.loop.time()

    def reset(self) -> None:
        """The kernel says that nobody is there any more."""
        if self.phase is not LinkPhase.CLOSED:
            self.close()
            self.on_lost(ReplicaUnavailable("the link was reset"))


class SimActors:
    """All lives of all actors of a fleet. Stands for `LinkClient` where lanes connect."""

    def __init__(self, fleet: FakeFleet, loop: asyncio.AbstractEventLoop, rng: Random) -> None:
        self.fleet, self.loop, self.rng = fleet, loop, rng
        self.actors: dict[Incarnation, SimActor] = {}
        self.on_frame: Callable[[SimActor, Forward], None] = lambda _actor, _frame: None

    def of(self, incarnation: Incarnation) -> SimActor:
        if incarnation not in self.actors:
            self.actors[incarnation] = SimActor(self, incarnation)
        return self.actors[incarnation]

    def living(self) -> list[SimActor]:
        """Those that run and have something ready."""
        return [self.of(incarnation) for incarnation in sorted(self.fleet.actors) if self.fleet.actors[incarnation].slots]

    def slot(self, incarnation: Incarnation, copy: CopyId) -> FakeSlot | None:
        actor = self.fleet.actors.get(incarnation)
        return actor.slots.get(copy) if actor is not None else None

    def slot_state(self, incarnation: Incarnation, copy: CopyId) -> SlotState | None:
        slot = self.slot(incarnation, copy)
        if slot is not None and slot.state is SlotState.LOADING and self.fleet.clock.time_s >= slot.ready_at_s:
            return SlotState.READY
        return slot.state if slot is not None else None

    def is_ready_since(self, incarnation: Incarnation, copy: CopyId, since_s: float) -> bool:
        """Whether a copy could be asked all along; one that was loaded anew meanwhile could not."""
        slot = self.slot(incarnation, copy)
        return slot is not None and slot.ready_at_s <= since_s and self.slot_state(incarnation, copy) is SlotState.READY

    def is_loading(self, incarnation: Incarnation) -> bool:
        actor = self.fleet.actors.get(incarnation)
        return actor is not None and any(self.slot_state(incarnation, copy) is SlotState.LOADING for copy in actor.slots)

    def kill(self, actor: SimActor, *, with_reset: bool) -> None:
        """Its process ends; the links are reset a little later, unless the network is gone as well."""
        actor.ill_s = self.loop.time()
        if actor.incarnation in self.fleet.actors:
            self.fleet.kill_actor(actor.incarnation)
        self.bury(actor, with_reset=with_reset)

    def bury(self, actor: SimActor, *, with_reset: bool) -> None:
        """Nothing of it runs any more."""
        actor.ill_s = self.loop.time()
        actor.stop()
        if with_reset:
            for link in tuple(actor.links):
                self.loop.call_later(self.rng.uniform(0.001, 0.013), link.reset)

    async def connect(self, endpoint, key, *, router_id, limits, on_result, on_lost, on_goodbye, on_progress) -> SimLink:  # noqa: ANN001, ARG002
        await asyncio.sleep(0.001)
        actor = self.of(endpoint.incarnation)
        if endpoint.incarnation not in self.fleet.actors:
            message = "nobody listens there"
            raise ReplicaUnavailable(message)
        if actor.is_stopped or actor.is_quiet:
            await asyncio.sleep(limits.connect_timeout_s)
            message = "no answer in time"
            raise ReplicaUnavailable(message)
        return SimLink(actor, on_result=on_result, on_lost=on_lost, on_progress=on_progress)
