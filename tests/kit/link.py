"""Both ends of real loopback links, with a compute thread that only copies: enough to test the link without torch."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from queue import SimpleQueue

import numpy as np

from actors.link_server import LinkServer, Reply
from actors.progress import Progress
from actors.tether import Hold
from cluster.core.descriptors import DType
from cluster.core.ids import ExpertId, Incarnation, Role
from cluster.core.link_codec import PREFIX, decode, decode_prefix, encode
from cluster.core.link_frames import (
    NONCE_BYTES,
    Challenge,
    Forward,
    Frame,
    FrameStatus,
    Result,
    Run,
    Segment,
    SegmentResult,
    SegmentStatus,
    Welcome,
    derive_link_key,
)
from cluster.core.link_handshake import RouterSide
from cluster.core.link_limits import LinkLimits
from cluster.core.routing_table import ActorEndpoint, RoutingTable, TableCopy
from router_service.lanes import Lanes, SegmentRequest

SECRET = b"a secret of the test deployment"
VERSION = "ab" * 32


Fault = Callable[[Segment, memoryview], SegmentStatus]


def answer(frame: Forward, body: memoryview, *, generation: int | None = None, fault: Fault | None = None) -> tuple[Result, list]:
    """The Result of an identity expert; `fault(segment, rows)` may give another status for a segment."""
    segments, buffers, offset = [], [], 0
    for item in frame.segments:
        status = fault(item, body[offset : offset + item.num_bytes]) if fault is not None else SegmentStatus.OK
        is_ok = status is SegmentStatus.OK
        segments.append(SegmentResult(item.segment_id, item.attempt, status, item.dtype, item.dim, item.num_rows if is_ok else 0, (), ""))
        if is_ok:
            buffers.append(body[offset : offset + item.num_bytes])
        offset += item.num_bytes
    own = frame.generation if generation is None else generation
    return Result(frame.frame_id, own, FrameStatus.OK, 0.0, 0.0, tuple(segments)), buffers


class FakeCompute:
    """One thread that answers frames in order. While `gate` is cleared it holds the frame in its hands; `reply_with` replaces the answer."""

    def __init__(self) -> None:
        self.frames: list[Forward] = []
        self.cancelled: list[tuple[int, ...]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.reply_with: Callable[[Forward, memoryview], tuple[Result, list]] = answer
        self._queue: SimpleQueue[tuple[Forward, memoryview, Reply] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fake-compute", daemon=True)
        self._thread.start()

    def submit(self, frame: Forward, body: memoryview, reply: Reply) -> None:
        self.frames.append(frame)
        self._queue.put((frame, body, reply))

    def cancel(self, frame: Forward, segment_ids: tuple[int, ...]) -> None:
        assert frame in self.frames
        self.cancelled.append(segment_ids)

    def progress(self) -> Progress:
        return Progress(len(self.frames), 0.25, 7)

    def close(self) -> None:
        self.gate.set()
        self._queue.put(None)
        self._thread.join(10)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            frame, body, reply = item
            self.gate.wait(30)
            reply(*self.reply_with(frame, body))


class FakeActor:
    """A LinkServer with a FakeCompute behind it."""

    def __init__(self, incarnation: Incarnation, limits: LinkLimits, secret: bytes = SECRET, hold: Hold | None = None) -> None:
        self.compute = FakeCompute()
        key = derive_link_key(secret, incarnation)
        self.server = LinkServer(incarnation, key, limits, self.compute.submit, self.compute.progress, cancel=self.compute.cancel, hold=hold)
        self.host, self.port = "", 0

    @property
    def endpoint(self) -> ActorEndpoint:
        return ActorEndpoint(self.server.incarnation, self.host, self.port, "node-1")


@asynccontextmanager
async def running_actor(
    actor_id: str = "actor-0",
    *,
    generation: int = 1,
    limits: LinkLimits | None = None,
    host: str = "127.0.0.1",
    secret: bytes = SECRET,
    hold: Hold | None = None,
) -> AsyncIterator[FakeActor]:
    actor = FakeActor(Incarnation(actor_id, generation), limits or LinkLimits(), secret, hold)
    actor.host, actor.port = await actor.server.start(host)
    try:
        yield actor
    finally:
        actor.compute.gate.set()
        await actor.server.stop("test over", 1.0)
        actor.compute.close()


@asynccontextmanager
async def running_lanes(*endpoints: ActorEndpoint, limits: LinkLimits | None = None, secret: bytes = SECRET, **options: object) -> AsyncIterator[Lanes]:
    lanes = Lanes(router_id="router-0", link_secret=secret, limits=limits, **options)
    await lanes.apply(table_of(*endpoints))
    await lanes.wait_until_settled(10)
    try:
        yield lanes
    finally:
        await lanes.close(1.0)


def table_of(*endpoints: ActorEndpoint, epoch: int = 1) -> RoutingTable:
    return RoutingTable(epoch, {endpoint.incarnation.actor_id: endpoint for endpoint in endpoints})


def request(endpoint: ActorEndpoint, rows: np.ndarray, *, timeout_s: float = 20.0, index: int = 0, attempt: int = 0, flow: object = None) -> SegmentRequest:
    """Rows [n, bytes] as a bf16 segment."""
    return SegmentRequest(
        expert=ExpertId("model", 0, index),
        copy=TableCopy(endpoint.incarnation, VERSION, Role.REPLICA),
        dtype=DType.BF16,
        dim=rows.shape[1] // 2,
        rows=rows,
        deadline_s=asyncio.get_running_loop().time() + timeout_s,
        exact=False,
        epoch=1,
        attempt=attempt,
        flow=flow,
    )


def random_rows(num_rows: int, num_bytes: int = 128, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_rows, num_bytes), dtype=np.uint8)


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  (the other side is a thread or a kernel: there is no event to wait on)
            await asyncio.sleep(0.001)


class RawPeer:
    """A router that does as it is told, frame by frame."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, endpoint: ActorEndpoint, *, receive_bytes: int | None = None) -> RawPeer:
        sock = socket.socket()
        if receive_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        sock.settimeout(0)
        await asyncio.get_running_loop().sock_connect(sock, (endpoint.host, endpoint.port))
        return cls(*await asyncio.open_connection(sock=sock))

    async def prove(self, endpoint: ActorEndpoint, secret: bytes = SECRET) -> None:
        """The router's side of the handshake."""
        side = RouterSide(endpoint.incarnation, derive_link_key(secret, endpoint.incarnation), bytes(NONCE_BYTES), "raw")
        challenge = await self.read(handshake=True)
        assert isinstance(challenge, Challenge)
        self.send(side.prove(challenge))
        welcome = await self.read(handshake=True)
        assert isinstance(welcome, Welcome), welcome
        side.accept(welcome)

    def send(self, frame: Frame, body: bytes = b"") -> None:
        self.writer.write(encode(frame) + body)

    async def read(self, *, handshake: bool = False) -> Frame:
        """The next frame; bodies are skipped."""
        async with asyncio.timeout(10):
            prefix = decode_prefix(await self.reader.readexactly(PREFIX.size), max_body_bytes=1 << 30, handshake=handshake)
            frame = decode(prefix, await self.reader.readexactly(prefix.header_bytes))
            await self.reader.readexactly(prefix.body_bytes)
            return frame

    async def read_to_the_end(self) -> bytes:
        """Everything until the other side closes."""
        async with asyncio.timeout(10):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    async def close(self) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()


