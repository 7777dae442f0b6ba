"""Which copy serves: power of two choices among replicas, a shadow last, never one that was tried."""

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core.ids import Role
from kit.lanes import copy_on
from kit.pipelines import version_of
from router_service.core.balance import Pace, pick_copy

COPIES = [copy_on(f"a{place}", "0" * 64, role=Role.REPLICA if place < 4 else Role.SHADOW) for place in range(6)]
SUBSETS = st.sets(st.sampled_from(COPIES))


@settings(deadline=None, max_examples=300)
@given(SUBSETS, SUBSETS, st.booleans(), st.integers(0, 99))
def test_a_copy_is_found_whenever_one_is_allowed_and_it_is_an_allowed_one(here: set, tried: set, exact: bool, seed: int) -> None:
    copies = sorted(here, key=COPIES.index)
    picked = pick_copy(copies, tried=tried, exact=exact, burden=lambda _: 0, rng=random.Random(seed))
    replicas = [copy for copy in copies if copy not in tried and copy.role is Role.REPLICA]
    shadows = [copy for copy in copies if copy not in tried and copy.role is Role.SHADOW]
    if replicas:
        assert picked in replicas
    elif shadows and not exact:
        assert picked in shadows
    else:
        assert picked is None


def test_the_longest_queue_is_never_picked_and_short_ones_are_shared() -> None:
    queues = {"a0": 100, "a1": 5, "a2": 5, "a3": 5}
    rng = random.Random(1)
    picked = Counter(pick_copy(COPIES[:4], burden=queues.__getitem__, rng=rng).incarnation.actor_id for _ in range(600))
    assert picked["a0"] == 0
    assert min(picked[name] for name in ("a1", "a2", "a3")) > 150


def test_equal_queues_are_shared_evenly() -> None:
    rng = random.Random(2)
    picked = Counter(pick_copy(COPIES[:4], burden=lambda _: 0, rng=rng).incarnation.actor_id for _ in range(800))
    assert min(picked.values()) > 140


def test_the_same_seed_picks_the_same_copies() -> None:
    def picks(seed: int) -> list:
        rng = random.Random(seed)
        return [pick_copy(COPIES[:4], burden=lambda _: 0, rng=rng) for _ in range(20)]

    assert picks(3) == picks(3)
    assert picks(3) != picks(4)


def test_a_replica_ten_times_slower_gets_few_of_the_requests_and_is_tried_again_when_time_has_passed() -> None:
    paces, rng, clock, picked = {"fast": Pace(), "slow": Pace()}, random.Random(0), [0.0], Counter()
    copies = [copy_on("fast", version_of(0)), copy_on("slow", version_of(0))]
    for _ in range(1000):
        chosen = pick_copy(copies, burden=lambda name: paces[name].frame_s(clock[0]), rng=rng).incarnation.actor_id
        picked[chosen] += 1
        took_s = 0.1 if chosen == "slow" else 0.01
        clock[0] += took_s
        paces[chosen].learn(took_s, clock[0])
    assert 1 <= picked["slow"] <= 20


def test_a_pace_rises_at_once_falls_slowly_and_fades() -> None:
    pace = Pace()
    assert pace.frame_s(0.0) == 0.0
    pace.learn(0.01, 0.0)
    pace.learn(0.5, 0.1)
    assert pace.frame_s(0.1) == 0.5
    pace.learn(0.01, 0.1)
    assert 0.3 < pace.frame_s(0.1) < 0.5
    assert pace.frame_s(60.0) < 1e-4
