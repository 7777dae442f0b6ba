from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack

import pytest

from cluster.core.errors import Overloaded, ProtocolMismatch, ReplicaRejected, ReplicaUnavailable, Unauthenticated
from cluster.core.ids import Incarnation
from cluster.core.link_codec import MAGIC, MAX_HANDSHAKE_BYTES, PREFIX, encode
from cluster.core.link_frames import Challenge, Forward, Ping, Proof, Refusal, Welcome, derive_link_key
from cluster.core.link_handshake import ActorSide
from cluster.core.link_limits import LinkLimits
from cluster.core.routing_table import ActorEndpoint
from kit.link import SECRET, RawPeer, forward_of, running_actor, serves, until
from router_service.link_client import LinkClient

SHORT = LinkLimits(connect_timeout_s=0.3)


async def connect(endpoint: ActorEndpoint, *, secret: bytes = SECRET, limits: LinkLimits | None = None) -> LinkClient:
    return await LinkClient.connect(
        endpoint,
        derive_link_key(secret, endpoint.incarnation),
        router_id="router-0",
        limits=limits or LinkLimits(),
        on_result=lambda _result, _body: None,
        on_lost=lambda _error: None,
        on_goodbye=lambda _reason: None,
    )


async def test_a_router_with_the_key_is_welcome_and_learns_the_limits() -> None:
    async with running_actor(limits=LinkLimits(max_tokens_per_frame=99, frames_in_flight=5)) as actor:
        link = await connect(actor.endpoint)
        assert link.welcome is not None
        assert (link.welcome.max_tokens_per_frame, link.welcome.frames_in_flight) == (99, 5)
        link.close()


async def test_a_wrong_key_is_refused_by_name() -> None:
    async with running_actor() as actor:
        with pytest.raises(Unauthenticated, match="link key"):
            await connect(actor.endpoint, secret=b"guessed")
        assert actor.server.num_links == 0
        assert actor.server.num_faults == 1
        assert await serves(actor)


async def test_an_actor_with_a_wrong_key_is_refused_by_the_router() -> None:
    async with running_actor(secret=b"stolen name, no key") as actor:
        with pytest.raises(Unauthenticated):
            await connect(actor.endpoint)


async def test_another_generation_at_the_endpoint_is_refused_by_name() -> None:
    async with running_actor(generation=5) as actor:
        stale = dataclasses.replace(actor.endpoint, incarnation=Incarnation("actor-0", 4))
        with pytest.raises(ReplicaRejected, match="actor-0/g5 answers where actor-0/g4"):
            await connect(stale)


async def test_a_proof_of_another_protocol_is_refused_by_name() -> None:
    async with running_actor() as actor:
        peer = await RawPeer.connect(actor.endpoint)
        assert isinstance(await peer.read(handshake=True), Challenge)
        peer.send(Proof(99, "raw", bytes(32), bytes(32)))
        refusal = await peer.read(handshake=True)
        assert isinstance(refusal, Refusal)
        assert refusal.reason == "PROTOCOL_MISMATCH"
        assert await peer.read_to_the_end() == b""
        await peer.close()


MakeListener = Callable[[bytes], Awaitable[ActorEndpoint]]


@pytest.fixture
def make_listener() -> Iterator[MakeListener]:
    made: list[tuple[socket.socket, asyncio.Task]] = []

    async def make(frame: bytes) -> ActorEndpoint:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(0)
        loop = asyncio.get_running_loop()

        async def greet() -> None:
            sock, _ = await loop.sock_accept(listener)
            with sock:
                await loop.sock_sendall(sock, frame)
                while await loop.sock_recv(sock, 4096):
                    pass

        made.append((listener, loop.create_task(greet())))
        return ActorEndpoint(Incarnation("actor-0", 1), *listener.getsockname(), "node-1")

    yield make
    for listener, task in made:
        task.cancel()
        listener.close()


