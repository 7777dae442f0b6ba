from __future__ import annotations

import asyncio
import random
import socket
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.core.errors import Overloaded
from cluster.core.link_codec import MAGIC, PREFIX, encode
from cluster.core.link_frames import Cancel, Forward, FrameStatus, Goodbye, Ping, Pong, Proof, Result, SegmentStatus
from cluster.core.link_limits import LinkLimits
from kit.link import FakeActor, RawPeer, forward_of, random_rows, request, running_actor, running_lanes, serves, until

NEVER_S = 1e9


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 64,
        PREFIX.pack(MAGIC, 1, Forward.KIND, 64, 1 << 50) + bytes(64),
        PREFIX.pack(MAGIC, 2, Ping.KIND, 2, 0) + b"\x91\x01",
        PREFIX.pack(MAGIC, 1, Forward.KIND, 8, 0) + b"\xdd\xff\xff\xff\xff\xc0\xc0\xc0",
        encode(Proof(1, "raw", bytes(32), bytes(32))),
        encode(Pong(1, 1, 1, 0.0, 0, is_loading=False)),
        encode(forward_of(5000)) + bytes(40_000),
    ],
    ids=["zeros", "huge body", "protocol", "bad msgpack", "second proof", "wrong direction", "too many rows"],
)
async def test_malformed_frames_close_that_link_only_and_are_reported(data: bytes) -> None:
    async with running_actor() as actor, running_lanes(actor.endpoint) as lanes:
        peer = await RawPeer.connect(actor.endpoint)
        await peer.prove(actor.endpoint)
        peer.writer.write(data)
        assert await peer.read_to_the_end() == b""
        await until(lambda: actor.server.num_faults == 1)
        rows = random_rows(2)
        assert np.array_equal((await lanes.submit(request(actor.endpoint, rows))).rows, rows)
        assert lanes.status()[0].num_connects == 1
        await peer.close()


async def test_a_frame_of_another_generation_is_refused_unread() -> None:
    async with running_actor(generation=3) as actor:
        peer = await RawPeer.connect(actor.endpoint)
        await peer.prove(actor.endpoint)
        peer.send(forward_of(2, generation=2), bytes(16))
        answer = await peer.read()
        assert isinstance(answer, Result)
        assert (answer.status, answer.generation, answer.segments) == (FrameStatus.WRONG_GENERATION, 3, ())
        assert actor.compute.frames == []
        peer.send(forward_of(2, generation=3), bytes(16))
        answer = await peer.read()
        assert isinstance(answer, Result)
        assert answer.status is FrameStatus.OK
        await peer.close()


async def test_frames_beyond_the_window_close_the_link() -> None:
    async with running_actor(limits=LinkLimits(frames_in_flight=2)) as actor:
        actor.compute.gate.clear()
        peer = await RawPeer.connect(actor.endpoint)
        await peer.prove(actor.endpoint)
        for number in (1, 2, 3):
            peer.send(forward_of(1, frame_id=number), bytes(8))
        assert await peer.read_to_the_end() == b""
        assert len(actor.compute.frames) == 2
        actor.compute.gate.set()
        assert await serves(actor)
        await peer.close()


async def test_a_router_that_does_not_read_loses_its_link() -> None:
    async with running_actor(limits=LinkLimits(max_frame_bytes=1000)) as actor:
        peer = await RawPeer.connect(actor.endpoint, receive_bytes=4096)
        await peer.prove(actor.endpoint)
        for link in actor.server._links:
            link.stream._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        peer.writer.transport.pause_reading()
        for _ in range(10):
            peer.writer.write(encode(Ping(1)) * 10_000)
        await until(lambda: actor.server.num_links == 0)
        assert actor.server.num_faults == 1
        assert await serves(actor)
        await peer.close()


async def test_a_router_that_takes_nothing_of_a_large_reply_is_closed_in_time() -> None:
    async with running_actor(limits=LinkLimits(stall_timeout_s=0.3)) as actor:
        peer = await RawPeer.connect(actor.endpoint)
        await peer.prove(actor.endpoint)
        peer.writer.transport.pause_reading()
        frame = forward_of(4000, 4096)
        peer.send(frame, bytes(frame.body_bytes))
        await until(lambda: actor.server.num_links == 0)
        assert actor.server.num_faults == 1
        await peer.close()


async def test_a_silent_router_is_let_go() -> None:
    async with running_actor(limits=LinkLimits(idle_timeout_s=0.3)) as actor:
        peer = await RawPeer.connect(actor.endpoint)
        await peer.prove(actor.endpoint)
        assert await peer.read_to_the_end() == b""
        await peer.close()


async def test_pings_are_answered_with_the_progress_of_the_compute_thread() -> None:
    async with running_actor(generation=6) as actor:
        actor.compute.gate.clear()
        peer = await RawPeer.connect(actor.endpoint)
        await peer.prove(actor.endpoint)
        peer.send(forward_of(1, generation=6), bytes(8))
        await until(lambda: len(actor.compute.frames) == 1)
        peer.send(Ping(77))
        assert await peer.read() == Pong(77, 6, 1, 0.25, 7, is_loading=False)
        actor.compute.gate.set()
        await peer.close()


