"""A tether ends with its process, and tells the router so; one that ends otherwise accuses nobody."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import socket
import sys
import threading
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from actors import tether
from actors.link_server import LinkServer
from actors.tether import hold
from cluster.core.errors import MoeError
from cluster.core.ids import Incarnation
from cluster.core.link_frames import NONCE_BYTES, Challenge, Tether, Welcome, derive_link_key
from cluster.core.link_handshake import RouterSide
from cluster.core.link_limits import LinkLimits
from cluster.core.routing_table import ActorEndpoint
from kit.link import SECRET, FakeActor, RawPeer, joined_ends, random_rows, request, running_actor, running_lanes, serves, until
from kit.waiting import wait_until
from router_service.link_client import LinkClient, LinkPhase

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 20.0
PATIENT = LinkLimits(tether_grace_s=10.0, heartbeat_s=1000.0, silence_timeout_s=5000.0)  # nothing is ever asked but for a tether's sake
HASTY = LinkLimits(tether_grace_s=0.01, heartbeat_s=1000.0, silence_timeout_s=5000.0)
PROCESS = """
import asyncio, sys
from actors.sentinel import Sentinel
from actors.tether import hold
from kit.link import running_actor

async def serve():
    async with running_actor(hold=hold) as actor:
        sentinel = Sentinel.start()
        actor.server.guard = sentinel.guard
        print(actor.port, sentinel.pid, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await actor.server.stop("it was told to", 5.0)
        sentinel.stop()

asyncio.run(serve())
"""


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    with joined_ends(LIMIT_S) as both:
        yield both


@pytest.fixture
async def tethered() -> AsyncIterator[FakeActor]:
    """An actor whose links may have tethers."""
    async with running_actor(hold=hold) as actor:
        yield actor


class Told:
    """What a link told its owner."""

    def __init__(self) -> None:
        self.lost: list[MoeError] = []

    async def connect(self, endpoint: ActorEndpoint, limits: LinkLimits) -> LinkClient:
        key = derive_link_key(SECRET, endpoint.incarnation)
        return await LinkClient.connect(
            endpoint, key, router_id="router-0", limits=limits, on_result=lambda *_: None, on_lost=self.lost.append, on_goodbye=lambda _: None
        )


def sockets_of(directory: str) -> set[str]:
    """The sockets in a table of descriptors."""
    found = set()
    for path in Path(directory).iterdir():
        try:
            found.add(str(path.readlink()))
        except FileNotFoundError:
            continue
    return {name for name in found if name.startswith("socket:")}


def threads_that_hold(name: str) -> list[str]:
    """Threads of this process with a table that has this socket and no other descriptor."""
    return [task.name for task in Path("/proc/self/task").iterdir() if len(list((task / "fd").iterdir())) == 1 and name in sockets_of(str(task / "fd"))]


def test_a_held_connection_is_open_in_one_thread_only_and_until_it_is_let_go(ends: tuple[socket.socket, socket.socket]) -> None:
    router, actor = ends
    name = f"socket:[{os.fstat(actor.fileno()).st_ino}]"
    let_go = hold(actor)
    assert let_go is not None
    actor.close()
    assert name not in sockets_of("/proc/self/fd")
    assert len(threads_that_hold(name)) == 1
    router.settimeout(0)
    with pytest.raises(BlockingIOError):
        router.recv(1)
    router.settimeout(LIMIT_S)
    let_go()
    assert router.recv(1) == b""
    wait_until(lambda: not threads_that_hold(name), "its thread has ended")


@pytest.mark.parametrize("was_collecting", [True, False])
def test_garbage_is_collected_as_before(ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, *, was_collecting: bool) -> None:
    enabled: list[bool] = []
    monkeypatch.setattr(tether, "ask_for_slices", lambda _: enabled.append(gc.isenabled()))
    if not was_collecting:
        gc.disable()
    try:
        let_go = hold(ends[1])
        assert gc.isenabled() is was_collecting
    finally:
        gc.enable()
    assert let_go is not None
    assert enabled == [False]
    let_go()


def no_such_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tether, "_UNSHARE", 1 << 20)


def no_such_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace())


@pytest.mark.parametrize("lacks", [no_such_flag, no_such_call])
def test_where_threads_share_their_descriptors_there_is_none_and_nothing_is_closed(
    ends: tuple[socket.socket, socket.socket], lacks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lacks(monkeypatch)
    router, actor = ends
    assert hold(actor) is None
    assert "no tether" in caplog.text
    actor.sendall(b"still here")
    assert router.recv(16) == b"still here"


async def test_every_link_has_a_tether_for_as_long_as_it_lasts(tethered: FakeActor) -> None:
    told = Told()
    links = [await told.connect(tethered.endpoint, PATIENT) for _ in range(3)]
    await until(lambda: tethered.server.num_tethers == 3)
    assert tethered.server.num_links == 3
    assert len(tethered.server._links) == 3
    links[0].close()
    await until(lambda: tethered.server.num_tethers == 2)
    links[1].leave("enough")
    await until(lambda: tethered.server.num_tethers == 1)
    await tethered.server.stop("enough", 0.01)
    await until(lambda: links[2].phase is LinkPhase.CLOSED)
    assert tethered.server.num_tethers == 0
    assert tethered.server.num_faults == 0


async def test_an_actor_that_stops_in_order_is_left_not_lost(tethered: FakeActor) -> None:
    async with running_lanes(tethered.endpoint, limits=HASTY) as lanes:
        await until(lambda: tethered.server.num_tethers == 1)
        await tethered.server.stop("enough", 5.0)
        await until(lambda: lanes.status()[0].phase is not LinkPhase.READY)
        assert "goodbye" in lanes.status()[0].reason


async def test_an_actor_that_answers_when_its_tether_has_ended_keeps_its_link_and_gets_no_other(tethered: FakeActor) -> None:
    async with running_lanes(tethered.endpoint, limits=PATIENT) as lanes:
        await until(lambda: tethered.server.num_tethers == 1)
        await until(lambda: lanes.status()[0].progress is not None)
        for link in tethered.server._links:
            assert link.tether is not None
            link.tether.end()
        await until(lambda: lanes.status()[0].progress.sequence == 2)
        rows = random_rows(3)
        assert len((await lanes.submit(request(tethered.endpoint, rows))).rows) == 3
        assert lanes.status()[0].num_connects == 1
        assert len(tethered.server._links) == 1
        assert tethered.server.num_tethers == 0


async def test_an_actor_that_says_nothing_when_its_tether_has_ended_is_lost(tethered: FakeActor) -> None:
    told = Told()
    client = await told.connect(tethered.endpoint, HASTY)
    await until(lambda: tethered.server.num_tethers == 1)
    await until(lambda: client.progress is not None)
    (link,) = tethered.server._links
    asyncio.get_running_loop().remove_reader(link.stream._fd)  # deaf: as a process that is being ended is, with its links still open
    assert link.tether is not None
    link.tether.end()
    await until(lambda: bool(told.lost))
    assert "after its tether had ended" in str(told.lost[0])
    assert not link.stream.is_closed
    link.stream.close()


async def test_what_a_router_has_not_got_round_to_reading_speaks_for_the_actor(tethered: FakeActor) -> None:
    told = Told()
    client = await told.connect(tethered.endpoint, PATIENT)
    await until(lambda: tethered.server.num_tethers == 1)
    await until(lambda: client.progress is not None)
    stream = client._stream
    assert stream is not None
    assert not stream.has_unread()
    asyncio.get_running_loop().remove_reader(stream._fd)  # as one that does not run
    client.probe()
    await until(stream.has_unread)
    client._judge(stream, stream.bytes_received)
    assert not stream.is_closed
    assert told.lost == []
    client.close()
    assert not stream.has_unread()


async def test_an_actor_that_holds_none_is_asked_for_none() -> None:
    async with running_actor() as actor:
        client = await Told().connect(actor.endpoint, PATIENT)
        assert client._tether is None
        client.close()


async def test_an_actor_that_fails_to_hold_one_serves_without() -> None:
    asked: list[int] = []

    def refuse(connection: socket.socket) -> None:
        asked.append(connection.fileno())

    async with running_actor(hold=refuse) as actor, running_lanes(actor.endpoint, limits=HASTY) as lanes:
        await until(lambda: len(asked) == 1)
        assert len((await lanes.submit(request(actor.endpoint, random_rows(3)))).rows) == 3
        assert actor.server.num_tethers == 0
        assert lanes.status()[0].num_connects == 1


async def test_a_link_that_ends_while_its_tether_is_being_made_leaves_none() -> None:
    begun, may_go, let_go = threading.Event(), threading.Event(), threading.Event()

    def slow(_: socket.socket) -> Callable[[], object]:
        begun.set()
        may_go.wait(LIMIT_S)
        return let_go.set

    async with running_actor(hold=slow) as actor:
        client = await Told().connect(actor.endpoint, PATIENT)
        await until(begun.is_set)
        client.close()
        await until(lambda: not actor.server._links)
        may_go.set()
        await until(let_go.is_set)


@pytest.mark.parametrize("fault", ["no such link", "a second one", "another key", "the proof of a link"])
async def test_a_tether_that_is_not_due_is_closed_and_the_link_goes_on(tethered: FakeActor, fault: str) -> None:
    endpoint, nonce = tethered.endpoint, bytes(NONCE_BYTES)
    key = derive_link_key(b"another secret" if fault == "another key" else SECRET, endpoint.incarnation)
    link = await RawPeer.connect(endpoint)
    if fault != "no such link":
        await link.prove(endpoint)
    peers = []
    for _ in range(2 if fault == "a second one" else 1):
        peers.append(await RawPeer.connect(endpoint))
        challenge = await peers[-1].read(handshake=True)
        assert isinstance(challenge, Challenge)
        side = RouterSide(endpoint.incarnation, key, nonce, "raw")
        proof = side.prove(challenge)
        asked = side.tether(challenge)
        peers[-1].send(Tether(proof.protocol, proof.router_id, proof.nonce, proof.mac) if fault == "the proof of a link" else asked)
        if fault == "a second one" and len(peers) == 1:
            welcome = await peers[0].read(handshake=True)
            assert isinstance(welcome, Welcome)
            side.accept(welcome)
    assert await peers[-1].read_to_the_end() == b""
    assert tethered.server.num_tethers == (fault == "a second one")
    assert tethered.server.num_faults == (fault in {"another key", "the proof of a link"})
    for peer in (*peers, link):
        await peer.close()
    assert await serves(tethered)


async def test_a_killed_process_is_lost_and_one_whose_sentinel_alone_is_killed_is_not() -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", PROCESS, stdin=PIPE, stdout=PIPE, env=environment)
    assert process.stdout is not None
    port, sentinel_pid = (await process.stdout.readline()).split()
    told = Told()
    client = await told.connect(ActorEndpoint(Incarnation("actor-0", 1), "127.0.0.1", int(port), "node-1"), PATIENT)
    held = client._tether
    assert held is not None
    await until(lambda: held._is_held)
    await until(lambda: client.progress is not None)
    os.kill(int(sentinel_pid), signal.SIGKILL)
    client.probe()
    await until(lambda: client.progress.sequence == 2)
    assert held._is_held
    assert told.lost == []
    process.kill()
    await until(lambda: len(told.lost) == 1)
    assert not held._is_held
    await process.wait()


async def test_an_unknown_nonce_finds_no_link_that_has_not_been_proven() -> None:
    async with running_actor(hold=hold) as actor:
        idle = await RawPeer.connect(actor.endpoint)
        await idle.read(handshake=True)
        server: LinkServer = actor.server
        assert len(server._links) == 1
        assert server.link_of(b"") is None
        await idle.close()
