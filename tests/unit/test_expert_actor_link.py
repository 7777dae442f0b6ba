"""A whole expert actor over real loopback links: a store of a tiny random model, LINK's client on the other side, answers equal to `expert_forward`."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from actors.expert_actor import ExpertActor, own_address
from actors.expert_layouts import expert_forward, load_weights
from actors.expert_store import ExpertStore
from cluster.core.actor_config import ExpertActorConfig, TelemetryConfig
from cluster.core.descriptors import DType, Manifest
from cluster.core.errors import MoeError, NotReady, ReplicaRejected, Unauthenticated
from cluster.core.ids import CopyId, ExpertId
from cluster.core.link_frames import Forward, FrameStatus, Result, SegmentStatus, derive_link_key
from cluster.core.link_limits import LinkLimits
from cluster.core.routing_table import ActorEndpoint
from cluster.core.status import ActorReport, SlotState
from cluster.telemetry.trace_files import read_spans
from kit.experts import NUMPY_DTYPES, TIMEOUT_S, Ask, frame_of, random_rows, rows_of
from kit.link import until
from kit.models import EXPERT_WIDTH, HIDDEN, save_custom
from router_service.link_client import LinkClient

torch.set_num_threads(1)
CPU = torch.device("cpu")
SECRET = b"a secret of the test deployment"
OK = SegmentStatus.OK
TORCH_VIEWS = {DType.BF16: (np.uint16, torch.bfloat16), DType.FP16: (np.uint16, torch.float16), DType.FP32: (np.uint32, torch.float32)}


class Node:
    """A node's store with one tiny model in it, and copies by (layer, index)."""

    def __init__(self, folder: Path, dtype: DType) -> None:
        self.dir = folder / "store"
        self.store = ExpertStore(self.dir)
        self.manifest: Manifest = self.store.import_model(save_custom(folder / "model"), name="tiny", dtype=dtype)
        self.dtype = dtype

    def copy(self, layer: int, index: int) -> CopyId:
        return CopyId(ExpertId("tiny", layer, index), self.manifest.experts[f"{layer}/{index}"])

    def ask(self, copy: CopyId, num_rows: int, seed: int = 0) -> Ask:
        return Ask(copy, random_rows(seed, num_rows, HIDDEN, self.dtype), dtype=self.dtype)

    def expected(self, ask: Ask) -> np.ndarray:
        plain, dtype = TORCH_VIEWS[self.dtype]
        weights = load_weights(self.store.open(ask.copy.version), CPU)
        y_TD = expert_forward(torch.from_numpy(ask.rows.view(plain)).view(dtype), weights)
        return y_TD.view(getattr(torch, plain.__name__)).numpy().view(NUMPY_DTYPES[self.dtype])

    def config(self, **overrides: object) -> ExpertActorConfig:
        values = {"deployment": "d", "actor_id": "e-0", "generation": 3, "num_slots": 4, "memory_bytes": 1 << 20, "device": "cpu", "store_dir": self.dir}
        return ExpertActorConfig.model_validate(values | overrides)


class Router:
    """One LinkClient with its results in a queue."""

    def __init__(self) -> None:
        self.results: asyncio.Queue[tuple[Result, bytes]] = asyncio.Queue()
        self.goodbyes: list[str] = []
        self.losses: list[MoeError] = []
        self.link: LinkClient | None = None

    async def connect(self, report: ActorReport, *, generation: int | None = None, secret: bytes = SECRET) -> None:
        incarnation = report.incarnation if generation is None else type(report.incarnation)(report.incarnation.actor_id, generation)
        self.link = await LinkClient.connect(
            ActorEndpoint(incarnation, report.host, report.port, report.node_id, report.device),
            derive_link_key(secret, incarnation),
            router_id="router-0",
            limits=LinkLimits(),
            on_result=lambda result, body: self.results.put_nowait((result, bytes(body))),
            on_lost=self.losses.append,
            on_goodbye=self.leave,
        )

    def leave(self, reason: str) -> None:
        self.goodbyes.append(reason)
        assert self.link is not None
        self.link.leave("told to")

    def send(self, frame: Forward, body: memoryview) -> None:
        assert self.link is not None
        self.link.send(frame, [body])

    async def answer(self, *asks: Ask, generation: int = 3, frame_id: int = 1, traceparents: tuple[str, ...] = ()) -> tuple[Result, list[np.ndarray]]:
        self.send(*frame_of(*asks, generation=generation, frame_id=frame_id, traceparents=traceparents))
        result, body = await asyncio.wait_for(self.results.get(), TIMEOUT_S)
        return result, rows_of(result, body)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    return Node(tmp_path_factory.mktemp("node"), DType.FP32)


