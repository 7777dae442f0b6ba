from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from functools import partial

import psutil
import pytest

from actors.loop_inbox import LoopInbox
from kit.link import until


@pytest.fixture
async def inbox() -> AsyncIterator[LoopInbox]:
    made = LoopInbox()
    yield made
    made.close()


async def test_calls_of_each_thread_run_on_the_loop_in_order_and_none_is_lost(inbox: LoopInbox) -> None:
    ran: list[tuple[int, int]] = []
    ran_in: set[int] = set()

    def note(thread: int, number: int) -> None:
        ran.append((thread, number))
        ran_in.add(threading.get_ident())

    def work(thread: int) -> None:
        for number in range(500):
            inbox.put(partial(note, thread, number))

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    await until(lambda: len(ran) == 2000)
    for thread in threads:
        thread.join()
    assert ran_in == {threading.get_ident()}
    assert all([number for thread, number in ran if thread == wanted] == list(range(500)) for wanted in range(4))


async def test_a_call_that_puts_another_one_is_followed_by_it(inbox: LoopInbox) -> None:
    done = asyncio.Event()
    inbox.put(lambda: inbox.put(done.set))
    await asyncio.wait_for(done.wait(), 10)


async def test_a_call_that_fails_is_told_to_the_loop_and_the_next_one_runs(inbox: LoopInbox) -> None:
    told: list[BaseException] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context["exception"]))
    done = asyncio.Event()
    inbox.put(partial(int, "no number"))
    inbox.put(done.set)
    await asyncio.wait_for(done.wait(), 10)
    assert [type(error) for error in told] == [ValueError]


async def test_nothing_runs_or_is_written_once_it_is_closed() -> None:
    before = psutil.Process().num_fds()
    inbox = LoopInbox()
    ran: list[str] = []
    inbox.put(lambda: ran.append("before"))
    inbox.close()
    inbox.close()
    inbox.put(lambda: ran.append("after"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert ran == []
    assert psutil.Process().num_fds() == before


async def test_a_call_may_close_the_inbox_and_the_rest_is_dropped(inbox: LoopInbox) -> None:
    ran: list[str] = []
    closed = asyncio.Event()

    def close() -> None:
        inbox.close()
        closed.set()

    inbox.put(close)
    inbox.put(lambda: ran.append("after"))
    await asyncio.wait_for(closed.wait(), 10)
    await asyncio.sleep(0)
    assert ran == []
