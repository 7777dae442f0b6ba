"""Who answers, who is suspected, who gets no rows: a router's own judgement of its expert actors, by what they owe and how they progress. Sans-io.

An actor is accused only while it owes rows: of silence, or of a compute thread that stands still for longer than so many rows usually take, whatever
its event loop says. On a node where silences nearly as long have ended well of late, as when it is short of cores, it takes a longer one to be ejected.
One that says it is loading is not accused of standing still. Time in which the observer itself did not run counts for nobody, and when over half of the
actors look bad at once the observer doubts itself and ejects none; resets are excepted, they are no matter of time, and so are compute threads that have
stood still for `doubt_limit_s` behind loops that answer: those are heard, so it is not the observer.

Two actors of one GPU, or of one node, that fall silent or are lost within `node_window_s` take the others there with them, except those that were heard
since, and only while an actor elsewhere is left. Where both are on one of several GPUs of a node, that GPU alone goes.

An ejected actor is tried again with one frame after a time that doubles with each ejection; an answer to rows re-admits it, a Pong never. Late answers
show that it resumed: after a first ejection they bring the trial forward, one that flaps serves its time. Which copy answers when every one of an expert
is ejected is not decided here.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

from router_service.core.casualties import Casualties
from router_service.core.hush import FACTOR, Hush
from router_service.core.verdicts import Clear, Eject, LivenessLimits, Readmit, State, Suspect, Verdict
from router_service.core.watch import Grievance, Kind, Pace, Watch


class Liveness:
    """The actors of one router. Every event is O(1); `tick` looks at those that owe rows or are ejected. Unknown actors are HEALTHY and ignored."""

    def __init__(self, limits: LivenessLimits) -> None:
        self._limits = limits
        self._watches: dict[str, Watch] = {}
        self._owing: dict[str, Watch] = {}
        self._ejected: dict[str, Watch] = {}
        self._hushes: WeakValueDictionary[str, Hush] = WeakValueDictionary()  # by node, as long as one of its actors is known
        self._ended_silences: list[tuple[Hush, float]] = []
        self._casualties = Casualties(limits.node_window_s)
        self._pending: list[Verdict] = []
        self._late_s = 0.0
        self.doubts_itself = False

    @property
    def is_anybody_owing(self) -> bool:
        """Whether some actor owes an answer: then time matters."""
        return bool(self._owing)

    def state(self, actor: str) -> State:
        """What is thought of an actor now."""
        watch = self._watches.get(actor)
        return State.HEALTHY if watch is None else watch.state

    def may_send(self, actor: str) -> bool:
        """Whether it may have a frame: no when ejected, one while on trial."""
        watch = self._watches.get(actor)
        if watch is None or watch.state is State.HEALTHY or watch.state is State.SUSPECTED:
            return True
        return watch.state is State.ON_TRIAL and not watch.is_tried

    def joined(self, actor: str, node_id: str, device: str, now_s: float) -> None:
        """A link is ready. One that was lost before stays ejected until its time comes."""
        clock_s = now_s - self._late_s
        watch, hush = self._watches.get(actor), self._hushes.setdefault(node_id, Hush())
        if watch is None:
            watch = self._watches[actor] = Watch(actor, node_id, device, Pace(self._limits), hush)
            watch.enter(State.HEALTHY, clock_s)
            watch.healthy_since_s = clock_s
        watch.node_id, watch.device, watch.hush = node_id, device, hush
        self._owing.pop(actor, None)
        watch.begin_link(clock_s)
        if watch.state is State.SUSPECTED:
            self._clear(watch, "a fresh link", now_s)

    def sent(self, actor: str, num_rows: int, now_s: float) -> None:
        """A frame went out: it is owed an answer."""
        watch = self._watches.get(actor)
        if watch is None or watch.state is State.EJECTED:
            return
        watch.owed_rows += num_rows
        watch.owed_frames += 1
        if watch.owed_frames == 1:
            watch.owing_since_s = watch.progressed_s = now_s - self._late_s
            self._owing[actor] = watch
        if watch.state is State.ON_TRIAL:
            watch.is_tried = True

    def heard(
        self,
        actor: str,
        now_s: float,
        *,
        frames_done: int | None = None,
        oldest_age_s: float | None = None,
        queued_rows: int | None = None,
        is_loading: bool = False,
    ) -> None:
        """A sign of life. A Pong brings the compute thread's progress, and all rows it still has to do, other routers' too."""
        watch = self._watches.get(actor)
        if watch is None:
            return
        clock_s = now_s - self._late_s
        self._hear(watch, clock_s)
        if frames_done is None:
            return
        watch.oldest_age_s = oldest_age_s or 0.0
        watch.queued_rows = queued_rows or 0
        if watch.frames_done is None:
            watch.frames_done = frames_done
        elif frames_done > watch.frames_done:
            watch.frames_done = frames_done
            watch.progressed_s = clock_s
        if watch.is_loading and not is_loading:
            watch.progressed_s = clock_s
        watch.is_loading = is_loading

    def answered(self, actor: str, num_rows: int, took_s: float, now_s: float) -> None:
        """A Result came for a frame of `num_rows` rows, as sent, in time or late: its compute thread advances."""
        watch = self._watches.get(actor)
        if watch is None:
            return
        watch.progressed_s = now_s - self._late_s
        self._hear(watch, watch.progressed_s)
        if watch.frames_done is not None:
            watch.frames_done += 1
        if watch.owed_frames > 1:
            watch.owed_frames -= 1
            watch.owed_rows = max(0, watch.owed_rows - num_rows)
        elif watch.owed_frames == 1:
            watch.owed_frames = watch.owed_rows = 0
            del self._owing[actor]
        if watch.state is not State.EJECTED:
            watch.pace.learn(num_rows, took_s)
        if watch.state is not State.HEALTHY:
            self._vindicate(watch, now_s)

    def lost(self, actor: str, now_s: float) -> list[Verdict]:
        """Its link was reset: it is ejected, and with a second one the others of its GPU or node."""
        watch = self._watches.get(actor)
        if watch is None or not watch.is_linked:
            return []
        watch.is_linked = False
        if watch.state is State.EJECTED:
            return []
        verdicts = self._eject(watch, "its link was lost", now_s, 0.0)
        self._casualties.note(watch, now_s - self._late_s, now_s - self._late_s, is_firm=True)
        return verdicts + self._eject_neighbours(watch, now_s)

    def left(self, actor: str) -> None:
        """It is named no more, or said goodbye: nothing is remembered."""
        watch = self._watches.pop(actor, None)
        self._owing.pop(actor, None)
        self._ejected.pop(actor, None)
        if watch is not None:
            self._casualties.forget(watch)
            self._pending = [verdict for verdict in self._pending if verdict.actor != actor]

    def standstill_s(self, actor: str, now_s: float) -> float | None:
        """For how long an actor that owes rows has not advanced, by its answers and its own account; None when it owes none."""
        watch = self._owing.get(actor)
        return None if watch is None else now_s - self._late_s - watch.progressed_s

    def to_probe(self, now_s: float) -> list[str]:
        """Who owes rows and has been silent for `probe_s`: each is named once in so long."""
        clock_s, probe_s = now_s - self._late_s, self._limits.probe_s
        silent = [watch for watch in self._owing.values() if watch.silent_s(clock_s) >= probe_s and clock_s - watch.probed_s >= probe_s]
        for watch in silent:
            watch.probed_s = clock_s
        return [watch.actor for watch in silent]

    def tick(self, now_s: float, *, late_s: float) -> list[Verdict]:
        """Judge everybody. `late_s` of the time since the last tick this process did not run: that time is taken out of every silence."""
        if late_s > 0.0:
            self._set_back(now_s, late_s)
        clock_s = now_s - self._late_s
        for hush, lasted_s in self._ended_silences:  # what was heard first after a pause seemed silent for its whole length, too
            hush.learn(lasted_s - late_s, clock_s)
        self._ended_silences.clear()
        accused = [(watch, watch.examine(clock_s, self._limits)) for watch in self._owing.values()]
        self.doubts_itself = self._is_too_many([watch for watch, grievance in accused if grievance is not None])
        verdicts = self._take_pending()
        for watch, grievance in accused:
            # An earlier one of the list may have taken its neighbours with it.
            if watch.state is not State.EJECTED:
                verdicts += self._judge(watch, grievance, now_s)
        for watch in [watch for watch in self._ejected.values() if watch.is_linked and clock_s >= watch.readmit_s]:
            verdicts.append(self._readmit(watch, f"its {watch.readmit_s - watch.state_since_s:.2f} s are over", now_s))
        return verdicts

    def _hear(self, watch: Watch, clock_s: float) -> None:
        silent_s = watch.hear(clock_s)
        if FACTOR * silent_s > self._limits.eject_s:
            self._ended_silences.append((watch.hush, silent_s))

    def _set_back(self, now_s: float, late_s: float) -> None:
        self._late_s += late_s
        for watch in self._watches.values():
            watch.rewind(now_s - self._late_s)

    def _is_too_many(self, accused: list[Watch]) -> bool:
        """Whether over half of the actors look bad; those that were ejected and have not answered since are among them."""
        num_linked = sum(watch.is_linked for watch in self._watches.values()) if accused else 0
        if num_linked < self._limits.min_actors_to_doubt_oneself:
            return False
        return 2 * (len(accused) + sum(watch.is_linked for watch in self._ejected.values())) > num_linked

    def _judge(self, watch: Watch, grievance: Grievance | None, now_s: float) -> list[Verdict]:
        watch.grievance = grievance
        if grievance is None:
            if watch.state is State.SUSPECTED:
                self._clear(watch, "it was heard and its compute thread advances", now_s)
            return self._take_pending()
        if self.doubts_itself and not (grievance.kind is Kind.STUCK and grievance.lasting_s >= self._limits.doubt_limit_s):
            return []
        since_s = now_s - grievance.lasting_s
        clock_s = now_s - self._late_s
        verdicts: list[Verdict] = []
        is_new = watch.state is State.HEALTHY
        if grievance.is_grave:
            verdicts = self._eject(watch, grievance.evidence, now_s, grievance.lasting_s)
        elif is_new:
            watch.enter(State.SUSPECTED, clock_s)
            verdicts = [Suspect(watch.actor, grievance.evidence, since_s)]
        if grievance.kind is Kind.SILENT and (is_new or grievance.is_grave):
            self._casualties.note(watch, clock_s, watch.heard_s, is_firm=grievance.is_grave)
            verdicts += self._eject_neighbours(watch, now_s)
        return verdicts

    def _eject(self, watch: Watch, evidence: str, now_s: float, lasting_s: float) -> list[Verdict]:
        watch.begin_ejection(now_s - self._late_s, self._limits)
        self._owing.pop(watch.actor, None)
        self._ejected[watch.actor] = watch
        untold = [verdict for verdict in self._pending if verdict.actor == watch.actor]
        self._pending = [verdict for verdict in self._pending if verdict.actor != watch.actor]
        if untold and isinstance(untold[0], Readmit):
            return []  # nobody was told that it was back
        return [Eject(watch.actor, evidence, now_s - lasting_s)]

    def _eject_neighbours(self, watch: Watch, now_s: float) -> list[Verdict]:
        """Two of a GPU or node are gone: so is the rest of it, less those that were heard since."""
        group = self._casualties.struck_group(watch, self._watches.values())
        if group is None:
            return []
        doomed = [mate for mate in self._watches.values() if mate.state is not State.EJECTED and group.holds(mate) and mate.heard_s <= group.last_heard_s]
        is_anybody_left = any(other.state is not State.EJECTED and not group.holds(other) for other in self._watches.values())
        if not is_anybody_left:
            # Those that are accused themselves await their own verdict; nobody is ejected for its neighbours alone when nothing would remain.
            return []
        return [verdict for mate in doomed for verdict in self._eject(mate, group.evidence, now_s, 0.0)]

    def _vindicate(self, watch: Watch, now_s: float) -> None:
        """It answered rows."""
        if watch.state is State.SUSPECTED or (watch.state is State.ON_TRIAL and watch.is_tried):
            self._clear(watch, "it answered", now_s)
        elif watch.state is State.EJECTED and watch.num_ejections == 1 and watch.is_linked:
            self._pending.append(self._readmit(watch, "it resumed: late answers came", now_s))

    def _readmit(self, watch: Watch, evidence: str, now_s: float) -> Readmit:
        since_s = now_s - max(0.0, now_s - self._late_s - watch.state_since_s)
        del self._ejected[watch.actor]
        watch.enter(State.ON_TRIAL, now_s - self._late_s)
        return Readmit(watch.actor, evidence, since_s)

    def _clear(self, watch: Watch, evidence: str, now_s: float) -> None:
        self._casualties.forget(watch)
        watch.grievance = None
        watch.enter(State.HEALTHY, now_s - self._late_s)
        self._pending.append(Clear(watch.actor, evidence, now_s))

    def _take_pending(self) -> list[Verdict]:
        taken, self._pending = self._pending, []
        return taken
