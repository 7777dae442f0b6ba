from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest

from cluster.core.errors import DeadlineExceeded, NotReady, Overloaded, ReplicaUnavailable
from cluster.core.ids import ExpertId, Incarnation
from cluster.core.link_limits import LinkLimits
from kit.link import holding, random_rows, request, running_actor, running_lanes, submit, table_of, until
from router_service.lanes import Lanes
from router_service.link_client import LinkPhase


async def test_rows_come_back_in_order_with_their_provenance() -> None:
    async with running_actor(generation=4) as actor, running_lanes(actor.endpoint) as lanes:
        rows = random_rows(37)
        asked = request(actor.endpoint, rows, attempt=2)
        reply = await lanes.submit(asked)
        assert np.array_equal(reply.rows, rows)
        assert (reply.incarnation, reply.version, reply.role) == (Incarnation("actor-0", 4), asked.copy.version, asked.copy.role)
        assert (reply.attempt, reply.node_id) == (2, "node-1")
        assert (reply.bytes_sent, reply.bytes_received) == (rows.nbytes, rows.nbytes)
        assert min(reply.queue_s, reply.compute_s, reply.transfer_s) >= 0.0


async def test_segments_submitted_together_share_a_frame() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        all_rows = [random_rows(5, seed=index) for index in range(6)]
        replies = await asyncio.gather(*[lanes.submit(request(actor.endpoint, rows, index=index % 3)) for index, rows in enumerate(all_rows)])
        for rows, reply in zip(all_rows, replies, strict=True):
            assert np.array_equal(reply.rows, rows)
        assert len(actor.compute.frames) == 1
        assert [len(segment.runs) for segment in actor.compute.frames[0].segments] == [2, 2, 2]


async def test_rows_that_arrive_while_the_actor_is_busy_merge_into_the_next_frame() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        held = await holding(actor, lanes, 2)
        all_rows = [random_rows(3, seed=index) for index in range(20)]
        waiting = [submit(lanes, actor, rows) for rows in all_rows]
        await until(lambda: lanes.status()[0].queued_tokens == 60)
        assert lanes.queued_tokens("actor-0") == 62
        actor.compute.gate.set()
        replies = await asyncio.gather(*waiting)
        assert all(np.array_equal(reply.rows, rows) for reply, rows in zip(replies, all_rows, strict=True))
        assert len(actor.compute.frames) == 3
        await asyncio.gather(*held)


async def test_rows_are_views_of_the_received_body_not_copies() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        pair = await asyncio.gather(*[lanes.submit(request(actor.endpoint, random_rows(4, seed=index))) for index in range(2)])
        assert pair[0].rows.base is not None
        gap = pair[1].rows.__array_interface__["data"][0] - pair[0].rows.__array_interface__["data"][0]
        assert gap == pair[0].rows.nbytes


async def test_a_request_larger_than_a_frame_is_reassembled() -> None:
    async with running_actor(limits=LinkLimits(max_tokens_per_frame=100)) as actor, running_lanes(actor.endpoint) as lanes:
        large, small = random_rows(1234), random_rows(5, seed=1)
        replies = await asyncio.gather(lanes.submit(request(actor.endpoint, large)), lanes.submit(request(actor.endpoint, small)))
        assert np.array_equal(replies[0].rows, large)
        assert np.array_equal(replies[1].rows, small)
        assert max(sum(segment.num_rows for segment in frame.segments) for frame in actor.compute.frames) <= 100


async def test_a_frame_of_64_mib_passes_and_comes_back_equal() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        rows = random_rows(4096, 16_384)
        reply = await lanes.submit(request(actor.endpoint, rows))
        assert np.array_equal(reply.rows, rows)
        assert len(actor.compute.frames) == 1


async def test_a_large_frame_does_not_hold_up_another_actors_small_one() -> None:
    async with running_actor() as first, running_actor("actor-1") as second, running_lanes(first.endpoint, second.endpoint) as lanes:
        large = submit(lanes, first, random_rows(4096, 16_384))
        await asyncio.sleep(0)
        small = await lanes.submit(request(second.endpoint, random_rows(1)))
        assert not large.done()
        assert small.incarnation.actor_id == "actor-1"
        await large


async def test_two_routers_at_once_get_their_own_rows() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as one, running_lanes(actor.endpoint) as two:
        assert actor.server.num_links == 2

        async def talk(lanes: Lanes, seed: int) -> bool:
            rows = random_rows(1 + seed % 40, seed=seed)
            return np.array_equal((await lanes.submit(request(actor.endpoint, rows, index=seed % 3))).rows, rows)

        assert all(await asyncio.gather(*[talk((one, two)[seed % 2], seed) for seed in range(200)]))


async def test_cancelling_a_waiting_submit_withdraws_its_rows() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        held = await holding(actor, lanes, 2)
        gone, kept = submit(lanes, actor, random_rows(7)), submit(lanes, actor, random_rows(9, seed=1))
        await until(lambda: lanes.status()[0].queued_tokens == 16)
        gone.cancel()
        await until(lambda: lanes.status()[0].queued_tokens == 9)
        actor.compute.gate.set()
        assert np.array_equal((await kept).rows, random_rows(9, seed=1))
        await asyncio.gather(*held)
        assert [sum(segment.num_rows for segment in frame.segments) for frame in actor.compute.frames] == [1, 1, 9]


async def test_cancelling_a_sent_submit_tells_the_actor_and_drops_the_late_result() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        (held,) = await holding(actor, lanes)
        held.cancel()
        await until(lambda: len(actor.compute.cancelled) == 1)
        actor.compute.gate.set()
        await until(lambda: lanes.status()[0].frames_in_flight == 0)
        rows = random_rows(3)
        assert np.array_equal((await lanes.submit(request(actor.endpoint, rows))).rows, rows)
        assert lanes.status()[0].num_connects == 1


