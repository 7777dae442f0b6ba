"""Errors that the driver tells: heard, classified after NVIDIA's catalogue, handed on; without a driver there are none."""

from __future__ import annotations

import ctypes
import queue
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from actors import gpu_watch
from actors.gpu_watch import ANY_INSTANCE, MAX_FAULTS, GpuWatch, device_name
from cluster.core.status import GpuFault
from cluster.core.xids import DEVICE_XIDS, NO_RECOVERY, NOTED_XIDS, PROGRAM_XIDS, is_device_fault
from kit.waiting import wait_until

TIMEOUT_S = 20.0
NOT_SUPPORTED, NOT_FOUND, GPU_IS_LOST = 3, 6, 15
GPU_RESET, DRAIN_P2P = 1, 3


class Opaque(ctypes.Structure):
    """What a handle points to is the driver's own."""


def handle_of(index: int, part: int = 0) -> Any:
    """The handle of a GPU, or of its instance number `part`, from 1 on."""
    return ctypes.cast(((1 + index) << 8) + part, ctypes.POINTER(Opaque))


def part_of(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value & 0xFF


def index_of(handle: Any) -> int:
    return (ctypes.cast(handle, ctypes.c_void_p).value >> 8) - 1


class NvmlError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value


class FakeNvml:
    """Two GPUs, of which the second tells nothing unless it is asked to; events come when put. A lost GPU answers no question.

    `instances`: (GPU instance, compute instance) of what each GPU is divided into, None for a gap. `recovery`: what is due for a GPU; others cannot say.
    """

    NVMLError, NVML_SUCCESS, NVML_ERROR_TIMEOUT, nvmlEventTypeXidCriticalError = NvmlError, 0, 10, 8
    NVML_FI_DEV_GET_GPU_RECOVERY_ACTION = 230

    def __init__(self, *, works: bool = True, silent: int | None = 1) -> None:
        self.works, self.silent, self.num_open, self.num_waits = works, silent, 0, 0
        self.lost: set[int] = set()
        self.registered: list[int] = []
        self.instances: dict[int, list[tuple[int, int] | None]] = {}
        self.recovery: dict[int, int] = {}
        self.events: queue.Queue[tuple[int, ...] | NvmlError] = queue.Queue()
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
        if part := part_of(handle):
            return f"MIG-{index_of(handle)}{part}abcdef-1234".encode()
        return f"GPU-{index_of(handle)}2345678-abcd".encode()

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any) -> int:  # noqa: N802
        self._ask(index_of(handle))
        return len(self.instances.get(index_of(handle), ()))

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: int) -> Any:  # noqa: N802
        self._ask(index_of(handle))
        if self.instances[index_of(handle)][index] is None:
            raise NvmlError(NOT_FOUND)
        return handle_of(index_of(handle), 1 + index)

    def nvmlDeviceGetGpuInstanceId(self, part: Any) -> int:  # noqa: N802
        return self.instances[index_of(part)][part_of(part) - 1][0]

    def nvmlDeviceGetComputeInstanceId(self, part: Any) -> int:  # noqa: N802
        return self.instances[index_of(part)][part_of(part) - 1][1]

    def nvmlDeviceGetFieldValues(self, handle: Any, fields: list[int]) -> list[Any]:  # noqa: N802
        self._ask(index_of(handle))
        assert fields == [self.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION]
        action = self.recovery.get(index_of(handle))
        if action is None:
            return [SimpleNamespace(nvmlReturn=NOT_SUPPORTED, value=SimpleNamespace(uiVal=0))]
        return [SimpleNamespace(nvmlReturn=self.NVML_SUCCESS, value=SimpleNamespace(uiVal=action))]

    def nvmlDeviceRegisterEvents(self, handle: Any, kinds: int, _events: str) -> None:  # noqa: N802
        self._ask(index_of(handle))
        if index_of(handle) == self.silent:
            raise NvmlError(NOT_SUPPORTED)
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
        index, xid, *instance = event
        gpu_instance, compute_instance = instance or (ANY_INSTANCE, ANY_INSTANCE)
        return SimpleNamespace(device=handle_of(index), eventData=xid, gpuInstanceId=gpu_instance, computeInstanceId=compute_instance)


def heard(nvml: FakeNvml, *events: tuple[int, ...]) -> list[GpuFault]:
    """Events as (GPU, Xid), or (GPU, Xid, GPU instance, compute instance)."""
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


