"""Hints that rows for a shadow are likely: it is expanded beside the compute thread, within the workspace's bound, and nothing else happens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from actors.expert_actor import hinted_copy
from cluster.core.ids import CopyId, Role
from cluster.core.link_frames import SegmentStatus, Warm
from kit.actor_bench import A, Bench, ask, started
from kit.experts import TIMEOUT_S
from kit.shadow_blobs import Expansions, S, ShadowBlobs, T, U, shadow

EXPANDED_MAX = 2
OK = SegmentStatus.OK


@pytest.fixture
def expansions() -> Expansions:
    return Expansions.opened()


@pytest.fixture
def bench(expansions: Expansions) -> Iterator[Bench]:
    for made in started(ShadowBlobs(), expansions, num_slots=6, expanded_max=EXPANDED_MAX):
        yield made
        expansions.gate.set()


def expanded(bench: Bench) -> int:
    return bench.runtime.expanded_bytes // bench.blobs.descriptor.num_bytes


def test_a_hint_expands_a_held_shadow_once_and_its_rows_find_it_expanded(bench: Bench, expansions: Expansions) -> None:
    bench.hold_copies(S)
    bench.runtime.warm(S)
    bench.wait_until(lambda: expanded(bench) == 1)
    bench.runtime.warm(S)
    bench.submit(ask(S))
    assert bench.statuses() == [OK]
    assert expansions.done == [S.version]


def test_an_expansion_on_a_hint_says_that_it_is_loading_and_holds_up_no_frame(bench: Bench, expansions: Expansions) -> None:
    bench.hold_copies(A, S)
    bench.wait_until(lambda: not bench.runtime.progress().is_loading)
    expansions.gate.clear()
    bench.runtime.warm(S)
    assert expansions.entered.acquire(timeout=TIMEOUT_S)
    assert bench.runtime.progress().is_loading
    bench.submit(ask(A))
    assert bench.statuses() == [OK]
    expansions.gate.set()
    bench.wait_until(lambda: not bench.runtime.progress().is_loading)
    assert expanded(bench) == 1


def test_hints_about_what_is_not_held_or_needs_no_expansion_do_nothing(bench: Bench, expansions: Expansions) -> None:
    bench.hold_copies(A, S)
    for copy in (A, U, CopyId(S.expert, "ff" * 32, Role.SHADOW), CopyId(S.expert, S.version, Role.REPLICA)):
        bench.runtime.warm(copy)
    bench.runtime.warm(S)
    bench.wait_until(lambda: expanded(bench) == 1)
    assert expansions.done == [S.version]


def test_more_hints_than_the_workspace_has_room_for_are_dropped_and_it_stays_within_its_bound(bench: Bench, expansions: Expansions) -> None:
    copies = [S, T, U, shadow(7)]
    bench.hold_copies(*copies)
    expansions.gate.clear()
    bench.runtime.warm(S)
    assert expansions.entered.acquire(timeout=TIMEOUT_S)
    for copy in copies[1:]:
        bench.runtime.warm(copy)
    expansions.gate.set()
    bench.wait_until(lambda: not bench.runtime.progress().is_loading)
    assert expansions.done == [S.version, T.version]
    assert expanded(bench) == EXPANDED_MAX


def test_rows_that_wait_go_before_hints(bench: Bench, expansions: Expansions) -> None:
    bench.hold_copies(S, T, U)
    expansions.gate.clear()
    bench.runtime.warm(S)
    assert expansions.entered.acquire(timeout=TIMEOUT_S)
    bench.runtime.warm(T)
    bench.submit(ask(U))
    expansions.gate.set()
    assert bench.statuses() == [OK]
    bench.wait_until(lambda: not bench.runtime.progress().is_loading)
    assert expansions.done == [S.version, U.version]


def test_a_shadow_released_after_its_hint_is_not_kept(bench: Bench, expansions: Expansions) -> None:
    bench.hold_copies(S, T)
    expansions.gate.clear()
    bench.runtime.warm(T)
    assert expansions.entered.acquire(timeout=TIMEOUT_S)
    bench.runtime.warm(S)
    bench.runtime.release([S, T], 2)
    bench.wait_until(lambda: bench.state(S) is None)
    expansions.gate.set()
    bench.wait_until(lambda: not bench.runtime.progress().is_loading)
    assert bench.runtime.expanded_bytes == 0


def test_the_frame_names_the_shadow() -> None:
    assert hinted_copy(Warm(S.expert.model, S.expert.layer, S.expert.index, bytes.fromhex(S.version))) == S
