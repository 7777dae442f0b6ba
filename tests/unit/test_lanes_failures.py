from __future__ import annotations

import asyncio
import dataclasses
import socket
import struct
from collections.abc import Callable

import numpy as np
import pytest

from cluster.core.descriptors import DType
from cluster.core.errors import InvalidRequest, MoeError, ReplicaFaulted, ReplicaRejected, ReplicaUnavailable
from cluster.core.ids import Incarnation
from cluster.core.link_frames import Forward, Result, Segment, SegmentStatus
from cluster.core.link_limits import LinkLimits
from cluster.core.routing_table import ActorEndpoint
from kit.link import FakeActor, answer, holding, random_rows, request, running_actor, running_lanes, submit, until
from router_service.link_client import LinkPhase


async def test_a_lost_link_is_told_to_every_waiting_segment_at_once() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        tasks = await holding(actor, lanes, 2)
        tasks += [submit(lanes, actor, random_rows(4)) for _ in range(3)]
        await until(lambda: lanes.status()[0].queued_tokens == 12)
        reset(actor)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ReplicaUnavailable] * 5
        assert len({id(outcome) for outcome in outcomes}) == 5


def reset(actor: FakeActor) -> None:
    """Close the actor's sockets as a killed process does."""
    for link in tuple(actor.server._links):
        link.stream._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        link.stream.close()


async def test_a_link_that_is_lost_in_the_middle_of_a_frame_is_told_and_comes_back() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        large = submit(lanes, actor, random_rows(4096, 16_384))
        await until(lambda: lanes.status()[0].bytes_sent > 1 << 20)
        reset(actor)
        with pytest.raises(ReplicaUnavailable):
            await large
        assert actor.compute.frames == []
        await until(lambda: lanes.status()[0].phase is LinkPhase.READY)
        rows = random_rows(3)
        assert np.array_equal((await lanes.submit(request(actor.endpoint, rows))).rows, rows)
        assert lanes.status()[0].num_connects == 2


async def test_while_a_lost_link_is_down_rows_are_refused_at_once() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        await actor.server.stop("gone", 5.0)
        await until(lambda: lanes.status()[0].phase is LinkPhase.CLOSED)
        with pytest.raises(ReplicaUnavailable, match="no link to actor-0/g1"):
            await lanes.submit(request(actor.endpoint, random_rows(1), timeout_s=1000.0))


async def test_a_dead_endpoint_neither_delays_the_table_nor_holds_its_rows() -> None:
    async with running_actor() as actor:
        dead = ActorEndpoint(Incarnation("dead", 9), actor.host, 1, "node-2")
        async with running_lanes(actor.endpoint, dead) as lanes:
            rows = random_rows(2)
            assert np.array_equal((await lanes.submit(request(actor.endpoint, rows))).rows, rows)
            with pytest.raises(ReplicaUnavailable, match="dead/g9"):
                await lanes.submit(request(dead, rows))
            state = lanes.status()[1]
            assert (state.phase, "cannot be reached" in state.reason) == (LinkPhase.CLOSED, True)


async def test_a_frozen_actor_loses_its_link_by_silence() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint, limits=LinkLimits(heartbeat_s=0.02, silence_timeout_s=0.2)) as lanes:
        (held,) = await holding(actor, lanes)
        for link in actor.server._links:
            asyncio.get_running_loop().remove_reader(link.stream._fd)
        with pytest.raises(ReplicaUnavailable, match="silent"):
            await held


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (SegmentStatus.NOT_HELD, ReplicaRejected),
        (SegmentStatus.DRAINING, ReplicaRejected),
        (SegmentStatus.OVERLOADED, ReplicaRejected),
        (SegmentStatus.FAULTED, ReplicaFaulted),
        (SegmentStatus.OUT_OF_MEMORY, ReplicaFaulted),
    ],
)
async def test_a_segment_that_fails_leaves_its_neighbours_whole(status: SegmentStatus, error: type[MoeError]) -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        actor.compute.reply_with = lambda frame, body: answer(frame, body, fault=lambda segment, _: status if segment.index == 1 else SegmentStatus.OK)
        all_rows = [random_rows(4, seed=index) for index in range(3)]
        outcomes = await asyncio.gather(
            *[lanes.submit(request(actor.endpoint, rows, index=index)) for index, rows in enumerate(all_rows)], return_exceptions=True
        )
        assert type(outcomes[1]) is error
        assert "actor-0/g1" in str(outcomes[1])
        for index in (0, 2):
            assert np.array_equal(outcomes[index].rows, all_rows[index])


