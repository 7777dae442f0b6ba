from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from actors.body_pool import BodyPool


def test_a_released_buffer_is_used_again() -> None:
    pool = BodyPool(num_kept=2)
    first = pool.take(100_000)
    pool.release(first)
    again = pool.take(90_000)
    assert again.obj is first.obj
    assert again.nbytes == 90_000


def test_two_bodies_never_share_memory() -> None:
    pool = BodyPool(num_kept=2)
    first, second = pool.take(100), pool.take(100)
    assert first.obj is not second.obj


def test_large_buffers_are_not_kept() -> None:
    pool = BodyPool(num_kept=2, max_kept_bytes=1 << 20)
    pool.release(pool.take(2 << 20))
    assert pool.kept_bytes == 0


def test_foreign_buffers_are_not_kept() -> None:
    pool = BodyPool(num_kept=2)
    pool.release(memoryview(b""))
    assert pool.kept_bytes == 0


def test_a_pool_of_small_buffers_makes_room_for_a_larger_one() -> None:
    pool = BodyPool(num_kept=1)
    pool.release(pool.take(10))
    pool.release(pool.take(500_000))
    assert pool.kept_bytes >= 500_000


@given(st.lists(st.integers(1, 300_000), max_size=30), st.integers(1, 4))
def test_every_size_is_served_and_what_is_kept_is_bounded(sizes: list[int], num_kept: int) -> None:
    pool = BodyPool(num_kept=num_kept, max_kept_bytes=200_000)
    for size in sizes:
        body = pool.take(size)
        assert body.nbytes == size
        assert not body.readonly
        pool.release(body)
        assert pool.kept_bytes <= num_kept * 200_000
