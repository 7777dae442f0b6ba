"""What must hold in a failover simulation, whatever breaks: checked on every question, every answer, every verdict and every end of a request."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from cluster.core.errors import MoeError
from cluster.core.ids import ExpertId, Incarnation, Role
from cluster.core.link_frames import Forward
from cluster.core.routing_table import RoutingTable, TableCopy
from kit.sim_actors import NAN_BITS, SimActor, SimActors, key_of, tag_of
from kit.sim_router import BUDGET_FRACTION, BURST_ROWS, Recorder, Request, SimRouter
from router_service.core.segments import SegmentReply, SegmentRequest
from router_service.core.trust import Rank
from router_service.core.verdicts import Clear, Eject, State, Verdict

ILL_MEMORY_S = 1.0
NODE_WINDOW_S = 0.19
DEAD_S = 0.25
DEADLINE_SLACK_S = 0.02


class RuleBroken(AssertionError):
    """A rule does not hold; its name comes first."""


class Replies(dict[int, SegmentReply]):
    """The answers of a call: each is given once, unless it was taken away before."""

    def __init__(self, rules: Rules, number: int) -> None:
        super().__init__()
        self._rules, self._number = rules, number

    def __setitem__(self, index: int, reply: SegmentReply) -> None:
        self._rules.require(index not in self, "a choice is answered once", self._number, index)
        super().__setitem__(index, reply)


class Rules(Recorder):
    """The rules and the account they are checked against. `history` is a digest of every event, in order."""

    def __init__(self, world: SimActors) -> None:
        self.world = world
        self.router: SimRouter | None = None
        self.history = hashlib.blake2b(digest_size=16)
        self.num_events = 0
        self.broken: list[str] = []
        self.asked_of: dict[tuple[object, ExpertId], list[SegmentRequest]] = defaultdict(list)
        self.asked_rows = self.hedged_rows = self.resent_rows = 0
        self.num_ejections = self.num_shadow_answers = 0
        self.ejected_s: dict[str, dict[SimActor, float]] = defaultdict(dict)
        self.is_out: set[str] = set()
        self.over: dict[tuple[object, ExpertId], set[int]] = defaultdict(set)
        self.blamed: set[tuple[ExpertId, TableCopy]] = set()  # rightly, as another rule says; asked no more until a table without them has come
        self.outcomes: dict[int, str] = {}
        self.paused_s = 0.0
        self.epoch = 0

    def note(self, *words: object) -> None:
        """One event, for the history."""
        self.num_events += 1
        self.history.update(f"{self.world.loop.time():.6f} {words}\n".encode())

    def require(self, holds: object, rule: str, *story: object) -> None:
        """Keep a broken rule for the end: raised inside a callback it would be taken for something else."""
        if not holds and len(self.broken) < 20:
            self.broken.append(f"{rule}: {' '.join(map(str, story))} at {self.world.loop.time() - 1000.0:.4f} s")

    def check(self) -> None:
        """Raise the first broken rule."""
        if self.broken:
            raise RuleBroken(self.broken[0])

    def actor(self, incarnation: Incarnation) -> SimActor:
        return self.world.of(incarnation)

    def asked(self, request: SegmentRequest) -> None:
        copy, num_rows = request.copy, len(request.rows)
        self.note("ask", request.expert, copy.incarnation, copy.role, request.attempt, num_rows, request.is_hedge)
        self.require(not request.exact or copy.role is Role.REPLICA, "EXACT is never asked of a shadow", request.expert, copy)
        if request.flow is None:
            return  # a witness in a case of wrong numbers
        if request.attempt == 0:
            self.asked_of[request.flow, request.expert] = []  # a flow's number may have been another's before
            self.over[request.flow, request.expert] = set()
        before = self.asked_of[request.flow, request.expert]
        self.require(all(one.copy != copy for one in before), "no copy is asked twice for the same rows", request.expert, copy)
        lives = {one.copy.incarnation for one in before if one.attempt not in self.over[request.flow, request.expert]}
        self.require(not request.is_hedge or copy.incarnation not in lives, "a hedge goes to another actor", request.expert, copy)
        self.require(request.attempt == len(before), "attempts are numbered", request.expert, request.attempt)
        before.append(request)
        if request.is_hedge:
            self.hedged_rows += num_rows
            self.require(
                self.hedged_rows <= BURST_ROWS + BUDGET_FRACTION * self.asked_rows + 1e-6, "hedges stay within their budget", self.hedged_rows, self.asked_rows
            )
        elif request.attempt == 0:
            self.asked_rows += num_rows
        else:
            self.resent_rows += num_rows
        if copy.role is Role.SHADOW and not request.is_hedge:
            self._check_shadow_is_last(request, [one.copy for one in before])

    def _check_shadow_is_last(self, request: SegmentRequest, tried: list[TableCopy]) -> None:
        router = self.router
        if router is None or router.table is None or request.attempt:
            return
        full = [copy for copy in router.table.copies_of(request.expert) if copy.role is Role.REPLICA and copy not in tried]
        good = [copy for copy in full if router.trust.rank(request.expert, copy) is Rank.GOOD]
        self.require(not good or router.table.epoch != request.epoch, "a shadow is asked after every trusted replica", request.expert, good)

    def ended(self, request: SegmentRequest, outcome: SegmentReply | MoeError) -> None:
        self.note("end", request.expert, request.copy.incarnation, request.attempt, type(outcome).__name__)
        self.over[request.flow, request.expert].add(request.attempt)
        if isinstance(outcome, SegmentReply):
            self.check_answer(request, outcome)

    def framed(self, actor: SimActor, frame: Forward) -> None:
        """A frame goes out."""
        self.note("frame", actor.incarnation, frame.frame_id, len(frame.segments))
        watch = self.router.liveness._watches.get(str(actor.incarnation)) if self.router is not None else None
        if watch is not None:
            self.require(watch.state is not State.ON_TRIAL or watch.owed_frames <= 1, "one frame at a time is on trial", actor.incarnation, watch.owed_frames)

    def check_answer(self, request: SegmentRequest, reply: SegmentReply) -> None:
        """The rows are of this request, and of the copy, life and try that the reply names."""
        asked = np.ascontiguousarray(request.rows).view(np.int32)
        got = np.ascontiguousarray(reply.rows).view(np.int32)
        mark = (key_of(request.expert), tag_of(reply.version), reply.incarnation.generation, reply.attempt)
        is_of_copy = (reply.incarnation, reply.version, reply.role) == (request.copy.incarnation, request.copy.version, request.copy.role)
        self.require(is_of_copy and reply.attempt == request.attempt, "a reply is of the copy that was asked", request.expert, request.copy)
        finite = (got != NAN_BITS).all(axis=1)
        same = (got[:, :2] == asked[:, :2]).all() if finite.all() else (got[finite, :2] == asked[finite, :2]).all()
        self.require(len(got) == len(asked) and same, "an answer is of the rows that were sent", request.expert, request.copy)
        self.require((got[finite, 2:] == mark).all(), "no stale answer is accepted", request.expert, request.copy, request.attempt)

    def judged(self, verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            self.note(type(verdict).__name__, verdict.actor)
            actor = self.world.of(incarnation_of(verdict.actor))
            if isinstance(verdict, Eject):
                self._check_ejection(verdict, actor)
                self.is_out.add(verdict.actor)
            elif isinstance(verdict, Clear):
                is_back = verdict.actor in self.is_out
                self.is_out.discard(verdict.actor)
                self.require(not (is_back and actor.is_stuck and actor.busy_until_s is None), "a Pong re-admits nobody", verdict.actor, verdict.evidence)
        self._check_nodes([verdict for verdict in verdicts if isinstance(verdict, Eject)])

    def _check_ejection(self, verdict: Eject, actor: SimActor) -> None:
        self.num_ejections += 1
        since_s = self.world.loop.time() - ILL_MEMORY_S
        neighbours = [other for other in self.world.actors.values() if other.node_id == actor.node_id]
        is_excused = self.may_be_accused(actor, since_s) or sum(self.may_be_accused(other, since_s) for other in neighbours) > 1
        self.require(is_excused, "nobody is ejected without a fault", verdict.actor, verdict.evidence)

    def may_be_accused(self, actor: SimActor, since_s: float) -> bool:
        """Whether it was ill since, or owed an answer that it kept back. Each answer that it gives puts off when that one is missed, without an end."""
        return actor.was_ill_since(since_s) or actor.kept_back_s >= since_s

    def may_fail(self, actor: SimActor, since_s: float) -> bool:
        """Whether rows that it was asked for since may be lost: it was ill, or the router found out that it keeps an answer back."""
        is_found_out = self.router is not None and self.router.liveness.state(str(actor.incarnation)) is not State.HEALTHY
        return actor.was_ill_since(since_s) or (actor.kept_back_s >= since_s and is_found_out)

    def _check_nodes(self, ejections: Sequence[Eject]) -> None:
        """Two of a node (or of a GPU) lost or silent within the window take with them those that are as dead as they are."""
        router, now_s = self.router, self.world.loop.time()
        for verdict in ejections:
            if router is None or not verdict.evidence.startswith(("silent", "its link")):
                continue
            actor = self.world.of(incarnation_of(verdict.actor))
            gone = self.ejected_s[actor.node_id]
            gone[actor] = now_s
            fresh = [other for other, at_s in gone.items() if now_s - at_s <= NODE_WINDOW_S]
            devices = {other.device for other in fresh}
            known = [self.world.of(incarnation_of(name)) for name in router.linked()]
            mates = [mate for mate in known if mate.node_id == actor.node_id and (len(devices) > 1 or mate.device in devices)]
            is_anybody_left = any(router.liveness.state(str(other.incarnation)) is not State.EJECTED for other in known if other.node_id != actor.node_id)
            for mate in mates:
                is_dead = mate.is_stopped and mate.stopped_s < now_s - DEAD_S
                is_trusted = router.liveness.state(str(mate.incarnation)) is State.HEALTHY
                self.require(
                    len(fresh) < 2 or not is_anybody_left or not (is_dead and is_trusted), "a lost node is ejected whole", mate.incarnation, verdict.evidence
                )

    def accused(self, expert: ExpertId, copy: TableCopy, kind: str) -> None:
        self.note("accuse", expert, copy.incarnation, kind)
        actor = self.actor(copy.incarnation)
        self.require(actor.is_wrong(expert) or actor.was_ill_since(self.world.loop.time() - ILL_MEMORY_S), "healthy weights are never blamed", expert, copy)
        if self.router is not None and self.router.table is not None and copy in self.router.table.copies_of(expert):
            self.blamed.add((expert, copy))

    def adopted(self, table: RoutingTable) -> None:
        self.note("table", table.epoch)
        self.require(table.epoch >= self.epoch, "epochs never go back", table.epoch, self.epoch)
        self.blamed = {(expert, copy) for expert, copy in self.blamed if copy in table.copies_of(expert)}
        self.epoch = table.epoch

    def finished(self, request: Request, is_possible: Callable[[Request, int], str]) -> None:
        """A request ended; `is_possible(request, index)` names a copy that could have answered for a lost part."""
        self.note("request", request.number, request.outcome, sorted(request.lost))
        self.require(request.number not in self.outcomes, "a request ends once", request.number)
        self.outcomes[request.number] = request.outcome
        late_s = request.ended_s - request.deadline_s
        self.require(late_s <= DEADLINE_SLACK_S + self.paused_s, "a request ends before its deadline", request.number, late_s)
        if request.outcome == "ok":
            self.require(set(request.replies) == set(request.rows_of), "every choice is answered", request.number)
            self.require(not request.overflows, "rows that overflow are told, not returned", request.number)
            for index, reply in request.replies.items():
                rows = np.ascontiguousarray(reply.rows).view(np.int32)
                self.require((rows != NAN_BITS).all(), "nothing that is not finite is returned", request.number, index)
                self.require((rows[:, 0] == request.number).all(), "an answer is of its own request", request.number, index)
                self.require(not request.exact or reply.role is Role.REPLICA, "EXACT is never served by a shadow", request.number, index)
                self.num_shadow_answers += reply.role is Role.SHADOW
        elif request.outcome == "data_loss":
            self.require(request.overflows, "finite rows of healthy experts are not refused", request.number)
        else:
            for index in sorted(request.lost):
                healthy = is_possible(request, index)
                self.require(not healthy, "what a healthy copy could answer does not fail", request.number, request.outcome, index, healthy)

    def replies_of(self, number: int) -> Replies:
        """Where the answers of a request are to lie."""
        return Replies(self, number)

    @property
    def amplification(self) -> float:
        return (self.asked_rows + self.hedged_rows + self.resent_rows) / max(1, self.asked_rows)


def incarnation_of(name: str) -> Incarnation:
    """Read what `str(incarnation)` writes."""
    actor_id, _, generation = name.rpartition("/g")
    return Incarnation(actor_id, int(generation))
