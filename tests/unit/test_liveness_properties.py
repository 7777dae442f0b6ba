"""Whatever happens, in any order: what liveness may never say."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import example, given, settings
from hypothesis import strategies as st

from router_service.core.liveness import Liveness
from router_service.core.verdicts import Clear, Eject, LivenessLimits, Readmit, State, Suspect, Verdict

ACTORS = tuple(f"n{node}/a{index}" for node in range(3) for index in range(2))
LIMITS = LivenessLimits()
actors = st.sampled_from(ACTORS)
steps_s = st.floats(0.001, 0.4)
events = st.one_of(
    st.tuples(st.just("send"), actors),
    st.tuples(st.just("answer"), actors),
    st.tuples(st.just("pong"), actors),
    st.tuples(st.just("loading"), actors),
    st.tuples(st.just("lose"), actors),
    st.tuples(st.just("join"), actors),
    st.tuples(st.just("wait"), steps_s),
    st.tuples(st.just("pause"), st.floats(0.1, 5.0)),
)


@dataclass
class Books:
    """A plain account beside the real one: who owes what, who is linked, who said it was loading; and the rules for each verdict."""

    liveness: Liveness = field(default_factory=lambda: Liveness(LIMITS))
    now_s: float = 50.0
    owed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ACTORS, 0))
    linked: set[str] = field(default_factory=lambda: set(ACTORS))
    loading: set[str] = field(default_factory=set)
    awake_s: dict[str, float] = field(default_factory=dict)  # since when each has owed without a word, in time that the observer ran
    tries: dict[str, int] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=lambda: dict.fromkeys(ACTORS, State.HEALTHY))

    def __post_init__(self) -> None:
        for actor in ACTORS:
            self.liveness.joined(actor, actor[:2], "cpu", self.now_s)

    def step(self, kind: str, what: str | float) -> None:
        if isinstance(what, float):
            self.pass_time(what, late_s=what if kind == "pause" else 0.0)
            return
        actor = what
        if kind == "send" and actor in self.linked and self.liveness.may_send(actor):
            if self.liveness.state(actor) is State.ON_TRIAL:
                self.tries[actor] = self.tries.get(actor, 0) + 1
                assert self.tries[actor] == 1, "a second frame on trial"
            self.awake_s.setdefault(actor, 0.0)
            self.owed[actor] += 1
            self.liveness.sent(actor, 4, self.now_s)
        elif kind == "answer" and self.owed[actor] and actor in self.linked:
            self.owed[actor] -= 1
            self.quieten(actor)
            before = self.liveness.state(actor)
            self.liveness.answered(actor, 4, 0.01, self.now_s)
            after = self.liveness.state(actor)
            assert after is not State.SUSPECTED
            assert before is not State.EJECTED or after in {State.EJECTED, State.ON_TRIAL}
        elif kind in {"pong", "loading"} and actor in self.linked:
            before = self.liveness.state(actor)
            self.quieten(actor)
            (self.loading.add if kind == "loading" else self.loading.discard)(actor)
            self.liveness.heard(actor, self.now_s, frames_done=0, is_loading=kind == "loading")
            assert self.liveness.state(actor) is before, "a Pong changes no state by itself"
        elif kind == "lose" and actor in self.linked:
            self.linked.discard(actor)
            self.take(self.liveness.lost(actor, self.now_s))
            assert self.liveness.state(actor) is State.EJECTED
            self.owed[actor] = 0
        elif kind == "join" and actor not in self.linked:
            self.linked.add(actor)
            self.loading.discard(actor)
            self.awake_s.pop(actor, None)
            self.liveness.joined(actor, actor[:2], "cpu", self.now_s)
            assert self.liveness.state(actor) is State.EJECTED, "a fresh link alone is no proof"

    def quieten(self, actor: str) -> None:
        if self.owed[actor]:
            self.awake_s[actor] = 0.0
        else:
            self.awake_s.pop(actor, None)

    def pass_time(self, duration_s: float, *, late_s: float) -> None:
        self.now_s += duration_s
        for actor in self.awake_s:
            self.awake_s[actor] += duration_s - late_s
        self.take(self.liveness.tick(self.now_s, late_s=late_s))

    def take(self, verdicts: list[Verdict]) -> None:
        for verdict in verdicts:
            actor = verdict.actor
            assert verdict.since_s <= self.now_s + 1e-9
            before = self.states[actor]
            match verdict:
                case Suspect():
                    assert before is State.HEALTHY
                    assert self.owed[actor], "it owes nothing"
                    assert actor not in self.loading or self.awake_s[actor] >= LIMITS.loading_grace_s, "it is loading"
                    self.states[actor] = State.SUSPECTED
                case Eject():
                    assert before is not State.EJECTED
                    is_own_fault = not verdict.evidence.startswith(("its link", "node "))
                    assert not is_own_fault or self.owed[actor], "it owes nothing"
                    assert "silent for" not in verdict.evidence or self.awake_s[actor] >= LIMITS.suspect_s - 1e-9
                    self.states[actor] = State.EJECTED
                case Readmit():
                    assert before is State.EJECTED
                    assert actor in self.linked
                    self.states[actor] = State.ON_TRIAL
                    self.tries[actor] = 0
                case Clear():
                    assert before in {State.SUSPECTED, State.ON_TRIAL}
                    self.states[actor] = State.HEALTHY

    def check(self) -> None:
        """After its verdicts are told, nobody's state is news."""
        self.take(self.liveness.tick(self.now_s, late_s=0.0))
        assert {actor: self.liveness.state(actor) for actor in ACTORS} == self.states