async def test_a_deadline_that_passes_while_rows_wait_ends_them_unsent() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        held = await holding(actor, lanes, 2)
        with pytest.raises(DeadlineExceeded):
            await lanes.submit(request(actor.endpoint, random_rows(5), timeout_s=0.05))
        assert lanes.status()[0].queued_tokens == 0
        actor.compute.gate.set()
        await asyncio.gather(*held)
        assert len(actor.compute.frames) == 2


async def test_a_deadline_that_passes_while_the_actor_computes_ends_the_wait() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        actor.compute.gate.clear()
        with pytest.raises(DeadlineExceeded):
            await lanes.submit(request(actor.endpoint, random_rows(5), timeout_s=0.5))
        assert len(actor.compute.frames) == 1
        assert actor.compute.frames[0].segments[0].runs[0].timeout_ms <= 500
        actor.compute.gate.set()


async def test_too_many_waiting_rows_are_refused_with_a_time_to_wait() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint, max_queued_tokens=10) as lanes:
        held = await holding(actor, lanes, 2)
        waiting = submit(lanes, actor, random_rows(8))
        await until(lambda: lanes.status()[0].queued_tokens == 8)
        with pytest.raises(Overloaded) as caught:
            await lanes.submit(request(actor.endpoint, random_rows(3)))
        assert caught.value.retry_after_s > 0
        actor.compute.gate.set()
        await asyncio.gather(waiting, *held)


async def test_rows_may_wait_for_the_first_connection() -> None:
    async with running_actor() as actor:
        lanes = Lanes(router_id="router-0", link_secret=b"a secret of the test deployment")
        await lanes.apply(table_of(actor.endpoint))
        assert lanes.status()[0].phase is LinkPhase.CONNECTING
        rows = random_rows(3)
        assert np.array_equal((await lanes.submit(request(actor.endpoint, rows))).rows, rows)
        await lanes.close(1.0)


async def test_heartbeats_show_the_progress_of_the_compute_thread() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint, limits=LinkLimits(heartbeat_s=0.01)) as lanes:
        await lanes.submit(request(actor.endpoint, random_rows(1)))
        await until(lambda: (progress := lanes.status()[0].progress) is not None and progress.frames_done == 1)
        assert lanes.status()[0].last_heard_age_s < 5.0


async def test_a_table_without_an_actor_leaves_it_after_its_last_reply() -> None:
    async with running_actor() as actor, running_actor("actor-1") as other, running_lanes(actor.endpoint, other.endpoint) as lanes:
        (held,) = await holding(actor, lanes)
        await lanes.apply(table_of(other.endpoint, epoch=2))
        assert [state.endpoint for state in lanes.status()] == [other.endpoint]
        assert actor.server.num_links == 1
        late = submit(lanes, actor, random_rows(2))
        await until(lambda: len(actor.compute.frames) == 2)
        actor.compute.gate.set()
        assert (await held).incarnation == (await late).incarnation == actor.endpoint.incarnation
        await until(lambda: actor.server.num_links == 0)
        with pytest.raises(ReplicaUnavailable, match="not in the routing table"):
            await lanes.submit(request(actor.endpoint, random_rows(1)))


async def test_a_new_generation_of_an_actor_gets_a_link_of_its_own() -> None:
    async with running_actor(generation=1) as old, running_lanes(old.endpoint) as lanes, running_actor(generation=2) as new:
        await lanes.apply(table_of(new.endpoint, epoch=2))
        reply = await lanes.submit(request(new.endpoint, random_rows(1)))
        assert reply.incarnation == Incarnation("actor-0", 2)
        await until(lambda: old.server.num_links == 0)


async def test_applying_the_same_table_again_keeps_the_links() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        await lanes.apply(table_of(actor.endpoint, epoch=2))
        await lanes.submit(request(actor.endpoint, random_rows(1)))
        assert lanes.status()[0].num_connects == 1


async def test_close_waits_for_replies_and_refuses_what_is_new() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        (held,) = await holding(actor, lanes)
        closing = asyncio.create_task(lanes.close(20.0))
        await asyncio.sleep(0)
        with pytest.raises(NotReady):
            await lanes.submit(request(actor.endpoint, random_rows(1)))
        actor.compute.gate.set()
        assert (await held).attempt == 0
        await closing
        await until(lambda: actor.server.num_links == 0)


async def test_close_does_not_wait_longer_than_it_may() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        (held,) = await holding(actor, lanes)
        await lanes.close(0.05)
        with pytest.raises(ReplicaUnavailable, match="stopping"):
            await held


async def test_nothing_is_left_behind_when_lanes_close() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        await lanes.submit(request(actor.endpoint, random_rows(1)))
        await lanes.close(1.0)
        names = {task.get_name() for task in asyncio.all_tasks()}
        assert not [name for name in names if name.startswith(("link-actor", "leave-"))]
        assert lanes.status() == []


async def test_a_request_names_its_expert_on_the_wire() -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        asked = dataclasses.replace(request(actor.endpoint, random_rows(1)), expert=ExpertId("model", 3, 5), epoch=8, exact=True, traceparent="tp")
        await lanes.submit(asked)
        (frame,) = actor.compute.frames
        (segment,) = frame.segments
        assert (segment.model, segment.layer, segment.index, segment.version.hex()) == ("model", 3, 5, asked.copy.version)
        assert (segment.runs[0].exact, segment.runs[0].epoch, frame.traceparents) == (True, 8, ("tp",))
