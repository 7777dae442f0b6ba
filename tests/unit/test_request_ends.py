"""What a request had in hand goes when it ends, however it ends, without waiting for the garbage collector; and very many leave nothing behind.

The collector comes by after so many new objects, however large the messages are that they hold.
"""

import asyncio
import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cluster.core.errors import ExpertUnavailable, InvalidRequest, MoeError, NotFound, Unauthenticated
from kit.in_process import TOKEN, InProcessCluster, in_process_cluster
from kit.models import HIDDEN, save_tiny
from kit.pipelines import E, call, setup
from kit.waiting import until, wait_until
from router_service.client import RouterClient

MODEL = "mixtral"
MAX_MESSAGE_BYTES = 32 << 10
NUM_ENDS, NUM_REQUESTS = 40, 1000
OURS = {"cluster", "actors", "router_service", "protos"}
# What links, timers and gRPC have under way now and then; what is left behind is one for each request.
FEW = NUM_ENDS // 4
ROWS = torch.randn((2, HIDDEN), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
MANY_ROWS = torch.randn((700, HIDDEN), generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
ENDS: dict[str, tuple[Callable[[RouterClient], object], type[MoeError] | None]] = {
    "answered": (lambda client: client.dispatch(ROWS, model=MODEL, layer=1), None),
    "answered with a plan": (lambda client: client.dispatch(ROWS, model=MODEL, layer=1, report="plan"), None),
    "answered in chunks": (lambda client: client.dispatch(MANY_ROWS, model=MODEL, layer=1), None),
    "asked for no such model": (lambda client: client.dispatch(ROWS, model="none", layer=1), NotFound),
    "not finite": (lambda client: client.dispatch(ROWS * float("nan"), model=MODEL, layer=1), InvalidRequest),
    "not finite, in chunks": (lambda client: client.dispatch(MANY_ROWS * float("nan"), model=MODEL, layer=1), InvalidRequest),
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessCluster]:
    root = tmp_path_factory.mktemp("ends")
    folder = save_tiny(MODEL, root / "model", torch.bfloat16)
    with in_process_cluster({MODEL: folder}, root / "cluster", router={"max_message_bytes": MAX_MESSAGE_BYTES}) as made:
        yield made


@pytest.fixture
def client(cluster: InProcessCluster) -> Iterator[RouterClient]:
    with cluster.client() as made:
        yield made


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _live(*, ours: bool) -> Counter[str]:
    """Live objects by type: of our own types and the tracebacks of errors, or of all types."""
    kinds = (type(found) for found in gc.get_objects())
    wanted = (kind for kind in kinds if not ours or kind.__name__ == "traceback" or str(kind.__module__).partition(".")[0] in OURS)
    return Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in wanted)


def _grown(before: Counter[str], few: int, *, ours: bool) -> dict[str, int]:
    return {name: count for name, count in (_live(ours=ours) - before).items() if count > few}


def _ended(once: Callable[[], object], error: type[MoeError] | None) -> None:
    if error is None:
        once()
    else:
        with pytest.raises(error):
            once()


def _check_ends(once: Callable[[], object], error: type[MoeError] | None) -> None:
    """What is hedged late looks at its call once more, so that is waited for."""
    _ended(once, error)
    with _no_collector():
        before = _live(ours=True)
        for _ in range(NUM_ENDS):
            _ended(once, error)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not _grown(before, FEW, ours=True), "what the requests had in hand is gone", timeout_s=5.0)
        assert _grown(before, FEW, ours=True) == {}


@pytest.mark.parametrize("end", ENDS)
def test_what_a_request_had_in_hand_goes_when_it_ends(client: RouterClient, end: str) -> None:
    once, error = ENDS[end]
    _check_ends(lambda: once(client), error)


def test_a_stranger_s_call_leaves_nothing(cluster: InProcessCluster) -> None:
    with cluster.client(token=TOKEN[::-1]) as stranger:
        _check_ends(lambda: stranger.dispatch(ROWS, model=MODEL, layer=1), Unauthenticated)


async def test_a_call_that_its_caller_gives_up_is_let_go_of_at_once() -> None:
    made = setup()
    made.lanes.hold()
    with _no_collector():
        before = _live(ours=True)
        for number in range(NUM_ENDS):
            running = asyncio.ensure_future(made.pipeline.run(call()))
            await made.lanes.wait_until_submitted((number + 1) * E)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            del running
        made.lanes.requests.clear()
        await until(lambda: len(made.lanes.withdrawn) == NUM_ENDS * E)
        made.lanes.withdrawn.clear()
        with contextlib.suppress(TimeoutError):
            await until(lambda: not _grown(before, FEW, ours=True), timeout_s=5.0)
        assert _grown(before, FEW, ours=True) == {}


def test_a_call_without_a_copy_left_leaves_nothing(tmp_path: Path) -> None:
    folder = save_tiny(MODEL, tmp_path / "model", torch.bfloat16)
    with in_process_cluster({MODEL: folder}, tmp_path / "cluster") as cluster, cluster.client(timeout_s=0.05) as client:
        for actor_id in ("actor-0", "actor-1"):
            cluster.kill(actor_id)
        _check_ends(lambda: client.dispatch(ROWS, model=MODEL, layer=1, timeout_s=0.05), ExpertUnavailable)


def test_very_many_requests_leave_nothing_behind(client: RouterClient) -> None:
    """Nor does what a collection would find: no table, list or cache grows with the requests."""
    for _ in range(NUM_REQUESTS // 10):
        client.dispatch(ROWS, model=MODEL, layer=1)
    gc.collect()
    before = _live(ours=False)
    for _ in range(NUM_REQUESTS):
        client.dispatch(ROWS, model=MODEL, layer=1)
    gc.collect()
    assert _grown(before, NUM_REQUESTS // 10, ours=False) == {}