async def test_cancel_reaches_the_compute_thread_and_the_frame_is_still_answered() -> None:
    async with running_actor() as actor:
        actor.compute.gate.clear()
        peer = await RawPeer.connect(actor.endpoint)
        await peer.prove(actor.endpoint)
        peer.send(forward_of(1, frame_id=4), bytes(8))
        peer.send(Cancel(4, (1,)))
        peer.send(Cancel(5, (1,)))
        await until(lambda: actor.compute.cancelled == [(1,)])
        actor.compute.gate.set()
        answer = await peer.read()
        assert isinstance(answer, Result)
        assert answer.frame_id == 4
        await peer.close()


@pytest.mark.parametrize(("error", "status"), [(Overloaded("full"), SegmentStatus.OVERLOADED), (RuntimeError("broken"), SegmentStatus.FAULTED)])
async def test_a_frame_that_cannot_be_submitted_is_answered(error: Exception, status: SegmentStatus) -> None:
    def refuse(*_: object) -> None:
        raise error

    async with running_actor() as actor:
        actor.server.submit = refuse
        peer = await RawPeer.connect(actor.endpoint)
        await peer.prove(actor.endpoint)
        peer.send(forward_of(1), bytes(8))
        answer = await peer.read()
        assert isinstance(answer, Result)
        assert [segment.status for segment in answer.segments] == [status]
        await peer.close()


async def test_stop_says_goodbye_answers_what_is_under_way_and_refuses_what_is_new() -> None:
    async with running_actor() as actor:
        actor.compute.gate.clear()
        peer = await RawPeer.connect(actor.endpoint)
        await peer.prove(actor.endpoint)
        peer.send(forward_of(1, frame_id=1), bytes(8))
        await until(lambda: len(actor.compute.frames) == 1)
        stopping = asyncio.create_task(actor.server.stop("maintenance", 20.0))
        assert await peer.read() == Goodbye("maintenance")
        peer.send(forward_of(1, frame_id=2), bytes(8))
        refused = await peer.read()
        assert isinstance(refused, Result)
        assert (refused.frame_id, refused.segments[0].status) == (2, SegmentStatus.DRAINING)
        assert not stopping.done()
        actor.compute.gate.set()
        answer = await peer.read()
        assert isinstance(answer, Result)
        assert (answer.frame_id, answer.segments[0].status) == (1, SegmentStatus.OK)
        peer.send(Goodbye("drained"))
        assert await peer.read_to_the_end() == b""
        await stopping
        with pytest.raises(ConnectionRefusedError):
            await RawPeer.connect(actor.endpoint)
        await peer.close()


async def stopped_in_the_middle(actor: FakeActor) -> RawPeer:
    """A peer of a server that was stopped while a frame of it was computed."""
    actor.compute.gate.clear()
    peer = await RawPeer.connect(actor.endpoint)
    await peer.prove(actor.endpoint)
    peer.send(forward_of(1), bytes(8))
    await until(lambda: len(actor.compute.frames) == 1)
    await actor.server.stop("now", 0.05)
    return peer


async def test_stop_does_not_wait_longer_than_it_may() -> None:
    async with running_actor() as actor:
        peer = await stopped_in_the_middle(actor)
        assert isinstance(await peer.read(), Goodbye)
        assert await peer.read_to_the_end() == b""
        assert actor.server.num_links == 0
        await peer.close()


async def test_a_reply_that_comes_after_the_end_is_dropped_and_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    async with running_actor() as actor:
        peer = await stopped_in_the_middle(actor)
        actor.compute.gate.set()
        await asyncio.to_thread(actor.compute.close)
        assert raised == []
        assert isinstance(await peer.read(), Goodbye)
        assert await peer.read_to_the_end() == b""
        await peer.close()


async def test_a_reply_that_does_not_fit_its_header_closes_the_link_instead_of_garbling_it() -> None:
    async with running_actor() as actor:
        actor.compute.reply_with = lambda frame, _body: (answer_without_body(frame), [])
        peer = await RawPeer.connect(actor.endpoint)
        await peer.prove(actor.endpoint)
        peer.send(forward_of(3), bytes(24))
        assert await peer.read_to_the_end() == b""
        await until(lambda: actor.server.num_faults == 1)
        await peer.close()


def answer_without_body(frame: Forward) -> Result:
    from kit.link import answer

    return answer(frame, memoryview(bytes(frame.body_bytes)))[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=200), st.booleans(), st.randoms(use_true_random=False))
async def test_noise_never_hurts_the_server(noise: bytes, proven: bool, rng: random.Random) -> None:
    # Each link ends by its bytes or their end. No clock may end one: on a busy machine that hit peers in the middle of their handshakes.
    async with running_actor(limits=LinkLimits(connect_timeout_s=NEVER_S, idle_timeout_s=NEVER_S, stall_timeout_s=NEVER_S)) as actor:
        peer = await RawPeer.connect(actor.endpoint)
        if proven:
            await peer.prove(actor.endpoint)
            data = bytearray(encode(forward_of(2)) + bytes(16) + encode(Ping(1)))
            data[rng.randrange(len(data))] = rng.randrange(256)
            noise = bytes(data) + noise
        peer.writer.write(noise)
        peer.writer.write_eof()
        await peer.read_to_the_end()
        await peer.close()
        assert actor.server._accepting is not None
        assert not actor.server._accepting.done()
        fresh = await RawPeer.connect(actor.endpoint)
        await fresh.prove(actor.endpoint)
        await fresh.close()