async def test_an_actor_that_speaks_only_newer_protocols_is_refused_by_name(make_listener: MakeListener) -> None:
    endpoint = await make_listener(encode(Challenge(4, 5, "actor-0", 1, bytes(32))))
    with pytest.raises(ProtocolMismatch, match="4 to 5"):
        await connect(endpoint)


async def test_something_else_on_the_port_is_refused_by_name(make_listener: MakeListener) -> None:
    endpoint = await make_listener(b"HTTP/1.1 400 Bad Request\r\nServer: something else\r\n\r\n")
    with pytest.raises(ProtocolMismatch, match="not an expert link"):
        await connect(endpoint)


async def test_an_actor_that_never_speaks_is_given_up_in_time(make_listener: MakeListener) -> None:
    endpoint = await make_listener(b"")
    with pytest.raises(ReplicaUnavailable, match="did not answer within"):
        await connect(endpoint, limits=LinkLimits(connect_timeout_s=0.1))


async def test_nobody_at_the_endpoint_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        host, port = taken.getsockname()
    for place in ((host, port), ("no-such-host.invalid", 1)):
        with pytest.raises(ReplicaUnavailable, match="cannot be reached"):
            await connect(ActorEndpoint(Incarnation("actor-0", 1), *place, "node-1"))


async def test_an_idle_handshake_is_closed_in_time_and_others_are_served_meanwhile() -> None:
    async with running_actor(limits=SHORT) as actor:
        peer = await RawPeer.connect(actor.endpoint)
        assert isinstance(await peer.read(handshake=True), Challenge)
        assert await serves(actor)
        assert await peer.read_to_the_end() == b""
        assert actor.server.num_faults == 1
        await peer.close()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        encode(Ping(1)),
        encode(forward_of(1)) + bytes(8),
        PREFIX.pack(MAGIC, 1, Proof.KIND, MAX_HANDSHAKE_BYTES + 1, 0) + bytes(8192),
        PREFIX.pack(MAGIC, 1, Proof.KIND, 20, 1 << 40) + bytes(20),
        PREFIX.pack(MAGIC, 1, Forward.KIND, 20, 1 << 40),
        PREFIX.pack(MAGIC, 1, Proof.KIND, 5, 0) + b"\xff" * 5,
    ],
    ids=["http", "ping", "forward", "large header", "body", "huge body", "bad msgpack"],
)
async def test_before_the_proof_nothing_but_a_proof_is_accepted(data: bytes) -> None:
    async with running_actor() as actor:
        peer = await RawPeer.connect(actor.endpoint)
        await peer.read(handshake=True)
        peer.writer.write(data)
        assert await peer.read_to_the_end() == b""
        assert actor.compute.frames == []
        await until(lambda: actor.server.num_faults == 1)
        assert await serves(actor)
        await peer.close()


async def test_links_and_handshakes_are_bounded() -> None:
    async with running_actor(limits=LinkLimits(max_links=2, max_handshakes=3)) as actor, AsyncExitStack() as stack:
        links = [await connect(actor.endpoint) for _ in range(2)]
        with pytest.raises(Overloaded, match="max_links"):
            await connect(actor.endpoint)
        links.pop().close()
        await until(lambda: actor.server.num_links == 1)
        links.append(await connect(actor.endpoint))
        idle = [await RawPeer.connect(actor.endpoint) for _ in range(3)]
        for peer in idle:
            stack.push_async_callback(peer.close)
            await peer.read(handshake=True)
        late = await RawPeer.connect(actor.endpoint)
        stack.push_async_callback(late.close)
        assert await late.read_to_the_end() == b""
        for link in links:
            link.close()


def test_the_welcome_carries_no_secret() -> None:
    side = ActorSide(Incarnation("a", 1), b"key" * 8, bytes(32), LinkLimits())
    assert b"key" not in encode(side.challenge)
    assert b"key" not in encode(Welcome(bytes(32), 1, 1, 1))
