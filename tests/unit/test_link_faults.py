"""Fault and hint frames on a real link: only where a port is open, only after the handshake, one at a time, and never in the way of a Ping."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path

import pytest

from actors.expert_actor import ExpertActor
from cluster.core.actor_config import ExpertActorConfig
from cluster.core.errors import MoeError
from cluster.core.ids import Incarnation
from cluster.core.launch import Launch, actor_config
from cluster.core.link_frames import NONCE_BYTES, Challenge, Cool, Fault, FaultReply, Frame, Ping, Pong, Warm, Welcome, derive_fault_token, derive_link_key
from cluster.core.link_handshake import RouterSide
from cluster.core.spec import ClusterSpec
from cluster.link_transport import FrameStream
from kit.link import SECRET, FakeActor, running_actor

WAIT_S = 10


class Peer:
    """A proven link that keeps what it hears."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[Frame] = asyncio.Queue()
        self._side: RouterSide
        self._stream: FrameStream

    async def connect(self, incarnation: Incarnation, host: str, port: int) -> None:
        self._side = RouterSide(incarnation, derive_link_key(SECRET, incarnation), bytes(NONCE_BYTES), "chaos-0")
        sock = socket.socket()
        sock.settimeout(0)
        await asyncio.get_running_loop().sock_connect(sock, (host, port))
        self._stream = FrameStream(sock, on_frame=self._on_frame, on_closed=self._on_closed, max_body_bytes=1 << 20, max_pending_bytes=1 << 20)
        assert isinstance(await self.next(), Welcome)

    def send(self, frame: Frame) -> None:
        self._stream.send(frame)

    async def next(self) -> Frame:
        return await asyncio.wait_for(self.heard.get(), WAIT_S)

    def close(self) -> None:
        self._stream.close()

    def _on_frame(self, frame: Frame, _body: memoryview) -> None:
        if isinstance(frame, Challenge):
            self._stream.send(self._side.prove(frame))
            return
        if isinstance(frame, Welcome):
            self._side.accept(frame)
            self._stream.open_gate()
        self.heard.put_nowait(frame)

    def _on_closed(self, _error: MoeError | None) -> None:
        pass


async def connected(actor: FakeActor) -> Peer:
    peer = Peer()
    await peer.connect(actor.server.incarnation, actor.host, actor.port)
    return peer


async def test_without_a_port_every_fault_is_refused_with_the_remedy() -> None:
    async with running_actor() as actor:
        peer = await connected(actor)
        peer.send(Fault(b"t", "refuse_all", "{}"))
        assert await peer.next() == FaultReply(ok=False, message="CHAOS_REFUSED: this actor plays no faults; deploy a spec with `chaos: allowed`")
        peer.close()


async def test_faults_are_played_beside_the_loop_one_at_a_time_and_answered() -> None:
    gate, played = threading.Event(), []

    def play(frame: Fault) -> FaultReply:
        played.append((frame.name, threading.current_thread() is threading.main_thread()))
        assert gate.wait(WAIT_S)
        return FaultReply(ok=True, message="done")

    async with running_actor() as actor:
        actor.server.fault = play
        peer = await connected(actor)
        peer.send(Fault(b"t", "balloon", "{}"))
        peer.send(Fault(b"t", "heal", "{}"))
        peer.send(Ping(3))
        busy, pong = await peer.next(), await peer.next()
        assert isinstance(busy, FaultReply)
        assert (busy.ok, busy.message.split(":")[0]) == (False, "OVERLOADED")
        assert isinstance(pong, Pong)
        gate.set()
        assert await peer.next() == FaultReply(ok=True, message="done")
        assert played == [("balloon", False)]
        peer.close()


async def test_a_port_that_raises_still_answers() -> None:
    def play(_frame: Fault) -> FaultReply:
        raise RuntimeError

    async with running_actor() as actor:
        actor.server.fault = play
        peer = await connected(actor)
        peer.send(Fault(b"t", "heal", "{}"))
        assert await peer.next() == FaultReply(ok=False, message="FAULTED: RuntimeError")
        peer.close()


@pytest.mark.parametrize("is_heard", [True, False])
async def test_hints_reach_the_runtime_or_nobody_and_are_not_answered(is_heard: bool) -> None:
    hints: list[Warm | Cool] = []
    async with running_actor() as actor:
        actor.server.hint = hints.append if is_heard else None
        peer = await connected(actor)
        sent = [kind("tiny", 0, 1, b"\x01" * 32) for kind in (Warm, Cool)]
        for hint in sent:
            peer.send(hint)
        peer.send(Ping(1))
        assert isinstance(await peer.next(), Pong)
        assert hints == (sent if is_heard else [])
        peer.close()


@pytest.mark.parametrize("chaos", ["allowed", "refused"])
async def test_a_whole_actor_plays_faults_only_when_its_spec_allows_chaos_and_the_token_is_its_own(tmp_path: Path, chaos: str) -> None:
    spec = ClusterSpec.model_validate({"models": [{"name": "tiny", "path": "unused"}], "chaos": chaos, "abft": {"fraction": 0.5, "redigest_s": 7}})
    config: ExpertActorConfig = actor_config(spec, Launch(tmp_path), Incarnation("e-0", 2), 1)
    assert (config.chaos_allowed, config.abft_fraction, config.redigest_s) == (chaos == "allowed", 0.5, 7.0)
    actor = ExpertActor(config.model_copy(update={"device": "cpu", "memory_bytes": 1 << 20}), derive_link_key(SECRET, config.incarnation))
    report = await actor.start("node-1", "127.0.0.1")
    peer = Peer()
    try:
        await peer.connect(config.incarnation, report.host, report.port)
        peer.send(Fault(derive_fault_token(SECRET, config.incarnation), "state", "{}"))
        told = await peer.next()
        peer.send(Fault(derive_fault_token(SECRET, Incarnation("e-0", 1)), "exit", "{}"))
        refused = await peer.next()
    finally:
        peer.close()
        await actor.stop(WAIT_S)
    assert isinstance(told, FaultReply)
    assert isinstance(refused, FaultReply)
    assert (told.ok, refused.ok) == (chaos == "allowed", False)
    assert refused.message.startswith("UNAUTHENTICATED" if told.ok else "CHAOS_REFUSED")
