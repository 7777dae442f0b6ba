"""Which shadows stay expanded: those that are needed until their replica is back or nobody asks any more. Rows for others are answered all the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from actors.core.memory import PASSING_EXPANSIONS, MeasuredMemory
from actors.expert_layouts import expert_forward, load_weights
from actors.shadow_workspace import LINGER_S
from cluster.core.errors import SlotsExhausted
from cluster.core.ids import Incarnation
from cluster.core.launch import Launch, actor_config
from cluster.core.link_frames import SegmentStatus
from cluster.core.spec import ClusterSpec, ShadowSpec
from kit.actor_bench import CPU, A, Bench, ask, started
from kit.experts import TIMEOUT_S, Ask, frame_of, rows_of
from kit.shadow_blobs import Expansions, S, ShadowBlobs, T, U, shadow

EXPANDED_MAX, IDLE_S = 2, 30.0
OK = SegmentStatus.OK


@pytest.fixture
def expansions() -> Expansions:
    return Expansions.opened()


@pytest.fixture
def bench(expansions: Expansions) -> Iterator[Bench]:
    for made in started(ShadowBlobs(), expansions, num_slots=6, expanded_max=EXPANDED_MAX, expanded_idle_s=IDLE_S):
        yield made
        expansions.gate.set()


def assert_answered(bench: Bench, *asks: Ask) -> None:
    bench.submit(*asks)
    result, body = bench.replies.next()
    assert [item.status for item in result.segments] == [OK] * len(asks)
    for found, one in zip(rows_of(result, body), asks, strict=True):
        assert torch.equal(torch.from_numpy(found.copy()), expert_forward(torch.from_numpy(one.rows), load_weights(bench.blobs.open(one.copy.version), CPU)))


def expanded(bench: Bench) -> int:
    return bench.runtime.expanded_bytes // bench.blobs.descriptor.num_bytes


def warm(bench: Bench, *copies: object) -> None:
    for copy in copies:
        bench.runtime.warm(copy)
        bench.wait_until(lambda: not bench.runtime._workspace.is_busy)


def test_needed_shadows_make_no_room_and_others_answer_the_same_without_it(bench: Bench, expansions: Expansions) -> None:
    bench.hold_copies(A, S, T, U)
    assert_answered(bench, ask(S))
    assert_answered(bench, ask(T))
    for seed in range(2):
        assert_answered(bench, ask(A, 2, seed), ask(U, 5, seed), ask(S, 3, seed), ask(U, 1, seed))
    assert expansions.done == [S.version, T.version]
    assert expansions.alone == [U.version] * 4
    assert (expanded(bench), bench.runtime.num_unexpanded) == (EXPANDED_MAX, 2)


def test_one_frame_that_needs_more_than_the_bound_keeps_it_too(bench: Bench) -> None:
    bench.hold_copies(S, T, U, A)
    bench.forward.hold()
    threading.Thread(target=assert_answered, args=(bench, *[ask(copy) for copy in (S, T, A, U, S)])).start()
    bench.forward.wait_until_entered()
    assert expanded(bench) == EXPANDED_MAX
    bench.forward.gate.set()
    bench.wait_until(lambda: len(bench.forward.calls) == 2 and bench.replies.is_empty)
    assert expanded(bench) == EXPANDED_MAX


def test_a_hint_does_not_drive_out_what_is_needed_and_is_not_counted(bench: Bench, expansions: Expansions) -> None:
    bench.hold_copies(S, T, U)
    warm(bench, S, T, U)
    bench.clock.now_s += IDLE_S - 1
    warm(bench, S, T)
    bench.clock.now_s += IDLE_S - 1
    warm(bench, U)
    assert expansions.done == [S.version, T.version]
    assert bench.runtime.num_unexpanded == 0


def test_of_those_that_nobody_has_asked_for_in_a_while_the_least_recently_used_makes_room(bench: Bench, expansions: Expansions) -> None:
    bench.hold_copies(S, T, U)
    for copy in (S, T, S):
        assert_answered(bench, ask(copy))
    bench.clock.now_s += IDLE_S
    assert_answered(bench, ask(U))
    assert expansions.done == [S.version, T.version, U.version]
    assert_answered(bench, ask(S))
    assert (expansions.alone, bench.runtime.num_unexpanded) == ([], 0)


def test_a_replica_that_is_back_gives_the_room_of_its_shadow_to_others_at_once_and_back_a_little_later(bench: Bench, expansions: Expansions) -> None:
    bench.hold_copies(S, T, U)
    warm(bench, S, T)
    bench.runtime.cool(S)
    assert expanded(bench) == EXPANDED_MAX
    warm(bench, U)
    assert expansions.done == [S.version, T.version, U.version]
    bench.runtime.cool(T)
    bench.clock.now_s += LINGER_S
    assert expanded(bench) == 1
    assert_answered(bench, ask(U))
    assert expansions.alone == []


def test_rows_that_come_after_all_keep_a_shadow_that_was_let_go(bench: Bench) -> None:
    bench.hold_copies(S)
    assert_answered(bench, ask(S))
    bench.runtime.cool(S)
    assert_answered(bench, ask(S))
    bench.clock.now_s += 10 * IDLE_S
    assert expanded(bench) == 1
    bench.runtime.cool(S)
    bench.clock.now_s += LINGER_S - 1
    bench.runtime.cool(S)  # another router says so later
    assert expanded(bench) == 1
    bench.clock.now_s += 1
    assert expanded(bench) == 0


def test_a_hint_that_is_taken_back_before_its_turn_expands_nothing(bench: Bench, expansions: Expansions) -> None:
    bench.hold_copies(S, T)
    expansions.gate.clear()
    bench.runtime.warm(S)
    assert expansions.entered.acquire(timeout=TIMEOUT_S)
    bench.runtime.warm(T)
    bench.runtime.cool(T)
    expansions.gate.set()
    bench.wait_until(lambda: not bench.runtime._workspace.is_busy)
    assert expansions.done == [S.version]


def test_what_a_frame_uses_is_not_let_go_under_it(bench: Bench) -> None:
    bench.hold_copies(S)
    bench.forward.hold()
    bench.submit(ask(S))
    bench.forward.wait_until_entered()
    bench.runtime.cool(S)
    bench.clock.now_s += LINGER_S
    assert expanded(bench) == 1
    bench.forward.gate.set()
    assert bench.statuses() == [OK]
    assert expanded(bench) == 0


def test_a_shadow_that_cannot_be_expanded_alone_fails_alone(bench: Bench, expansions: Expansions) -> None:
    bench.hold_copies(S, T, U)
    warm(bench, S, T)
    expansions.broken.add(U.version)
    bench.submit(ask(S), ask(U))
    assert bench.statuses() == [OK, SegmentStatus.OUT_OF_MEMORY]
    expansions.broken.clear()
    assert_answered(bench, ask(U))


def test_segments_cancelled_while_they_wait_are_not_expanded_alone(bench: Bench, expansions: Expansions) -> None:
    bench.hold_copies(A, S, T, U)
    warm(bench, S, T)
    bench.forward.hold()
    bench.submit(ask(A))
    bench.forward.wait_until_entered()
    frame, body = frame_of(ask(S), ask(U), frame_id=2)
    bench.runtime.submit(frame, body, bench.replies)
    bench.wait_until(lambda: not bench.runtime._workspace.is_busy)
    bench.runtime.cancel(frame, [1])
    bench.forward.gate.set()
    assert bench.statuses() == [OK]
    assert bench.statuses() == [OK, OK]
    assert expansions.alone == []


def test_on_a_device_room_for_the_expansions_of_what_is_held_is_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = ShadowBlobs()
    one, packed = blobs.descriptor.num_bytes, blobs.packed_bytes
    copies = [shadow(index) for index in range(4, 10)]
    room = 6 * packed + (EXPANDED_MAX + PASSING_EXPANSIONS) * one
    monkeypatch.setattr("actors.expert_runtime.measure_memory", lambda _device: MeasuredMemory(1 << 40, 1 << 40, is_device=True))
    for bench in started(blobs, num_slots=8, expanded_max=EXPANDED_MAX, memory_bytes=room):
        assert bench.runtime.capacity_bytes == room
        bench.hold_copies(*copies[:2])
        assert bench.runtime.capacity_bytes == room - 2 * one
        bench.hold_copies(*copies[2:])
        assert (bench.runtime.capacity_bytes, bench.runtime.used_bytes) == (6 * packed, 6 * packed)
        assert bench.runtime.expanded_max_bytes == EXPANDED_MAX * one
        with pytest.raises(SlotsExhausted, match=f"{4 * one} set aside for expanded shadows"):
            bench.runtime.assume(blobs.sized(A), 1)
        bench.runtime.release(copies, 1)
        assert bench.runtime.capacity_bytes == room
        bench.hold_copies(A)


def test_in_host_memory_nothing_is_set_aside(bench: Bench) -> None:
    bench.hold_copies(S, T, U)
    assert bench.runtime.capacity_bytes == bench.config.memory_bytes
    assert bench.runtime.expanded_max_bytes == EXPANDED_MAX * bench.blobs.descriptor.num_bytes


def test_of_several_models_the_one_that_wants_most_says_how_many_stay_expanded_and_for_how_long(tmp_path: Path) -> None:
    shadows = ({"expanded_max": 3, "expanded_idle_s": 20.0}, {"expanded_max": 4, "expanded_idle_s": 5.0}, None)
    models = [{"name": f"m{number}", "path": "unused", "shadow": shadow} for number, shadow in enumerate(shadows)]
    config = actor_config(ClusterSpec.model_validate({"models": models}), Launch(tmp_path), Incarnation("e-0", 1), 1)
    assert (config.expanded_max, config.expanded_idle_s) == (4, 20.0)
    alone = actor_config(ClusterSpec.model_validate({"models": models[2:]}), Launch(tmp_path), Incarnation("e-0", 1), 1)
    assert (alone.expanded_max, alone.expanded_idle_s) == (ShadowSpec().expanded_max, ShadowSpec().expanded_idle_s)
