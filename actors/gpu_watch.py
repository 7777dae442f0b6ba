"""Listens for critical errors (Xids) of this node's GPUs, where NVML is there: a thread that waits for the driver's events, and a short list of them."""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections import deque
from types import ModuleType
from typing import Any

from cluster.core.status import GpuFault
from cluster.core.xids import is_device_fault

LOG = logging.getLogger(__name__)
MAX_FAULTS = 64
WAIT_MS = 1000
RETRY_S = 1.0
"""After the driver refused to tell, as it may when a GPU is lost: the others are still listened to."""
UUID_CHARACTERS = 8


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
            names = self._register(events)
            while names and not self._stopping.is_set():
                self._wait(events, names)
        finally:
            self._nvml.nvmlEventSetFree(events)

    def _register(self, events: object) -> dict[int, str]:
        """Ask for the critical errors of every GPU that can tell them. Returns device names by handle: a GPU that is lost does not tell its UUID any more."""
        nvml, names = self._nvml, {}
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                uuid = _text(nvml.nvmlDeviceGetUUID(handle))
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
            except nvml.NVMLError:
                LOG.info("gpu watch: GPU %d does not tell its errors", index)
                continue
            names[_address(handle)] = device_name(uuid)
        return names

    def _wait(self, events: object, names: dict[int, str]) -> None:
        nvml = self._nvml
        try:
            event = nvml.nvmlEventSetWait_v2(events, WAIT_MS)
        except nvml.NVMLError as error:
            if getattr(error, "value", None) != nvml.NVML_ERROR_TIMEOUT:
                raise
            return
        xid = int(event.eventData)
        device = names.get(_address(event.device)) or device_name(_text(nvml.nvmlDeviceGetUUID(event.device)))
        with self._lock:
            self._faults.append(GpuFault(time.time(), device, xid, is_device_fault(xid)))
        LOG.warning("gpu watch: Xid %d on %s", xid, device)


def device_name(uuid: str) -> str:
    """How an actor names its GPU: `cuda-` and the first characters of the UUID, whatever of the node's GPUs the process can see."""
    return f"cuda-{uuid.removeprefix('GPU-')[:UUID_CHARACTERS]}"


def _address(handle: Any) -> int:  # noqa: ANN401  (a pointer to what only the driver knows)
    """Handles of one device are equal by it, and not as objects."""
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
