from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from cluster.core.routing_table import RoutingTable
from kit.feed import CONTROL_TOKEN, FakeControl, control
from kit.link import until
from router_service.table_feed import TableFeed


@asynccontextmanager
async def following(feed: FakeControl, adopt: Callable[[RoutingTable], Any] | None = None) -> AsyncIterator[tuple[TableFeed, list[int]]]:
    epochs: list[int] = []

    async def keep(table: RoutingTable) -> None:
        epochs.append(table.epoch)

    made = TableFeed(feed.address, CONTROL_TOKEN, router_id="router-0", adopt=adopt or keep, rng=random.Random(0))
    task = asyncio.create_task(made.run())
    try:
        yield made, epochs
    finally:
        task.cancel()
        await asyncio.wait([task])
        await made.close()


async def test_newer_tables_are_adopted_in_order_and_the_same_one_is_not_adopted_again() -> None:
    async with control() as feed, following(feed) as (made, epochs):
        for epoch in (1, 2, 2, 5):
            await feed.publish(RoutingTable(epoch))
        await until(lambda: epochs == [1, 2, 5])
        assert made.table.epoch == 5
        await feed.end_watches()
        await until(lambda: len(feed.watches) >= 2 and made.is_connected)
        assert epochs == [1, 2, 5]


async def test_an_older_table_is_refused_and_the_router_keeps_its_own() -> None:
    async with control() as feed, following(feed) as (made, epochs):
        await feed.publish(RoutingTable(5))
        await until(lambda: epochs == [5])
        await feed.publish(RoutingTable(4))
        await until(lambda: len(feed.watches) >= 2)
        assert feed.watches[1].last_epoch == 5
        assert (made.table.epoch, epochs) == (5, [5])


async def test_an_older_controller_is_refused_even_with_a_newer_table() -> None:
    async with control() as feed, following(feed) as (made, epochs):
        await feed.publish(RoutingTable(5), controller_generation=3)
        await until(lambda: epochs == [5])
        await feed.publish(RoutingTable(6), controller_generation=2)
        await until(lambda: len(feed.watches) >= 2)
        assert (made.table.epoch, made.controller_generation) == (5, 3)
        # The watches that run have counted what they sent: they are ended, so that what is told next is told from the start.
        feed.messages.clear()
        await feed.publish(RoutingTable(7), controller_generation=4)
        await feed.end_watches()
        await until(lambda: epochs == [5, 7])


async def test_a_table_that_contradicts_itself_is_refused() -> None:
    async with control() as feed, following(feed) as (made, epochs):
        await feed.publish(RoutingTable(1))
        await until(lambda: epochs == [1])
        feed.messages[-1:] = [type(feed.messages[0])(epoch=2, controller_generation=1)]
        feed.messages[-1].experts.add(model="m").copies.add(actor=7, version=bytes(32), role=1)
        await feed.end_watches()
        await until(lambda: len(feed.watches) >= 3)
        assert made.table.epoch == 1
        assert not made.is_connected


async def test_the_age_of_a_table_counts_from_when_the_controller_was_lost() -> None:
    async with control() as feed, following(feed) as (made, epochs):
        assert not made.is_connected
        await feed.publish(RoutingTable(1))
        await until(lambda: epochs == [1] and made.is_connected)
        assert made.table_age_s == 0
    assert made.table_age_s > 0


async def test_a_report_to_nobody_ends_in_time() -> None:
    made = TableFeed("127.0.0.1:1", CONTROL_TOKEN, router_id="router-0", adopt=asyncio.sleep, rng=random.Random(0))
    assert not await made.report((), {}, 1.0, {})
    await made.close()
