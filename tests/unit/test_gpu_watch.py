"""Errors that the driver tells: heard, classified after NVIDIA's catalogue, handed on; without a driver there are none."""

from __future__ import annotations

import ctypes
import queue
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from actors import gpu_watch
from actors.gpu_watch import MAX_FAULTS, GpuWatch, device_name
from cluster.core.status import GpuFault
from cluster.core.xids import DEVICE_XIDS, NOTED_XIDS, PROGRAM_XIDS, is_device_fault
from kit.waiting import wait_until

TIMEOUT_S = 20.0
GPU_IS_LOST = 15


class Opaque(ctypes.Structure):
    """What a handle points to is the driver's own."""


def handle_of(index: int) -> Any:
    return ctypes.cast((1 + index) << 8, ctypes.POINTER(Opaque))


def index_of(handle: Any) -> int:
    return (ctypes.cast(handle, ctypes.c_void_p).value >> 8) - 1


class NvmlError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value


class FakeNvml:
    """Two GPUs, of which the second tells nothing unless it is asked to; events come when put. A lost GPU answers no question."""

    NVMLError, NVML_ERROR_TIMEOUT, nvmlEventTypeXidCriticalError = NvmlError, 10, 8

    def __init__(self, *, works: bool = True, silent: int | None = 1) -> None:
        self.works, self.silent, self.num_open, self.num_waits = works, silent, 0, 0
        self.lost: set[int] = set()
        self.registered: list[int] = []
        self.events: queue.Queue[tuple[int, int] | NvmlError] = queue.Queue()
        self.taken: list[object] = []

    def nvmlInit(self) -> None:  # noqa: N802  (NVML's names)
        if not self.works:
            raise NvmlError(9)
        self.num_open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.num_open -= 1

    def nvmlEventSetCreate(self) -> str:  # noqa: N802
        return "events"

    def nvmlEventSetFree(self, _events: str) -> None:  # noqa: N802
        self.taken.append("freed")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:  # noqa: N802
        self._ask(index)
        return handle_of(index)

    def nvmlDeviceGetUUID(self, handle: Any) -> bytes:  # noqa: N802
        self._ask(index_of(handle))
        return f"GPU-{index_of(handle)}2345678-abcd".encode()

    def nvmlDeviceRegisterEvents(self, handle: Any, kinds: int, _events: str) -> None:  # noqa: N802
        self._ask(index_of(handle))
        if index_of(handle) == self.silent:
            raise NvmlError(3)
        assert kinds == self.nvmlEventTypeXidCriticalError
        self.registered.append(index_of(handle))

    def _ask(self, index: int) -> None:
        if index in self.lost:
            raise NvmlError(GPU_IS_LOST)

    def nvmlEventSetWait_v2(self, _events: str, _timeout_ms: int) -> Any:  # noqa: N802
        try:
            event = self.events.get(timeout=0.01)
        except queue.Empty:
            self.num_waits += 1
            raise NvmlError(self.NVML_ERROR_TIMEOUT) from None
        if isinstance(event, NvmlError):
            raise event
        return SimpleNamespace(device=handle_of(event[0]), eventData=event[1])


def heard(nvml: FakeNvml, *events: tuple[int, int]) -> list[GpuFault]:
    watch = GpuWatch(nvml)  # type: ignore[arg-type]
    assert watch.start()
    for event in events:
        nvml.events.put(event)
    wait_until(lambda: nvml.events.empty() and nvml.num_waits > 0, "the events are heard")
    ended(watch)
    return watch.faults()


def ended(watch: GpuWatch) -> None:
    watch.stop(TIMEOUT_S)
    assert watch._thread is not None
    assert not watch._thread.is_alive()


def test_errors_are_told_in_order_with_the_device_as_actors_name_it() -> None:
    nvml, before_s = FakeNvml(), time.time()
    faults = heard(nvml, (0, 79), (0, 13))
    assert [replace(fault, unix_s=0.0) for fault in faults] == [
        GpuFault(0.0, "cuda-02345678", 79, is_device=True),
        GpuFault(0.0, "cuda-02345678", 13, is_device=False),
    ]
    assert before_s <= faults[0].unix_s <= faults[1].unix_s <= time.time()
    assert device_name("GPU-02345678-abcd") == "cuda-02345678"
    assert nvml.num_open == 0
    assert nvml.taken == ["freed"]


def test_only_the_last_errors_are_kept() -> None:
    faults = heard(FakeNvml(), *((0, 100 + number) for number in range(MAX_FAULTS + 5)))
    assert [fault.xid for fault in faults] == list(range(105, MAX_FAULTS + 105))


def test_stopped_watch_ends_between_two_waits() -> None:
    nvml = FakeNvml()
    watch = GpuWatch(nvml)  # type: ignore[arg-type]
    assert watch.start()
    ended(watch)
    assert nvml.num_open == 0


def test_a_gpu_that_is_lost_is_named_although_its_driver_tells_nothing_of_it_any_more() -> None:
    nvml = FakeNvml()
    watch = GpuWatch(nvml)  # type: ignore[arg-type]
    assert watch.start()
    wait_until(lambda: nvml.registered == [0], "it listens")
    nvml.lost.add(0)
    nvml.events.put((0, 79))
    wait_until(lambda: bool(watch.faults()), "the error is heard")
    ended(watch)
    assert [(fault.device, fault.xid, fault.is_device) for fault in watch.faults()] == [("cuda-02345678", 79, True)]


def test_the_others_are_listened_to_after_the_driver_refused_because_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_watch, "RETRY_S", 0.01)
    nvml = FakeNvml(silent=None)
    watch = GpuWatch(nvml)  # type: ignore[arg-type]
    assert watch.start()
    wait_until(lambda: nvml.registered == [0, 1], "it listens")
    nvml.lost.add(0)
    nvml.events.put(NvmlError(GPU_IS_LOST))
    nvml.events.put((1, 48))
    wait_until(lambda: bool(watch.faults()), "the error is heard")
    ended(watch)
    assert [(fault.device, fault.xid) for fault in watch.faults()] == [("cuda-12345678", 48)]
    assert nvml.registered == [0, 1, 1]
    assert nvml.taken == ["freed", "freed"]
    assert nvml.num_open == 0


@pytest.mark.parametrize("nvml", [None, FakeNvml(works=False)])
def test_without_a_driver_there_is_nothing_to_hear(nvml: Any) -> None:
    watch = GpuWatch(nvml)
    assert not watch.start()
    assert watch.faults() == []


def test_catalogue_blames_devices_for_memory_and_bus_and_neither_for_programs_nor_for_what_they_repaired() -> None:
    assert all(is_device_fault(xid) for xid in (48, 64, 74, 79, 95, 119))
    assert not any(is_device_fault(xid) for xid in (8, 13, 31, 43, 45, 63, 92, 94, 99999))
    assert not DEVICE_XIDS & (PROGRAM_XIDS | NOTED_XIDS)
