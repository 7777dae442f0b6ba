"""The fault port: faults need permission and a token, do what they say, are counted where they strike, and end by themselves or when healed."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from actors.core.faults import ActiveFaults, DropReplies, FlipOutputs, LateReplies, RaiseForward, StuckCompute, parse_fault, pick_bit
from actors.expert_runtime import ExpertRuntime
from actors.fault_port import FaultPort
from cluster.core.errors import InvalidRequest
from cluster.core.ids import Incarnation
from cluster.core.link_frames import Fault, SegmentStatus, derive_fault_token, derive_link_key, fault_token_of
from cluster.core.status import SlotState
from kit.actor_bench import CPU, A, B, Bench, ask, started
from kit.experts import TIMEOUT_S, RandomBlobs, Replies, frame_of, rows_of

OK, WRONG = SegmentStatus.OK, SegmentStatus.WRONG_NUMBERS
ME = Incarnation("e-0", 1)
TOKEN = derive_fault_token(b"secret", ME)


class Chaos:
    """A bench whose runtime has a fault port."""

    def __init__(self, **overrides: object) -> None:
        self.left: list[int] = []
        self.has_left = threading.Event()
        self.port = FaultPort(ME, TOKEN, leave=self._leave)
        self.bench = Bench(**overrides)
        assert self.bench.runtime.stop(TIMEOUT_S)
        self.bench.runtime = ExpertRuntime(
            self.bench.config, self.bench.blobs, CPU, forward=self.bench.forward, clock=self.bench.clock, hinder=self.port.hinder
        )
        self.port.attach(self.bench.runtime)
        self.bench.runtime.start(TIMEOUT_S)
        self._submit = self.port.hinder_submit(self.bench.runtime.submit)

    def _leave(self, code: int) -> None:
        self.left.append(code)
        self.has_left.set()

    def play(self, fault: str, **settings: object) -> str:
        reply = self.port.answer(Fault(TOKEN, fault, json.dumps(settings)))
        assert reply.ok, reply.message
        return reply.message

    def state(self) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = json.loads(self.play("state"))
        return found

    def send(self, *asks: object, frame_id: int = 1) -> None:
        frame, body = frame_of(*asks, frame_id=frame_id)  # type: ignore[arg-type]
        self._submit(frame, body, self.bench.replies)

    def statuses(self, *asks: object) -> list[SegmentStatus]:
        self.send(*asks)
        return self.bench.statuses()


def opened(**overrides: object) -> Iterator[Chaos]:
    made = Chaos(**overrides)
    yield made
    made.port.heal()
    made.bench.forward.gate.set()
    assert made.bench.runtime.stop(TIMEOUT_S)


@pytest.fixture
def chaos() -> Iterator[Chaos]:
    yield from opened(abft_fraction=0.0)


@pytest.fixture
def checked() -> Iterator[Chaos]:
    yield from opened(abft_fraction=1.0)


def test_a_stuck_compute_thread_ages_its_oldest_frame_finishes_none_and_goes_on_when_healed(chaos: Chaos) -> None:
    bench = chaos.bench
    bench.hold_copies(A)
    assert chaos.statuses(ask(A)) == [OK]
    bench.wait_until(lambda: bench.runtime.progress().frames_done == 1)
    chaos.play("stuck_compute", seconds=60)
    chaos.send(ask(A), frame_id=2)
    chaos.send(ask(A), frame_id=3)
    bench.wait_until(lambda: chaos.state()["struck"].get("stuck_compute") == 1)
    for age_s in (1.5, 3.0):
        bench.clock.now_s += 1.5
        assert bench.runtime.progress() == (1, age_s, 6, False)
    assert bench.replies.is_empty
    chaos.play("heal")
    assert [bench.statuses(), bench.statuses()] == [[OK], [OK]]
    bench.wait_until(lambda: bench.runtime.progress() == (3, 0.0, 0, False))
    assert chaos.state() == {"active": {}, "struck": {"stuck_compute": 1}}


def test_a_fault_ends_by_itself_when_nobody_heals_it(chaos: Chaos) -> None:
    chaos.bench.hold_copies(A)
    chaos.play("stuck_compute", seconds=0.05)
    assert chaos.statuses(ask(A)) == [OK]
    chaos.play("nan_weights", seconds=0.05)
    chaos.bench.wait_until(lambda: chaos.state()["active"] == {})
    asked = ask(A)
    chaos.send(asked)
    result, body = chaos.bench.replies.next()
    assert np.array_equal(rows_of(result, body)[0], chaos.bench.expected(asked).numpy())
    assert result.segments[0].status is OK


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_spoilt_weights_are_a_private_copy_of_one_expert_and_healing_gives_the_old_ones_back(chaos: Chaos, value: str) -> None:
    bench = chaos.bench
    bench.hold_copies(A, B)
    before = {copy: bench.runtime._weights[copy] for copy in (A, B)}
    mapped = {name: tensor.clone() for name, tensor in before[B].tensors.items()}
    chaos.play("nan_weights", model="tiny", layer=0, index=1, value=value)
    chaos.send(ask(A), ask(B))
    result, body = bench.replies.next()
    rows = rows_of(result, body)
    assert np.isfinite(rows[0]).all()
    assert not np.isfinite(rows[1][:, 0]).any()
    assert all(torch.equal(before[B].tensors[name], tensor) for name, tensor in mapped.items())
    assert chaos.state()["struck"] == {"nan_weights": 1}
    chaos.play("heal")
    assert {copy: bench.runtime._weights[copy] for copy in (A, B)} == before


def test_checksums_catch_spoilt_weights_and_the_copy_can_be_loaded_again(checked: Chaos) -> None:
    bench = checked.bench
    bench.hold_copies(A, B)
    checked.play("nan_weights", index=0)
    assert checked.statuses(ask(A), ask(B)) == [WRONG, OK]
    bench.wait_until(lambda: bench.state(A) is SlotState.FAILED)
    bench.hold_copies(A, epoch=2)
    assert checked.statuses(ask(A), ask(B)) == [OK, OK]
    assert checked.state()["struck"] == {"nan_weights": 1}
    checked.play("heal")
    assert checked.statuses(ask(A), ask(B)) == [OK, OK]


def test_flipped_weights_are_the_same_for_the_same_seed_and_are_noticed(checked: Chaos) -> None:
    bench = checked.bench
    bench.hold_copies(A)
    original = bench.runtime._weights[A]
    found = []
    for _ in range(2):
        checked.play("flip_weights", seed=5, flips=200, bits="exponent")
        found.append({name: tensor.clone() for name, tensor in bench.runtime._weights[A].tensors.items()})
        checked.play("heal")
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not all(torch.equal(found[0][name], original.tensors[name]) for name in found[0])
    checked.play("flip_weights", seed=5, flips=200, bits="exponent")
    assert checked.statuses(ask(A)) == [WRONG]


def test_flipped_outputs_are_counted_and_caught(checked: Chaos) -> None:
    checked.bench.hold_copies(A)
    checked.play("flip_outputs", seed=1, rate=1.0, bits="exponent")
    statuses = [checked.statuses(ask(A))[0] for _ in range(20)]
    assert statuses.count(WRONG) > 10
    assert checked.state()["struck"] == {"flip_outputs": 20}
    checked.play("heal")
    assert checked.statuses(ask(A)) == [OK]
    assert checked.bench.state(A) is SlotState.READY


def test_dropped_replies_leave_only_when_healed_and_late_ones_after_their_delay(chaos: Chaos) -> None:
    bench = chaos.bench
    bench.hold_copies(A)
    chaos.play("drop_replies", count=1)
    chaos.send(ask(A), frame_id=1)
    chaos.send(ask(A), frame_id=2)
    assert bench.replies.next()[0].frame_id == 2
    chaos.play("heal")
    assert bench.replies.next()[0].frame_id == 1
    chaos.play("late_replies", delay_s=0.02, count=1)
    chaos.send(ask(A), frame_id=3)
    chaos.send(ask(A), frame_id=4)
    assert [bench.replies.next()[0].frame_id for _ in range(2)] == [4, 3]
    chaos.play("late_replies", delay_s=30)
    chaos.send(ask(A), frame_id=5)
    bench.wait_until(lambda: chaos.state()["struck"]["late_replies"] == 2)
    chaos.play("heal")
    assert bench.replies.next()[0].frame_id == 5
    assert bench.replies.is_empty


def test_raising_refusing_and_slowing_strike_frames_and_count_them(chaos: Chaos) -> None:
    bench = chaos.bench
    bench.hold_copies(A, B)
    chaos.play("raise_forward", count=1)
    chaos.send(ask(A), ask(B))
    result, _ = bench.replies.next()
    assert [(item.status, item.message) for item in result.segments] == [(SegmentStatus.FAULTED, "InjectedFault")] * 2
    assert chaos.statuses(ask(A), ask(B)) == [OK, OK]
    chaos.play("refuse_all")
    assert chaos.statuses(ask(A)) == [SegmentStatus.OVERLOADED]
    chaos.play("heal")
    chaos.play("slow_compute", factor=2)
    assert chaos.statuses(ask(A)) == [OK]
    assert chaos.state()["struck"] == {"raise_forward": 1, "refuse_all": 1, "slow_compute": 1}


def test_a_balloon_is_filled_and_let_go_and_an_exit_ends_the_process_with_its_code(chaos: Chaos) -> None:
    chaos.play("balloon", bytes=1 << 20)
    assert chaos.port._balloon is not None
    assert chaos.port._balloon.nbytes == 1 << 20
    chaos.play("heal")
    assert chaos.port._balloon is None
    chaos.play("exit", code=7)
    assert chaos.has_left.wait(TIMEOUT_S)
    assert chaos.left == [7]


@pytest.mark.parametrize("token", [b"", TOKEN[:-1], derive_fault_token(b"secret", Incarnation("e-0", 2)), derive_link_key(b"secret", ME)])
def test_a_wrong_token_is_refused_and_does_nothing(chaos: Chaos, token: bytes) -> None:
    reply = chaos.port.answer(Fault(token, "refuse_all", "{}"))
    assert not reply.ok
    assert reply.message.startswith("UNAUTHENTICATED: the fault token is not that of e-0")
    assert chaos.state() == {"active": {}, "struck": {}}


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("melt", "{}", "there is no fault of this name"),
        ("slow_compute", "{}", "factor"),
        ("slow_compute", '{"factor": 0.5}', "factor"),
        ("stuck_compute", '{"seconds": 121}', "seconds"),
        ("stuck_compute", '{"second": 1}', "second"),
        ("flip_outputs", '{"rate": 2}', "rate"),
        ("balloon", '{"bytes": 0}', "bytes"),
        ("exit", "[]", "settings"),
        ("exit", "not json", "settings"),
    ],
)
def test_a_fault_that_is_not_understood_is_refused_and_names_the_setting(chaos: Chaos, name: str, settings: str, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        parse_fault(name, settings)
    reply = chaos.port.answer(Fault(TOKEN, name, settings))
    assert not reply.ok
    assert told in reply.message


def test_weights_that_are_not_held_here_cannot_be_spoilt(chaos: Chaos) -> None:
    chaos.bench.hold_copies(A)
    reply = chaos.port.answer(Fault(TOKEN, "nan_weights", '{"index": 1}'))
    assert (reply.ok, reply.message.split(":")[0]) == (False, "NOT_FOUND")
    chaos.play("nan_weights", index=0)
    assert not chaos.port.answer(Fault(TOKEN, "flip_weights", '{"index": 0}')).ok


def test_the_token_follows_from_the_link_key_and_differs_by_generation() -> None:
    assert fault_token_of(derive_link_key(b"secret", ME), ME) == TOKEN
    assert len({TOKEN, derive_link_key(b"secret", ME), derive_fault_token(b"secret", Incarnation("e-0", 2)), derive_fault_token(b"other", ME)}) == 4


def test_faults_expire_and_counted_ones_strike_so_often_and_no_more() -> None:
    faults = ActiveFaults()
    faults.add(StuckCompute(seconds=2), 10.0)
    faults.add(RaiseForward(count=2), 10.0)
    assert [faults.on_frame(now_s).raises for now_s in (10.0, 11.0, 11.5)] == [True, True, False]
    assert [faults.is_stuck(now_s) for now_s in (11.9, 12.0)] == [True, False]
    assert faults.next_expiry_s() == 12.0
    assert faults.expire(12.0) == (StuckCompute(seconds=2),)
    assert faults.next_expiry_s() == 130.0
    assert faults.state(12.0) == {"active": {"raise_forward": 118.0}, "struck": {"stuck_compute": 3, "raise_forward": 2}}
    assert faults.heal() == (RaiseForward(count=2),)


def test_replies_suffer_what_is_active_and_dropping_goes_before_delay() -> None:
    faults = ActiveFaults()
    assert faults.on_reply(5.0) == 5.0
    faults.add(LateReplies(delay_s=2.0), 5.0)
    assert faults.on_reply(5.0) == 7.0
    faults.add(DropReplies(count=1), 5.0)
    assert [faults.on_reply(5.0), faults.on_reply(5.0)] == [None, 7.0]


def test_a_share_of_frames_is_flipped_the_same_ones_for_the_same_seed() -> None:
    picked = []
    for _ in range(2):
        faults = ActiveFaults()
        faults.add(FlipOutputs(seed=4, rate=0.25), 0.0)
        picked.append([faults.on_frame(0.0).flips is not None for _ in range(400)])
    assert picked[0] == picked[1]
    assert 60 < sum(picked[0]) < 140


@pytest.mark.parametrize(("itemsize", "dtype"), [(2, torch.bfloat16), (2, torch.float16), (4, torch.float32)])
def test_a_flipped_exponent_changes_a_number_by_at_least_half(itemsize: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    draw = random.Random(3)
    for _ in range(50):
        values = torch.from_numpy(1 + rng.random(8)).to(dtype)
        right = values.clone()
        byte, bit = pick_bit(draw, 8, itemsize, "exponent")
        values.view(torch.uint8)[byte] ^= 1 << bit
        changed = (values.double() - right.double()).abs() / right.double()
        # What becomes NaN is not below it either.
        assert [bool(item < 0.5) for item in changed].count(False) == 1


def test_an_actor_without_chaos_has_nothing_between_its_thread_and_its_forward() -> None:
    from actors.frame_forward import FrameForward

    for bench in started(RandomBlobs()):
        assert type(bench.runtime._compute._forward._runner) is FrameForward
        assert isinstance(bench.replies, Replies)
