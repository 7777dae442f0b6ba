"""Errors that the driver tells: heard, classified after NVIDIA's catalogue, handed on; without a driver there are none."""

from __future__ import annotations

import queue
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from actors.gpu_watch import MAX_FAULTS, GpuWatch, device_name
from cluster.core.status import GpuFault
from cluster.core.xids import DEVICE_XIDS, PROGRAM_XIDS, is_device_fault

TIMEOUT_S = 20.0


class NvmlError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value


class FakeNvml:
    """Two GPUs, of which the second tells nothing; events come when put."""

    NVMLError, NVML_ERROR_TIMEOUT, nvmlEventTypeXidCriticalError = NvmlError, 10, 8

    def __init__(self, *, works: bool = True) -> None:
        self.works, self.num_open, self.num_waits = works, 0, 0
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

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:  # noqa: N802
        return f"GPU-{handle}2345678-abcd".encode()

    def nvmlDeviceRegisterEvents(self, handle: int, kinds: int, _events: str) -> None:  # noqa: N802
        if handle == 1:
            raise NvmlError(3)
        assert kinds == self.nvmlEventTypeXidCriticalError

    def nvmlEventSetWait_v2(self, _events: str, _timeout_ms: int) -> Any:  # noqa: N802
        try:
            event = self.events.get(timeout=0.01)
        except queue.Empty:
            self.num_waits += 1
            raise NvmlError(self.NVML_ERROR_TIMEOUT) from None
        if isinstance(event, NvmlError):
            raise event
        return SimpleNamespace(device=event[0], eventData=event[1])


def heard(nvml: FakeNvml, *events: tuple[int, int]) -> list[GpuFault]:
    watch = GpuWatch(nvml)  # type: ignore[arg-type]
    assert watch.start()
    for event in events:
        nvml.events.put(event)
    nvml.events.put(NvmlError(999))  # ends the thread, after all events
    thread = watch._thread
    assert thread is not None
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()
    return watch.faults()


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
    watch.stop(TIMEOUT_S)
    assert watch._thread is not None
    assert not watch._thread.is_alive()
    assert nvml.num_open == 0


@pytest.mark.parametrize("nvml", [None, FakeNvml(works=False)])
def test_without_a_driver_there_is_nothing_to_hear(nvml: Any) -> None:
    watch = GpuWatch(nvml)
    assert not watch.start()
    assert watch.faults() == []


def test_catalogue_blames_devices_for_memory_and_bus_and_programs_for_the_rest() -> None:
    assert all(is_device_fault(xid) for xid in (48, 63, 64, 74, 79, 94, 95, 119))
    assert not any(is_device_fault(xid) for xid in (8, 13, 31, 43, 45, 99999))
    assert not DEVICE_XIDS & PROGRAM_XIDS