@settings(max_examples=300, deadline=None)
@given(st.lists(events, max_size=60))
@example([("send", ACTORS[0]), ("wait", 0.25), ("answer", ACTORS[0]), ("lose", ACTORS[0])])
@example([("send", ACTORS[0]), ("wait", 0.35), ("answer", ACTORS[0]), ("lose", ACTORS[1])])
def test_verdicts_follow_from_each_other_and_accuse_only_those_that_owe(steps: list[tuple[str, str | float]]) -> None:
    books = Books()
    for kind, what in steps:
        books.step(kind, what)
    books.check()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(st.tuples(st.just("send"), actors), st.tuples(st.just("pong"), actors), st.tuples(st.just("pause"), st.floats(0.0, 60.0))), max_size=40)
)
def test_time_in_which_the_observer_did_not_run_accuses_nobody(steps: list[tuple[str, str | float]]) -> None:
    books = Books()
    for kind, what in steps:
        books.step(kind, what)
    assert set(books.states.values()) == {State.HEALTHY}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(st.tuples(st.just("send"), actors), st.tuples(st.just("answer"), actors), st.tuples(st.just("wait"), st.floats(0.0, 0.05))), max_size=80)
)
def test_over_half_are_never_ejected_for_silence(steps: list[tuple[str, str | float]]) -> None:
    books = Books()
    for kind, what in steps:
        books.step(kind, what)
    for _ in range(40):
        books.step("wait", 0.02)
    ejected_for_silence = [actor for actor, state in books.states.items() if state is State.EJECTED]
    assert len(ejected_for_silence) <= len(ACTORS) // 2


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(actors, st.integers(1, 64), st.floats(0.0005, 0.09)), min_size=1, max_size=60))
def test_actors_that_answer_in_time_are_never_accused(frames: list[tuple[str, int, float]]) -> None:
    liveness, now_s = Liveness(LIMITS), 10.0
    for actor in ACTORS:
        liveness.joined(actor, actor[:2], "cpu", now_s)
    for actor, num_rows, took_s in frames:
        liveness.sent(actor, num_rows, now_s)
        now_s += took_s
        assert liveness.tick(now_s, late_s=0.0) == []
        liveness.answered(actor, num_rows, took_s, now_s)
        now_s += 5.0
        assert liveness.tick(now_s, late_s=0.0) == []


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4096), st.floats(1e-5, 2e-3), st.integers(8, 60))
def test_the_pace_is_learned_within_a_factor(num_rows: int, s_per_row: float, num_frames: int) -> None:
    """Once large frames have been seen, a frame of twice the usual time is forgiven and one of many times is not."""
    liveness, now_s = Liveness(LIMITS), 10.0
    for actor in ACTORS:
        liveness.joined(actor, actor[:2], "cpu", now_s)
    took_s = 0.005 + num_rows * s_per_row
    for _ in range(num_frames):
        liveness.sent(ACTORS[0], num_rows, now_s)
        now_s += took_s
        liveness.answered(ACTORS[0], num_rows, took_s, now_s)
    liveness.sent(ACTORS[0], num_rows, now_s)
    now_s += 2 * took_s
    liveness.heard(ACTORS[0], now_s, frames_done=7)
    assert liveness.tick(now_s, late_s=0.0) == []
    prior_s = LIMITS.prior_rows * LIMITS.prior_s_per_row * num_rows / (LIMITS.prior_rows + num_rows * num_frames)
    now_s += 5 * (took_s + LIMITS.pace_floor_s + prior_s) + LIMITS.eject_s
    liveness.heard(ACTORS[0], now_s, frames_done=7)
    assert [type(verdict) for verdict in liveness.tick(now_s, late_s=0.0)] == [Eject]