def forward_of(num_rows: int, dim: int = 4, *, frame_id: int = 1, generation: int = 1) -> Forward:
    """One segment of bf16 rows."""
    run = Run(num_rows, 10_000, exact=False, epoch=1)
    return Forward(frame_id, generation, (), (Segment(1, 0, "model", 0, 0, bytes.fromhex(VERSION), Role.REPLICA, DType.BF16, dim, (run,)),))


def submit(lanes: Lanes, actor: FakeActor, rows: np.ndarray, **options: object) -> asyncio.Task:
    """A submit under way."""
    return asyncio.create_task(lanes.submit(request(actor.endpoint, rows, **options)))


async def holding(actor: FakeActor, lanes: Lanes, num_frames: int = 1) -> list[asyncio.Task]:
    """Keep the actor busy with this many frames of one row; set `actor.compute.gate` to let them go."""
    actor.compute.gate.clear()
    tasks = []
    for number in range(num_frames):
        tasks.append(submit(lanes, actor, random_rows(1, seed=number)))
        await until(lambda: len(actor.compute.frames) == len(tasks))
    return tasks


async def serves(actor: FakeActor) -> bool:
    """Whether a fresh router gets its rows back."""
    async with running_lanes(actor.endpoint) as lanes:
        rows = random_rows(3)
        return np.array_equal((await lanes.submit(request(actor.endpoint, rows))).rows, rows)


@contextmanager
def joined_ends(limit_s: float) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A router's end, which waits no longer than the limit, and an actor's."""
    router, actor = socket.socketpair()
    router.settimeout(limit_s)
    with router, actor:
        yield router, actor