async def test_one_requests_poison_never_fails_another_request() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        poison = np.full((2, 128), 0xEE, np.uint8)

        def fault(_segment: Segment, rows: memoryview) -> SegmentStatus:
            return SegmentStatus.FAULTED if bytes(poison[0]) in bytes(rows) else SegmentStatus.OK

        actor.compute.reply_with = lambda frame, body: answer(frame, body, fault=fault)
        tasks = [submit(lanes, actor, random_rows(3, seed=1)), submit(lanes, actor, poison), submit(lanes, actor, random_rows(4, seed=2))]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert np.array_equal(outcomes[0].rows, random_rows(3, seed=1))
        assert type(outcomes[1]) is ReplicaFaulted
        assert np.array_equal(outcomes[2].rows, random_rows(4, seed=2))


async def test_a_result_of_another_generation_is_never_used() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        actor.compute.reply_with = lambda frame, body: answer(frame, body, generation=2)
        with pytest.raises(ReplicaRejected, match="generation 2"):
            await lanes.submit(request(actor.endpoint, random_rows(2)))


@pytest.mark.parametrize("change", [{"dim": 32}, {"attempt": 5}, {"segment_id": 10_000}, {"dtype": DType.FP32}])
async def test_a_result_that_cannot_be_told_apart_costs_the_link(change: dict[str, object]) -> None:
    def wrong(frame: Forward, body: memoryview) -> tuple[Result, list]:
        result, buffers = answer(frame, body)
        segment = result.segments[0]._replace(**change)
        return dataclasses.replace(result, segments=(segment,)), [bytes(segment.num_bytes)] if segment.num_bytes else buffers

    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        actor.compute.reply_with = wrong
        with pytest.raises(ReplicaUnavailable, match="result"):
            await lanes.submit(request(actor.endpoint, random_rows(2)))
        actor.compute.reply_with = answer
        await until(lambda: lanes.status()[0].phase is LinkPhase.READY)
        assert lanes.status()[0].num_connects == 2


async def test_goodbye_lets_replies_come_and_turns_the_rest_away() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        held = await holding(actor, lanes, 2)
        waiting = submit(lanes, actor, random_rows(4))
        await until(lambda: lanes.status()[0].queued_tokens == 4)
        stopping = asyncio.create_task(actor.server.stop("maintenance", 20.0))
        with pytest.raises(ReplicaUnavailable, match="maintenance"):
            await waiting
        with pytest.raises(ReplicaRejected, match="maintenance"):
            await lanes.submit(request(actor.endpoint, random_rows(1)))
        assert lanes.status()[0].phase is LinkPhase.DRAINING
        actor.compute.gate.set()
        assert len(await asyncio.gather(*held)) == 2
        await stopping


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (lambda rows: rows[:, :64], "rows"),
        (lambda rows: rows.view(np.int8), "rows"),
        (lambda rows: rows.reshape(-1), "rows"),
        (lambda rows: rows[::2], "rows"),
        (lambda rows: rows[:0], "rows"),
    ],
    ids=["width", "dtype", "rank", "strided", "none"],
)
async def test_rows_that_are_not_what_they_say_are_refused(spoil: Callable[[np.ndarray], np.ndarray], field: str) -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        bad = dataclasses.replace(request(actor.endpoint, random_rows(8)), rows=spoil(random_rows(8)))
        with pytest.raises(InvalidRequest) as caught:
            await lanes.submit(bad)
        assert caught.value.field == field


async def test_a_version_that_is_no_digest_is_refused() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        asked = request(actor.endpoint, random_rows(1))
        with pytest.raises(InvalidRequest, match="hex"):
            await lanes.submit(dataclasses.replace(asked, copy=asked.copy._replace(version="v1")))