def test_the_stand_in_has_what_the_library_has_by_the_same_names_and_numbers() -> None:
    ours = {name: value for name, value in vars(FakeNvml).items() if name.lower().startswith("nvml") and name != "NVMLError"}
    assert len(ours) > 10
    assert [name for name, value in ours.items() if not (callable(getattr(pynvml, name)) if callable(value) else getattr(pynvml, name) == value)] == []
    assert {name for name, _ in pynvml.c_nvmlEventData_t._fields_} >= {"device", "eventData", "gpuInstanceId", "computeInstanceId"}
    assert (pynvml.NVML_GPU_RECOVERY_ACTION_NONE, pynvml.NVML_GPU_INSTANCE_ID_ANY) == (NO_RECOVERY, ANY_INSTANCE)


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


def heard_of_a_lost_one(nvml: FakeNvml, xid: int) -> list[GpuFault]:
    """What is heard of an error of the first GPU, which is lost by then and tells nothing any more."""
    watch = GpuWatch(nvml)  # type: ignore[arg-type]
    assert watch.start()
    wait_until(lambda: nvml.registered == [0], "it listens")
    nvml.lost.add(0)
    nvml.events.put((0, xid))
    wait_until(lambda: bool(watch.faults()), "the error is heard")
    ended(watch)
    return watch.faults()


def test_a_gpu_that_is_lost_is_named_although_its_driver_tells_nothing_of_it_any_more() -> None:
    assert [(fault.device, fault.xid, fault.is_device) for fault in heard_of_a_lost_one(FakeNvml(), 79)] == [("cuda-02345678", 79, True)]


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


@pytest.mark.parametrize(
    ("instance", "hit"),
    [
        ((ANY_INSTANCE, ANY_INSTANCE), ["cuda-01abcdef", "cuda-03abcdef", "cuda-04abcdef"]),
        ((2, ANY_INSTANCE), ["cuda-03abcdef", "cuda-04abcdef"]),
        ((2, 1), ["cuda-04abcdef"]),
    ],
)
def test_an_error_of_a_divided_gpu_is_told_of_the_gpu_and_of_the_instances_that_it_is_about(instance: tuple[int, int], hit: list[str]) -> None:
    nvml = FakeNvml()
    nvml.instances[0] = [(1, 0), None, (2, 0), (2, 1)]
    assert [fault.device for fault in heard(nvml, (0, 79, *instance))] == ["cuda-02345678", *hit]


def test_instances_are_those_of_the_moment_of_the_error_or_where_the_gpu_is_lost_those_of_the_beginning() -> None:
    nvml = FakeNvml()
    nvml.instances[0] = [(1, 0)]
    watch = GpuWatch(nvml)  # type: ignore[arg-type]
    assert watch.start()
    wait_until(lambda: nvml.registered == [0] and nvml.num_waits > 0, "it listens")
    nvml.instances[0] = [None, (3, 0)]
    nvml.events.put((0, 13))
    wait_until(lambda: len(watch.faults()) == 2, "the error is heard")
    nvml.lost.add(0)
    nvml.events.put((0, 79))
    wait_until(lambda: len(watch.faults()) == 4, "the loss is heard")
    ended(watch)
    assert [fault.device for fault in watch.faults()] == ["cuda-02345678", "cuda-02abcdef", "cuda-02345678", "cuda-01abcdef"]


def test_actors_name_an_instance_as_the_driver_does() -> None:
    assert device_name("MIG-01abcdef-1234") == device_name("01abcdef-1234") == "cuda-01abcdef"
    assert device_name("MIG-GPU-02345678-abcd/1/0") == "cuda-02345678", "as drivers before 470 name it"


@pytest.mark.parametrize(("action", "is_device"), [(NO_RECOVERY, False), (GPU_RESET, True), (DRAIN_P2P, True), (None, True)])
def test_a_changed_recovery_is_held_against_a_device_unless_none_is_due(action: int | None, is_device: bool) -> None:
    nvml = FakeNvml()
    if action is not None:
        nvml.recovery[0] = action
    assert [(fault.xid, fault.is_device) for fault in heard(nvml, (0, 154))] == [(154, is_device)]


def test_a_changed_recovery_of_a_gpu_that_is_lost_is_held_against_it() -> None:
    nvml = FakeNvml()
    nvml.recovery[0] = NO_RECOVERY
    assert [fault.is_device for fault in heard_of_a_lost_one(nvml, 154)] == [True]


@pytest.mark.parametrize("nvml", [None, FakeNvml(works=False)])
def test_without_a_driver_there_is_nothing_to_hear(nvml: Any) -> None:
    watch = GpuWatch(nvml)
    assert not watch.start()
    assert watch.faults() == []


def test_catalogue_blames_devices_for_memory_and_bus_and_neither_for_programs_nor_for_what_they_repaired() -> None:
    assert all(is_device_fault(xid) for xid in (48, 64, 74, 79, 95, 119))
    assert not any(is_device_fault(xid) for xid in (8, 13, 31, 43, 45, 63, 92, 94, 99999))
    assert not DEVICE_XIDS & (PROGRAM_XIDS | NOTED_XIDS)
