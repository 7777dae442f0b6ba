"""One small process per node, without torch: fills the node's expert store, ends processes by (pid, start time), reads and watches the GPUs.

Anything that blocks runs in a thread, so that a kill never waits for an import.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Literal

import psutil

from actors.expert_store import ExpertStore
from actors.gpu_watch import GpuWatch, device_name
from cluster.core.descriptors import DType, Manifest
from cluster.core.errors import CheckpointError, InvalidRequest, MoeError
from cluster.core.spec import ShadowSpec
from cluster.core.status import CommandReply, GpuReading

Progress = Callable[[int, int], None]
START_TOLERANCE_S = 0.05


class NodeAgent:
    """What the controller asks of a node. Failures come back as a CommandReply, never as exceptions."""

    def __init__(self, store_dir: Path, max_bytes: int | None = None) -> None:
        self._store = ExpertStore(Path(store_dir), max_bytes=max_bytes)
        self._importing = asyncio.Lock()
        self._progress: dict[str, tuple[int, int]] = {}
        self._watch: GpuWatch | None = None
        self._watching = asyncio.Lock()

    async def import_model(self, *, name: str, source: str, dtype: str, expected: str | None = None, shadow: str | None = None) -> CommandReply:
        """Read a checkpoint into the store; `value` is the manifest as JSON. `expected` is a manifest as JSON that it must equal.

        `shadow` is a ShadowSpec as JSON; without one no shadows are made.
        """

        def work(progress: Progress) -> str:
            manifest = None if expected is None else Manifest.model_validate_json(expected)
            wanted: DType | Literal["checkpoint"] = "checkpoint" if dtype == "checkpoint" else DType(dtype)
            shadows = None if shadow is None else ShadowSpec.model_validate_json(shadow)
            imported = self._store.import_model(Path(source), name=name, dtype=wanted, expected=manifest, shadow=shadows, progress=progress)
            return imported.model_dump_json()

        return await self._import(name, source, work)

    async def import_experts(
        self,
        *,
        manifest: str,
        source: str,
        experts: Sequence[tuple[int, int]],
        shadows: Sequence[tuple[int, int]] = (),
        distrusted: Sequence[str] = (),
    ) -> CommandReply:
        """Bring these experts ((layer, index)), these shadows and all gates of a manifest (JSON) into the store, with the digests that it names.

        Blobs of the `distrusted` digests are read and digested again, also if that was done before.
        """
        try:
            known = Manifest.model_validate_json(manifest)
        except ValueError as error:
            return _unreadable(error)

        def work(progress: Progress) -> str:
            for digest in distrusted:
                self._store.distrust(digest)
            places, shadowed = ([(layer, index) for layer, index in given] for given in (experts, shadows))
            self._store.import_experts(Path(source), manifest=known, experts=places, shadows=shadowed, progress=progress)
            return ""

        return await self._import(known.model.name, source, work)

    async def _import(self, name: str, source: str, work: Callable[[Progress], str]) -> CommandReply:
        def progress(done: int, wanted: int) -> None:
            self._progress[name] = (done, wanted)

        async with self._importing:  # one at a time: each reads and digests as fast as the disk and a core allow
            try:
                return CommandReply(ok=True, value=await asyncio.to_thread(work, progress))
            except MoeError as error:
                return CommandReply(ok=False, error=error.reason, message=f"model {name} from {source}: {error}")
            except OSError as error:
                return CommandReply(ok=False, error=CheckpointError().reason, message=f"model {name} from {source}: {error.strerror or type(error).__name__}")
            except ValueError as error:
                return _unreadable(error)
            finally:
                self._progress.pop(name, None)

    async def progress(self) -> dict[str, tuple[int, int]]:
        """For each import under way, by model: blobs done and blobs wanted."""
        return dict(self._progress)

    async def kill(self, pid: int, process_start_s: float) -> bool:
        """SIGKILL the process of this pid that started then; False when there is none: a pid that was given to another process is left alone."""
        return kill_process(pid, process_start_s)

    async def gpu_faults(self) -> str:
        """What the driver told of this node's GPUs since this agent first was asked, as a JSON list of GpuFault; none where there is no NVML."""
        async with self._watching:
            if self._watch is None:
                self._watch = await asyncio.to_thread(_started_watch)
        return json.dumps([asdict(fault) for fault in self._watch.faults()])

    async def gpus(self) -> str:
        """The node's GPUs as a JSON list of GpuReading; empty where there is no NVML."""
        return json.dumps([asdict(reading) for reading in await asyncio.to_thread(read_gpus)])


def _unreadable(error: ValueError) -> CommandReply:
    return CommandReply(ok=False, error=InvalidRequest("").reason, message=f"the command cannot be read ({type(error).__name__})")


def kill_process(pid: int, process_start_s: float) -> bool:
    """SIGKILL exactly the process that had this pid and started at this time (seconds since the Unix epoch). A zombie counts as gone."""
    if pid <= 1 or pid == os.getpid():
        return False
    try:
        process = psutil.Process(pid)
        is_same = abs(process.create_time() - process_start_s) <= START_TOLERANCE_S
        if not is_same or process.status() == psutil.STATUS_ZOMBIE:
            return False
        process.kill()  # psutil looks once more whether the pid still means this process
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
    return True


def read_gpus() -> list[GpuReading]:
    """Read every GPU once; empty where the driver or its library is missing."""
    pynvml = _pynvml()
    if pynvml is None:
        return []
    with _nvml(pynvml) as is_open:
        return [_read_gpu(pynvml, index) for index in range(_num_gpus(pynvml))] if is_open else []


def _num_gpus(pynvml: ModuleType) -> int:
    try:
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:  # a driver in trouble; what it told before is asked for in the same breath, and must not be lost
        return 0


def _started_watch() -> GpuWatch:
    watch = GpuWatch(_pynvml())
    watch.start()
    return watch


def _pynvml() -> ModuleType | None:
    try:
        import pynvml
    except ImportError:
        return None
    module: ModuleType = pynvml
    return module


@contextlib.contextmanager
def _nvml(pynvml: ModuleType) -> Iterator[bool]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()


def _read_gpu(pynvml: ModuleType, index: int) -> GpuReading:
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        total_bytes = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        uuid, name = _text(pynvml.nvmlDeviceGetUUID(handle)), _text(pynvml.nvmlDeviceGetName(handle))
    except pynvml.NVMLError as error:  # lost, or about to be: its neighbours are read all the same
        return GpuReading(index, problem=str(error) or type(error).__name__)
    return GpuReading(index, device_name(uuid), uuid, name, total_bytes)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
