"""A crowd of pieces of work is spread over turns of the loop: few to a turn where each takes long, many where they are small."""

from __future__ import annotations

import asyncio

from router_service.turns import MAX_PIECES, TURN_S, Turns


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def pieces_by_turn(num_pieces: int, piece_s: float) -> list[int]:
    """How many of a crowd went on in each turn of the loop, until all have."""
    clock, done = Clock(), list[int]()
    turns = Turns(clock=clock)

    async def work(number: int) -> None:
        await turns.take()
        clock.now_s += piece_s
        done.append(number)

    tasks = [asyncio.create_task(work(number)) for number in range(num_pieces)]
    found = []
    while len(done) < num_pieces:
        before = len(done)
        await asyncio.sleep(0)
        found.append(len(done) - before)
    await asyncio.gather(*tasks)
    assert done == sorted(done)
    return found


async def test_who_comes_alone_goes_on_at_once() -> None:
    turns = Turns()
    for _ in range(3):
        step = turns.take()
        try:
            step.send(None)
        except StopIteration:
            await asyncio.sleep(0)
            continue
        message = "it waited"
        raise AssertionError(message)


async def test_pieces_that_take_long_go_on_one_in_each_turn_of_the_loop_in_the_order_in_which_they_came() -> None:
    assert max(await pieces_by_turn(8, 2 * TURN_S)) == 1


async def test_small_pieces_share_turns_up_to_the_time_that_a_turn_may_take() -> None:
    found = await pieces_by_turn(100, TURN_S / 10)
    assert 8 <= max(found) <= 20
    assert len(found) < 30


async def test_pieces_that_take_nothing_are_bounded_all_the_same() -> None:
    assert max(await pieces_by_turn(500, 0.0)) == MAX_PIECES


async def test_who_was_cancelled_while_waiting_keeps_nobody_waiting() -> None:
    turns = Turns()
    first, gone, next_one = (asyncio.create_task(turns.take()) for _ in range(3))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait([first, gone, next_one])
    assert gone.cancelled()
    assert next_one.done()
    assert not next_one.cancelled()
