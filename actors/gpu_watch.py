"""Listens for critical errors (Xids) of this node's GPUs, where NVML is there: a thread that waits for the driver's events, and a short list of them."""

from __future__ import annotations

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
        nvml = self._nvml
        try:
            events = nvml.nvmlEventSetCreate()
            try:
                names = self._register(events)
                while names and not self._stopping.is_set():
                    self._wait(events, names)
            finally:
                nvml.nvmlEventSetFree(events)
        except nvml.NVMLError as error:
            LOG.warning("gpu watch: the driver refuses its events (%s); GPU errors show only as deaths of actors", error)
        finally:
            nvml.nvmlShutdown()

    def _register(self, events: object) -> dict[str, str]:
        """Ask for the critical errors of every GPU that can tell them. Returns device names by UUID."""
        nvml, names = self._nvml, {}
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            try:
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
            except nvml.NVMLError:
                LOG.info("gpu watch: GPU %d does not tell its errors", index)
                continue
            uuid = _text(nvml.nvmlDeviceGetUUID(handle))
            names[uuid] = device_name(uuid)
        return names

    def _wait(self, events: object, names: dict[str, str]) -> None:
        nvml = self._nvml
        try:
            event = nvml.nvmlEventSetWait_v2(events, WAIT_MS)
        except nvml.NVMLError as error:
            if getattr(error, "value", None) != nvml.NVML_ERROR_TIMEOUT:
                raise
            return
        uuid, xid = _text(nvml.nvmlDeviceGetUUID(event.device)), int(event.eventData)
        with self._lock:
            self._faults.append(GpuFault(time.time(), names.get(uuid, device_name(uuid)), xid, is_device_fault(xid)))
        LOG.warning("gpu watch: Xid %d on %s", xid, uuid)


def device_name(uuid: str) -> str:
    """How an actor names its GPU: `cuda-` and the first characters of the UUID, whatever of the node's GPUs the process can see."""
    return f"cuda-{uuid.removeprefix('GPU-')[:UUID_CHARACTERS]}"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
