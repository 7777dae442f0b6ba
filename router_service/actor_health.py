"""The router's pulse: tells liveness what lanes see, carries out its verdicts, and has late rows hedged. Decides nothing.

It beats every `BEAT_S` while anybody owes rows, else every `IDLE_BEAT_S`. A beat that comes late says how long this process did not run.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple, assert_never

from cluster.core.ids import ExpertId, Role
from cluster.core.link_frames import Cool, Pong, Warm
from cluster.core.routing_table import RoutingTable, TableCopy
from cluster.telemetry.metrics import RouterMetrics
from router_service.actor_lane import ActorLane
from router_service.core.liveness import Liveness
from router_service.core.trust import Rank, Trust
from router_service.core.verdicts import Clear, Eject, Readmit, State, Suspect, Verdict

logger = logging.getLogger(__name__)

BEAT_S: Final = 0.01
IDLE_BEAT_S: Final = 0.25
MAX_WARMED: Final = 64


class ActorHealth:
    """One router's judgement of its actors, at work. `changed` is set whenever the controller should hear of it at once."""

    def __init__(self, liveness: Liveness, trust: Trust, metrics: RouterMetrics | None = None) -> None:
        """Belongs to the running event loop; beats from `start` on."""
        self.changed = asyncio.Event()
        self.evidence: dict[str, str] = {}
        self.on_pulse: Callable[[float, float], None] = lambda _now_s, _late_s: None
        self.num_ejections = 0
        self._liveness = liveness
        self._trust = trust
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._lanes: dict[str, ActorLane] = {}
        self._shadows: dict[str, list[_Shadow]] = {}
        self._standing_in: set[_Shadow] = set()
        self._awaited: Counter[_Shadow] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        self._expected_s = 0.0
        self._num_owed = 0
        trust.on_accused = self.changed.set

    def start(self) -> None:
        """Begin to beat."""
        self._schedule(IDLE_BEAT_S)

    def close(self) -> None:
        """Beat no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def state(self, actor: str) -> State:
        """What is thought of an incarnation, by its name."""
        return self._liveness.state(actor)

    def standstill_s(self, actor: str, now_s: float) -> float | None:
        """For how long an incarnation that owes rows has not advanced; None when it owes none."""
        return self._liveness.standstill_s(actor, now_s)

    def adopt(self, table: RoutingTable) -> None:
        """Know the table's shadows, so that they can be made ready when a replica is suspected, and let go when one is there again.

        Copies that the table dropped are forgotten.
        """
        self._trust.adopt(table)
        shadows: defaultdict[str, list[_Shadow]] = defaultdict(list)
        needed, ended = set(), []
        for expert, copies in table.copies.items():
            replicas = [str(copy.incarnation) for copy in copies if copy.role is Role.REPLICA]
            for shadow in [_shadow(expert, copy) for copy in copies if copy.role is Role.SHADOW]:
                if len(replicas) == 1:
                    shadows[replicas[0]].append(shadow)
                if not replicas or (shadow in self._standing_in and not any(self.state(name) is State.HEALTHY for name in replicas)):
                    needed.add(shadow)
                elif shadow in self._standing_in:
                    ended.append(shadow)
        self._shadows, self._standing_in = dict(shadows), needed
        self._cool(ended)

    def warm(self, expert: ExpertId, shadow: TableCopy) -> None:
        """Have a shadow made ready that may have to answer rows under way: a hint to who holds it, nothing where there is no link."""
        awaited = _shadow(expert, shadow)
        self._awaited[awaited] += 1
        self._hint(awaited, Warm)

    def release(self, expert: ExpertId, shadow: TableCopy, *, is_back: bool) -> None:
        """Those rows have ended. Once a replica answers and nobody else needs the shadow, it need not stay ready; one that answered rows is left as it is."""
        awaited = _shadow(expert, shadow)
        self._awaited[awaited] -= 1
        if self._awaited[awaited] > 0:
            return
        del self._awaited[awaited]
        if is_back and awaited not in self._standing_in:
            self._hint(awaited, Cool)

    def joined(self, lane: ActorLane) -> None:
        """A fresh link is ready."""
        self._lanes[lane.name] = lane
        self._liveness.joined(lane.name, lane.endpoint.node_id, lane.endpoint.device, self._loop.time())
        if self._liveness.state(lane.name) is State.ON_TRIAL:
            self._trust.set_actor(lane.name, Rank.GOOD)

    def may_send(self, lane: ActorLane) -> bool:
        """Whether another frame may go out now. Rows for an ejected actor come only where nobody else is left: they may try."""
        return self._liveness.may_send(lane.name) or self._liveness.state(lane.name) is State.EJECTED

    def sent(self, lane: ActorLane, num_tokens: int, num_bytes: int) -> None:
        """A frame went out. One on trial gets no second one before its answer."""
        if self._metrics is not None:
            self._metrics.link_bytes("sent", num_bytes)
        self._liveness.sent(lane.name, num_tokens, self._loop.time())
        if self._liveness.state(lane.name) is State.ON_TRIAL:
            self._trust.set_actor(lane.name, Rank.DOUBTFUL)
        self.hurry()

    def answered(self, lane: ActorLane, num_tokens: int, num_bytes: int, took_s: float) -> None:
        """A frame's Result came."""
        if self._metrics is not None:
            self._metrics.link_bytes("received", num_bytes)
        self._liveness.answered(lane.name, num_tokens, took_s, self._loop.time())

    def heard(self, lane: ActorLane, progress: Pong) -> None:
        """The actor told of its progress."""
        now_s = self._loop.time()
        self._liveness.heard(
            lane.name,
            now_s,
            frames_done=progress.frames_done,
            oldest_age_s=progress.oldest_age_s,
            queued_rows=progress.queued_tokens,
            is_loading=progress.is_loading,
        )

    def lost(self, lane: ActorLane) -> None:
        """The link was lost: the lane tells those who wait by itself."""
        if self._metrics is not None:
            self._metrics.distrusted("lost", self._loop.time())
        self._carry_out(self._liveness.lost(lane.name, self._loop.time()))
        self.changed.set()

    def left(self, lane: ActorLane) -> None:
        """The router left the actor."""
        if self._lanes.get(lane.name) is lane:
            del self._lanes[lane.name]
            self._liveness.left(lane.name)
            self._trust.set_actor(lane.name, Rank.GOOD)
            self.evidence.pop(lane.name, None)

    def hurry(self) -> None:
        """Somebody owes rows now: beat faster."""
        if self._timer is not None and self._expected_s - self._loop.time() > BEAT_S:
            self._timer.cancel()
            self._schedule(BEAT_S)

    def _schedule(self, delay_s: float) -> None:
        self._expected_s = self._loop.time() + delay_s
        self._timer = self._loop.call_at(self._expected_s, self._beat)

    def _beat(self) -> None:
        now_s = self._loop.time()
        late_s = max(0.0, now_s - self._expected_s - BEAT_S / 2)
        try:
            for name in self._liveness.to_probe(now_s):
                if (lane := self._lanes.get(name)) is not None:
                    lane.probe()
            self._carry_out(self._liveness.tick(now_s, late_s=late_s))
            self.on_pulse(now_s, late_s)
        finally:
            self._schedule(BEAT_S if self._liveness.is_anybody_owing else IDLE_BEAT_S)

    def _carry_out(self, verdicts: list[Verdict]) -> None:
        for verdict in verdicts:
            self.evidence[verdict.actor] = verdict.evidence
            match verdict:
                case Suspect():
                    self._trust.set_actor(verdict.actor, Rank.DOUBTFUL)
                    self._warm_shadows(verdict.actor)
                case Eject():
                    self._eject(verdict)
                case Readmit():
                    lane = self._lanes.get(verdict.actor)
                    if lane is not None and lane.try_again():
                        self._trust.set_actor(verdict.actor, Rank.GOOD)
                case Clear():
                    self._trust.set_actor(verdict.actor, Rank.GOOD)
                    del self.evidence[verdict.actor]
                    self._cool(shadow for shadow in self._shadows.get(verdict.actor, ()) if shadow in self._standing_in)
                case _:
                    assert_never(verdict)
            self.changed.set()

    def _eject(self, verdict: Eject) -> None:
        self.num_ejections += 1
        self._trust.set_actor(verdict.actor, Rank.LAST)
        logger.warning("expert actor %s gets no rows: %s", verdict.actor, verdict.evidence)
        if self._metrics is not None:
            self._metrics.ejected()
            self._metrics.distrusted("ejected", self._loop.time())
        lane = self._lanes.get(verdict.actor)
        if lane is not None:
            lane.eject(f"{verdict.actor} was ejected: {verdict.evidence}")
        self._warm_shadows(verdict.actor)

    def _warm_shadows(self, actor: str) -> None:
        """Have the shadows of what this actor alone holds made ready, at most MAX_WARMED of them: a hint, so that the first row need not wait."""
        for shadow in self._shadows.get(actor, ())[:MAX_WARMED]:
            self._standing_in.add(shadow)
            self._hint(shadow, Warm)

    def _cool(self, shadows: Iterable[_Shadow]) -> None:
        """Say of shadows whose replica is back that they need not stay ready; of those that rows wait for, when these have ended."""
        for shadow in tuple(shadows):
            self._standing_in.discard(shadow)
            if shadow not in self._awaited:
                self._hint(shadow, Cool)

    def _hint(self, shadow: _Shadow, kind: type[Warm | Cool]) -> None:
        if (lane := self._lanes.get(shadow.holder)) is not None:
            lane.hint(kind(*shadow.copy))


class _Shadow(NamedTuple):
    """A shadow and the incarnation that holds it: model, layer, index and version as hints name it."""

    holder: str
    copy: tuple[str, int, int, bytes]


def _shadow(expert: ExpertId, copy: TableCopy) -> _Shadow:
    return _Shadow(str(copy.incarnation), (expert.model, expert.layer, expert.index, bytes.fromhex(copy.version)))