@pytest.fixture
async def actor(node: Node) -> AsyncIterator[ExpertActor]:
    made = ExpertActor(node.config(), derive_link_key(SECRET, node.config().incarnation))
    await made.start("node-1", "127.0.0.1")
    yield made
    await made.stop(TIMEOUT_S)


@pytest.fixture
async def router(actor: ExpertActor) -> AsyncIterator[Router]:
    made = Router()
    await made.connect(await actor.report())
    yield made
    assert made.link is not None
    made.link.close()


async def hold(actor: ExpertActor, *copies: CopyId, epoch: int = 1) -> None:
    reply = await actor.assume(list(copies), epoch)
    assert reply.ok, reply.message
    async with asyncio.timeout(TIMEOUT_S):
        while any([await state_of(actor, copy) is not SlotState.READY for copy in copies]):  # noqa: ASYNC110  (a report is all that tells)
            await asyncio.sleep(0)


async def state_of(actor: ExpertActor, copy: CopyId) -> SlotState | None:
    return next((slot.state for slot in (await actor.report()).slots if slot.copy == copy), None)


@pytest.mark.parametrize("dtype", list(DType))
async def test_answers_over_the_link_equal_expert_forward_bit_for_bit(tmp_path: Path, dtype: DType) -> None:
    node = Node(tmp_path, dtype)
    actor, router = ExpertActor(node.config(), derive_link_key(SECRET, node.config().incarnation)), Router()
    await router.connect(await actor.start("node-1", "127.0.0.1"))
    copies = [node.copy(layer, 3) for layer in (0, 2)]
    await hold(actor, *copies)
    for frame_id, num_rows in enumerate([1, 2, 3, 5, 8, 64], start=1):
        asks = [node.ask(copies[0], num_rows, seed=frame_id), node.ask(copies[1], 7), node.ask(copies[0], 1, seed=99)]
        result, rows = await router.answer(*asks, frame_id=frame_id)
        assert [item.status for item in result.segments] == [OK] * 3
        for got, ask in zip(rows, asks, strict=True):
            assert got.tobytes() == node.expected(ask).tobytes()
    await actor.stop(TIMEOUT_S)
    assert router.goodbyes == ["the actor is stopping"]


async def test_starting_again_only_reports_and_the_report_is_of_this_process(actor: ExpertActor, node: Node) -> None:
    first, again = await asyncio.gather(actor.start("node-1", "127.0.0.1"), actor.start("node-1", "127.0.0.1"))
    assert (first.host, first.port) == (again.host, again.port)
    assert first.host == "127.0.0.1"
    assert (first.pid, first.process_start_s) == (os.getpid(), psutil.Process().create_time())
    assert (first.device, first.node_id, first.num_slots, first.num_free_slots) == ("cpu", "node-1", 4, 4)
    assert (first.capacity_bytes, first.used_bytes, first.max_epoch) == (1 << 20, 0, 0)
    assert first.config_digest == node.config(generation=8).config_digest


def test_an_actor_without_a_given_address_finds_one_of_its_own_to_listen_on() -> None:
    with socket.socket() as listener:
        listener.bind((own_address(), 0))
        assert listener.getsockname()[1] > 0


async def test_slots_and_bytes_are_reported_and_a_copy_too_many_is_refused_with_both_numbers(actor: ExpertActor, node: Node) -> None:
    copies = [node.copy(0, index) for index in range(5)]
    await hold(actor, *copies[:4])
    report = await actor.report()
    expert_bytes = 3 * HIDDEN * EXPERT_WIDTH * 4
    assert [(slot.copy, slot.num_bytes) for slot in report.slots] == [(copy, expert_bytes) for copy in sorted(copies[:4])]
    assert report.used_bytes == 4 * expert_bytes
    reply = await actor.assume(copies[4:], 1)
    assert (reply.ok, reply.error) == (False, "SLOTS_EXHAUSTED")
    assert "needs 1 slots and 0 of 4 are free" in reply.message
    assert (await actor.assume(copies[:4], 1)).ok


async def test_commands_answer_with_data_when_they_are_stale_unknown_or_too_early(actor: ExpertActor, node: Node) -> None:
    assert (await actor.drain([], 5)).ok
    assert [(await command([], 4)).error for command in (actor.assume, actor.drain, actor.release)] == ["STALE_TABLE"] * 3
    missing = await actor.assume([CopyId(ExpertId("tiny", 0, 0), "ab" * 32)], 5)
    assert (missing.ok, missing.error) == (False, "NOT_FOUND")
    idle = ExpertActor(node.config(), b"key")
    assert (await idle.assume([], 1)).error == "NOT_READY"
    with pytest.raises(NotReady):
        await idle.report()
    await idle.stop(TIMEOUT_S)
    with pytest.raises(NotReady, match="was stopped"):
        await idle.start("node-1")


