"""Listens for critical errors (Xids) of this node's GPUs, where NVML is there: a thread that waits for the driver's events, and a short list of them."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import time
from collections import deque
from types import ModuleType
from typing import Any, NamedTuple

from cluster.core.status import GpuFault
from cluster.core.xids import RECOVERY_XID, is_device_fault

LOG = logging.getLogger(__name__)
MAX_FAULTS = 64
WAIT_MS = 1000
RETRY_S = 1.0
"""After the driver refused to tell, as it may when a GPU is lost: the others are still listened to."""
UUID_CHARACTERS = 8
ANY_INSTANCE = 0xFFFFFFFF
"""What NVML says instead of an instance's number when an error is not of one alone."""


class _Instance(NamedTuple):
    """A part of a GPU that CUDA shows as a device of its own (MIG), with NVML's numbers for it."""

    device: str
    gpu_instance: int
    compute_instance: int


class _Gpu(NamedTuple):
    device: str
    instances: tuple[_Instance, ...]


class GpuWatch:
    """The node's newest GPU errors, oldest first. Without NVML, or without a GPU, there never are any."""

    def __init__(self, nvml: ModuleType | None) -> None:
        """`nvml` is the `pynvml` module; None where it is not installed."""
        self._nvml: Any = nvml
        self._faults: deque[GpuFault] = deque(maxlen=MAX_FAULTS)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> bool:
        """Begin to listen. False where there is nothing to listen to."""
        if self._nvml is None:
            return False
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError:
            return False
        self._thread = threading.Thread(target=self._main, name="gpu-watch", daemon=True)
        self._thread.start()
        return True

    def stop(self, timeout_s: float) -> None:
        """End the thread: it looks up after every wait."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def faults(self) -> list[GpuFault]:
        """What happened so far; the last MAX_FAULTS."""
        with self._lock:
            return list(self._faults)

    def _main(self) -> None:
        level = logging.WARNING
        try:
            while (error := self._refusal()) is not None:
                LOG.log(level, "gpu watch: the driver refuses its events (%s); meanwhile GPU errors show only as deaths of actors", error)
                level = logging.DEBUG
                if self._stopping.wait(RETRY_S):
                    return
        finally:
            self._nvml.nvmlShutdown()

    def _refusal(self) -> Exception | None:
        """Hear errors until the end, or not at all where no GPU tells any; why the driver ended it before."""
        try:
            self._listen()
        except self._nvml.NVMLError as error:
            refusal: Exception = error
            return refusal
        return None

    def _listen(self) -> None:
        events = self._nvml.nvmlEventSetCreate()
        try:
            gpus = self._register(events)
            while gpus and not self._stopping.is_set():
                self._wait(events, gpus)
        finally:
            self._nvml.nvmlEventSetFree(events)

    def _register(self, events: object) -> dict[int, _Gpu]:
        """Ask for the critical errors of every GPU that can tell them. Returns their names by handle: a GPU that is lost does not tell its UUID any more."""
        nvml, gpus = self._nvml, {}
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                uuid = _text(nvml.nvmlDeviceGetUUID(handle))
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
            except nvml.NVMLError:
                LOG.info("gpu watch: GPU %d does not tell its errors", index)
                continue
            gpus[_address(handle)] = _Gpu(device_name(uuid), self._instances(handle))
        return gpus

    def _instances(self, handle: object) -> tuple[_Instance, ...]:
        """The instances that a GPU is divided into now; none where it is not, or does not tell."""
        nvml, found = self._nvml, []
        with contextlib.suppress(nvml.NVMLError):
            for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
                with contextlib.suppress(nvml.NVMLError):  # there may be gaps
                    part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
                    name = device_name(_text(nvml.nvmlDeviceGetUUID(part)))
                    found.append(_Instance(name, nvml.nvmlDeviceGetGpuInstanceId(part), nvml.nvmlDeviceGetComputeInstanceId(part)))
        return tuple(found)

    def _wait(self, events: object, gpus: dict[int, _Gpu]) -> None:
        nvml = self._nvml
        try:
            event = nvml.nvmlEventSetWait_v2(events, WAIT_MS)
        except nvml.NVMLError as error:
            if getattr(error, "value", None) != nvml.NVML_ERROR_TIMEOUT:
                raise
            return
        xid = int(event.eventData)
        devices = self._devices(event, gpus)
        is_device = is_device_fault(xid, self._recovery(event.device) if xid == RECOVERY_XID else None)
        with self._lock:
            self._faults.extend(GpuFault(time.time(), device, xid, is_device) for device in devices)
        LOG.warning("gpu watch: Xid %d on %s", xid, ", ".join(devices))

    def _devices(self, event: Any, gpus: dict[int, _Gpu]) -> list[str]:  # noqa: ANN401  (of the driver's library)
        """Whom an event is about, as actors may name it: the GPU, and of its instances those that the event does not leave out."""
        gpu = gpus.get(_address(event.device)) or _Gpu(device_name(_text(self._nvml.nvmlDeviceGetUUID(event.device))), ())
        instances = self._instances(event.device) or gpu.instances  # they may have been made anew since, and one that is lost tells nothing
        hit = [
            part.device
            for part in instances
            if event.gpuInstanceId in {part.gpu_instance, ANY_INSTANCE} and event.computeInstanceId in {part.compute_instance, ANY_INSTANCE}
        ]
        return [gpu.device, *hit]

    def _recovery(self, handle: object) -> int | None:
        """What the driver says has to be done about a GPU now: an event has a number only. None where it does not say."""
        nvml = self._nvml
        try:
            (found,) = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
        except nvml.NVMLError:
            return None
        return int(found.value.uiVal) if found.nvmlReturn == nvml.NVML_SUCCESS else None


def device_name(uuid: str) -> str:
    """How an actor names its GPU, or the instance of one: `cuda-` and the first characters of the UUID, whatever of the node's GPUs the process can see."""
    return f"cuda-{uuid.removeprefix('MIG-').removeprefix('GPU-')[:UUID_CHARACTERS]}"


def _address(handle: Any) -> int:  # noqa: ANN401  (a pointer to what only the driver knows)
    """Handles of one device are equal by it, and not as objects."""
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
