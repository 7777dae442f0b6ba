"""Liveness on a manual clock: actors that answer pings at once unless told otherwise, and a log of every verdict."""

from __future__ import annotations

from router_service.core.liveness import Liveness
from router_service.core.verdicts import LivenessLimits, State, Verdict

TICK_S = 0.020000001  # a shade over: what is due after five ticks is due then
LIMITS = LivenessLimits(eject_s=0.2)  # ten ticks


class Observed:
    """Actors `NODE/NAME` (device cpu) or `NODE/DEVICE/NAME`. Those in `silent` say nothing; the others answer pings, `frames_done` as it stands."""

    def __init__(self, *actors: str, limits: LivenessLimits | None = None) -> None:
        self.limits = limits or LIMITS
        self.liveness = Liveness(self.limits)
        self.now_s = 100.0
        self.silent: set[str] = set()
        self.loading: set[str] = set()
        self.frames_done: dict[str, int] = {}
        self.log: list[Verdict] = []
        for actor in actors:
            self.join(actor)

    def join(self, actor: str) -> None:
        node_id, *device, _ = actor.split("/")
        self.frames_done.setdefault(actor, 0)
        self.liveness.joined(actor, node_id, device[0] if device else "cpu", self.now_s)

    def send(self, *actors: str, rows: int = 8) -> None:
        for actor in actors:
            self.liveness.sent(actor, rows, self.now_s)

    def answer(self, *actors: str, rows: int = 8, took_s: float = 0.005) -> None:
        for actor in actors:
            self.frames_done[actor] += 1
            self.liveness.heard(actor, self.now_s)
            self.liveness.answered(actor, rows, took_s, self.now_s)

    def warm_up(self, *actors: str, rows: int = 8, took_s: float = 0.005, frames: int = 20) -> None:
        """Frames answered promptly: the usual pace is known."""
        for _ in range(frames):
            self.send(*actors, rows=rows)
            self.now_s += took_s
            self.answer(*actors, rows=rows, took_s=took_s)

    def lose(self, actor: str) -> list[Verdict]:
        verdicts = self.liveness.lost(actor, self.now_s)
        self.log += verdicts
        return verdicts

    def tick(self, late_s: float = 0.0) -> list[Verdict]:
        for actor in self.liveness.to_probe(self.now_s):
            if actor not in self.silent:
                self.pong(actor)
        verdicts = self.liveness.tick(self.now_s, late_s=late_s)
        self.log += verdicts
        return verdicts

    def pong(self, actor: str) -> None:
        self.liveness.heard(actor, self.now_s, frames_done=self.frames_done[actor], oldest_age_s=0.1, queued_rows=8, is_loading=actor in self.loading)

    def wait(self, duration_s: float) -> list[Verdict]:
        """Time passes, judged every 20 ms."""
        verdicts: list[Verdict] = []
        for _ in range(round(duration_s / TICK_S)):
            self.now_s += TICK_S
            verdicts += self.tick()
        return verdicts

    def states(self) -> dict[str, State]:
        return {actor: self.liveness.state(actor) for actor in self.frames_done}

    def ejected(self) -> set[str]:
        return {actor for actor, state in self.states().items() if state is State.EJECTED}


def kinds(verdicts: list[Verdict], actor: str | None = None) -> list[str]:
    """The verdicts' names, of one actor if it is named."""
    return [type(verdict).__name__ for verdict in verdicts if actor in {None, verdict.actor}]