async def test_wrong_versions_and_released_copies_are_not_held(actor: ExpertActor, node: Node, router: Router) -> None:
    copy = node.copy(0, 1)
    await hold(actor, copy)
    wrong = CopyId(copy.expert, node.copy(0, 2).version)
    result, _ = await router.answer(node.ask(wrong, 2), node.ask(copy, 2))
    assert [item.status for item in result.segments] == [SegmentStatus.NOT_HELD, OK]
    assert (await actor.drain([copy], 2)).ok
    result, _ = await router.answer(node.ask(copy, 2), frame_id=2)
    assert [item.status for item in result.segments] == [SegmentStatus.DRAINING]
    assert (await actor.release([copy], 2)).ok
    result, _ = await router.answer(node.ask(copy, 2), frame_id=3)
    assert [item.status for item in result.segments] == [SegmentStatus.NOT_HELD]
    assert (await actor.report()).num_free_slots == 4


async def test_a_frame_or_a_link_of_another_generation_is_refused(actor: ExpertActor, node: Node, router: Router) -> None:
    result, _ = await router.answer(node.ask(node.copy(0, 1), 2), generation=2)
    assert (result.status, result.generation) == (FrameStatus.WRONG_GENERATION, 3)
    with pytest.raises((ReplicaRejected, Unauthenticated)):
        await Router().connect(await actor.report(), generation=2)
    with pytest.raises(Unauthenticated):
        await Router().connect(await actor.report(), secret=b"another secret")


async def test_progress_reaches_the_router_in_its_heartbeats(actor: ExpertActor, node: Node, router: Router) -> None:
    await hold(actor, node.copy(0, 1))
    await router.answer(node.ask(node.copy(0, 1), 2))
    link = router.link
    await until(lambda: link is not None and link.progress is not None and link.progress.frames_done == 1)
    assert link is not None
    assert link.progress is not None
    assert (link.progress.queued_tokens, link.progress.generation) == (0, 3)
    assert (await actor.report()).frames_done == 1


async def test_a_sampled_frame_is_one_span_below_its_first_request_and_linked_to_the_others(node: Node, tmp_path: Path) -> None:
    config = node.config(telemetry=TelemetryConfig(sampling_ratio=0.0, trace_dir=tmp_path, actor_spans=True))
    actor, router = ExpertActor(config, derive_link_key(SECRET, config.incarnation)), Router()
    await router.connect(await actor.start("node-1", "127.0.0.1"))
    await hold(actor, node.copy(0, 1))
    parents = tuple(f"00-{trace:032x}-{trace:016x}-01" for trace in (1, 2))
    await router.answer(node.ask(node.copy(0, 1), 5), traceparents=parents)
    await router.answer(node.ask(node.copy(0, 1), 5), frame_id=2)
    await actor.stop(TIMEOUT_S)
    (span,) = read_spans(tmp_path)
    assert (span.name, span.trace_id, span.parent_id) == ("expert.forward", f"{1:032x}", f"{1:016x}")
    assert [link[0] for link in span.links] == [f"{2:032x}"]
    assert span.attributes["moe.tokens"] == 5
    assert span.attributes["moe.merged_requests"] == 2
    assert span.attributes["moe.bytes_sent"] == span.attributes["moe.bytes_received"] == 5 * HIDDEN * 4
    assert {"moe.queue_s", "moe.compute_s", "moe.actor_id", "moe.device", "moe.segments", "moe.generation", "moe.node_id"} <= set(span.attributes)


async def test_replacing_the_source_while_serving_changes_no_answer(tmp_path: Path) -> None:
    node = Node(tmp_path, DType.FP32)
    actor, router = ExpertActor(node.config(), derive_link_key(SECRET, node.config().incarnation)), Router()
    await router.connect(await actor.start("node-1", "127.0.0.1"))
    copy = node.copy(0, 1)
    await hold(actor, copy)
    ask = node.ask(copy, 3)
    before = (await router.answer(ask))[1][0]
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    assert np.array_equal((await router.answer(ask, frame_id=2))[1][0], before)
    assert (await actor.drain([copy], 1)).ok
    assert (await actor.release([copy], 1)).ok
    await hold(actor, copy)
    assert np.array_equal((await router.answer(ask, frame_id=3))[1][0], before)
    await actor.stop(TIMEOUT_S)
