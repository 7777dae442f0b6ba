"""One heavy step in each turn of the loop: in order, without delay when nobody else waits, and a caller that gave up keeps nobody waiting."""

from __future__ import annotations

import asyncio

import pytest

from router_service.turns import Turns


async def test_steps_that_come_together_are_spread_over_turns_in_their_order() -> None:
    turns, loop_turns = Turns(), [0]
    seen: list[tuple[int, int]] = []

    def count() -> None:
        loop_turns[0] += 1
        asyncio.get_running_loop().call_soon(count)

    async def step(number: int) -> None:
        await turns.take()
        seen.append((number, loop_turns[0]))

    count()
    await asyncio.gather(*(step(number) for number in range(5)))
    assert [number for number, _ in seen] == [0, 1, 2, 3, 4]
    assert len({turn for _, turn in seen}) == 5


async def test_a_step_alone_does_not_wait() -> None:
    turns = Turns()
    for _ in range(3):
        await turns.take()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    step = turns.take()
    try:
        step.send(None)
    except StopIteration:
        return
    pytest.fail("it waited although nobody else had the turn")


async def test_a_caller_that_gave_up_keeps_nobody_waiting() -> None:
    turns = Turns()
    await turns.take()
    waiting = [asyncio.ensure_future(turns.take()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    waiting[1].cancel()
    async with asyncio.timeout(5):
        await waiting[2]
