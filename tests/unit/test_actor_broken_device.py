"""A device that breaks, or has no memory, under any thread of an actor: the process is told to end, or the thread goes on; none of them falls silent."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from actors import expert_runtime, redigest
from actors.core import weight_digests
from actors.device import ErrorKind
from actors.staging import CpuStaging, Staging, judged
from cluster.core.link_frames import SegmentStatus
from cluster.core.status import SlotState
from kit.actor_bench import A, B, Bench, ask, started
from kit.shadow_blobs import Expansions, S, ShadowBlobs


class FakeDevice(CpuStaging):
    """The CPU, as a device that tells of a kernel that failed before only when it is asked. `opens` may refuse."""

    error: Exception | None = None
    opens: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self) -> None:
        super().__init__()
        FakeDevice.opens()

    def settle(self) -> None:
        if FakeDevice.error is not None:
            raise FakeDevice.error


@pytest.fixture(autouse=True)
def fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDevice, "error", None)
    monkeypatch.setattr(expert_runtime, "open_staging", lambda _device: FakeDevice())


@pytest.fixture
def expansions() -> Expansions:
    return Expansions.opened()


@pytest.fixture
def bench(expansions: Expansions) -> Iterator[Bench]:
    yield from started(ShadowBlobs(), expansions, expanded_max=1, redigest_s=3600.0, abft_fraction=1.0)


def on_thread(name: str, error: Exception) -> Callable[[], None]:
    def refuse() -> None:
        if threading.current_thread().name == name:
            raise error

    return refuse


class Asked(CpuStaging):
    """Counts how often the device was asked."""

    def __init__(self, answer: Exception | None = None) -> None:
        super().__init__()
        self.answer, self.num_asked = answer, 0

    def settle(self) -> None:
        self.num_asked += 1
        if self.answer is not None:
            raise self.answer


@pytest.mark.parametrize(
    ("error", "answer", "kind", "num_asked"),
    [
        (ValueError(), None, ErrorKind.FAULT, 1),
        (ValueError(), torch.AcceleratorError(), ErrorKind.STICKY, 1),
        (torch.OutOfMemoryError(), None, ErrorKind.OUT_OF_MEMORY, 1),
        (torch.OutOfMemoryError(), torch.AcceleratorError(), ErrorKind.STICKY, 1),
        (torch.AcceleratorError(), None, ErrorKind.STICKY, 0),
    ],
)
def test_an_error_is_judged_with_what_the_device_has_to_say(error: Exception, answer: Exception | None, kind: ErrorKind, num_asked: int) -> None:
    staging: Staging = Asked(answer)
    assert judged(error, staging) == (kind, answer or error)
    assert isinstance(staging, Asked)
    assert staging.num_asked == num_asked


@pytest.mark.parametrize("thread", ["copy-loader", "shadow-workspace", "redigest"])
def test_a_thread_that_cannot_even_begin_on_the_device_ends_the_process(thread: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDevice, "opens", staticmethod(on_thread(thread, RuntimeError("no stream"))))
    for made in started(ShadowBlobs()):
        made.wait_until(partial(operator.eq, made.deaths, ["RuntimeError"]))


def test_a_load_that_fails_on_a_poisoned_device_ends_the_process(bench: Bench) -> None:
    def poison(_weights: object, _rows: object) -> None:
        FakeDevice.error = torch.AcceleratorError()
        raise ValueError

    bench.forward.warm_trap = poison
    bench.runtime.assume(bench.blobs.sized(A), 1)
    bench.wait_until(lambda: bench.deaths == ["AcceleratorError"])


def test_an_expansion_that_fails_on_a_poisoned_device_ends_the_process(bench: Bench, expansions: Expansions) -> None:
    bench.hold_copies(S)
    expansions.broken.add(S.version)
    FakeDevice.error = torch.AcceleratorError()
    bench.submit(ask(S))
    bench.wait_until(lambda: bench.deaths == ["AcceleratorError"])


def test_a_piece_that_there_is_no_memory_to_read_is_left_and_the_reading_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [torch.OutOfMemoryError()]

    def have_changed(*arguments: object) -> bool:
        if failures:
            raise failures.pop()
        return weight_digests.have_changed(*arguments)  # type: ignore[arg-type]

    bench.hold_copies(A, B)
    monkeypatch.setattr(redigest, "have_changed", have_changed)
    suspected = bench.runtime._weights[A]
    bench.runtime._redigester.suspect(suspected)
    bench.wait_until(lambda: not failures)
    bench.runtime._weights[A].tensors["down"].view(-1).view(torch.uint8)[3] ^= 0x40
    bench.runtime._redigester.suspect(suspected)
    bench.wait_until(lambda: bench.state(A) is SlotState.FAILED)
    assert bench.deaths == []
    bench.submit(ask(B))
    assert bench.statuses() == [SegmentStatus.OK]


def test_a_device_that_breaks_while_weights_are_read_again_ends_the_process(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def have_changed(*_arguments: object) -> bool:
        raise torch.AcceleratorError

    bench.hold_copies(A)
    monkeypatch.setattr(redigest, "have_changed", have_changed)
    bench.runtime._redigester.suspect(bench.runtime._weights[A])
    bench.wait_until(lambda: bench.deaths == ["AcceleratorError"])


def test_products_in_fp32_are_fp32_whatever_the_image_asked_for() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        for _ in started(ShadowBlobs()):
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")
