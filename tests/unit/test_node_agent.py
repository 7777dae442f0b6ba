"""The node agent: never imports torch, kills exactly the process that is meant, imports beside everything else it does, reads GPUs where there are any."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors import node_agent as module
from actors.expert_store import ExpertStore
from actors.node_agent import NodeAgent, kill_process
from cluster.core.descriptors import Manifest
from cluster.core.errors import CheckpointError
from cluster.core.spec import ShadowSpec

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 20.0


def test_the_agent_and_the_actor_front_are_imported_without_torch_ray_or_nvml() -> None:
    program = "import sys, actors.node_agent, actors.expert_actor; print([name for name in ('torch', 'ray', 'pynvml', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


async def test_kill_ends_the_process_of_this_pid_and_start_time(sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    start_s = psutil.Process(sleeper.pid).create_time()
    assert await NodeAgent(tmp_path).kill(sleeper.pid, start_s)
    assert sleeper.wait(TIMEOUT_S) == -9
    assert not await NodeAgent(tmp_path).kill(sleeper.pid, start_s)


async def test_kill_leaves_another_process_with_the_same_pid_alone(sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    start_s = psutil.Process(sleeper.pid).create_time()
    assert not await NodeAgent(tmp_path).kill(sleeper.pid, start_s - 1.0)
    assert not await NodeAgent(tmp_path).kill(sleeper.pid, start_s + 1.0)
    assert sleeper.poll() is None


def test_kill_never_ends_the_agent_itself_nor_the_first_process_nor_a_zombie() -> None:
    assert not kill_process(os.getpid(), psutil.Process().create_time())
    assert not kill_process(1, psutil.Process(1).create_time())
    assert not kill_process(-1, 0.0)
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    process = psutil.Process(zombie.pid)
    start_s = process.create_time()
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    assert process.status() == psutil.STATUS_ZOMBIE
    assert not kill_process(zombie.pid, start_s)
    zombie.wait(TIMEOUT_S)


MANIFEST = Manifest.model_validate(
    {
        "model": {
            "name": "tiny",
            "family": "moelastic",
            "dtype": "bf16",
            "layers": [
                {
                    "layer": 0,
                    "num_experts": 2,
                    "expert": {"hidden_size": 4, "intermediate_size": 2},
                    "gate": {"num_experts": 2, "top_k": 1},
                }
            ],
        },
        "experts": {"0/0": "00" * 32, "0/1": "11" * 32},
        "gates": {"0": "22" * 32},
    }
)


class SlowStore:
    """Stands for ExpertStore: every import reports, then waits for `gate`."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.threads: list[str] = []
        self.asked: dict[str, Any] = {}
        self.error: Exception | None = None

    def work(self, progress: Callable[[int, int], None], **asked: Any) -> None:
        self.threads.append(threading.current_thread().name)
        self.asked = asked
        progress(1, 3)
        self.entered.set()
        assert self.gate.wait(TIMEOUT_S)
        if self.error:
            raise self.error

    def import_model(self, source: Path, *, progress: Callable[[int, int], None], **asked: Any) -> Manifest:
        self.work(progress, source=source, **asked)
        return MANIFEST

    def import_experts(self, source: Path, *, progress: Callable[[int, int], None], **asked: Any) -> None:
        self.work(progress, source=source, **asked)

    def put_manifest(self, manifest: Manifest) -> str:
        return manifest.digest


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowStore]:
    made = SlowStore()
    monkeypatch.setattr(module, "ExpertStore", lambda *_args, **_kwargs: made)
    yield made
    made.gate.set()


async def test_an_import_runs_beside_the_loop_and_its_progress_is_seen(store: SlowStore, sleeper: subprocess.Popen[bytes]) -> None:
    agent = NodeAgent(Path("unused"))
    importing = asyncio.create_task(agent.import_model(name="tiny", source="/models/tiny", dtype="bf16"))
    assert await asyncio.to_thread(store.entered.wait, TIMEOUT_S)
    assert await agent.progress() == {"tiny": (1, 3)}
    assert await agent.kill(sleeper.pid, psutil.Process(sleeper.pid).create_time())
    assert not importing.done()
    store.gate.set()
    reply = await asyncio.wait_for(importing, TIMEOUT_S)
    assert reply.ok
    assert Manifest.model_validate_json(reply.value) == MANIFEST
    assert await agent.progress() == {}
    assert threading.current_thread().name not in store.threads
    assert store.asked == {"source": Path("/models/tiny"), "name": "tiny", "dtype": "bf16", "expected": None, "shadow": None}


async def test_experts_are_imported_by_the_manifest_they_must_equal(store: SlowStore) -> None:
    store.gate.set()
    reply = await NodeAgent(Path("unused")).import_experts(manifest=MANIFEST.model_dump_json(), source="/models/tiny", experts=[[0, 1]])  # type: ignore[list-item]
    assert reply.ok
    assert store.asked == {"source": Path("/models/tiny"), "manifest": MANIFEST, "experts": [(0, 1)], "shadows": []}


async def test_shadows_are_asked_for_as_data(store: SlowStore) -> None:
    store.gate.set()
    agent, spec = NodeAgent(Path("unused")), ShadowSpec(memory_fraction=0.2, codecs=("int2", "int8"))
    assert (await agent.import_model(name="tiny", source="/models/tiny", dtype="checkpoint", shadow=spec.model_dump_json())).ok
    assert store.asked["shadow"] == spec
    assert (await agent.import_experts(manifest=MANIFEST.model_dump_json(), source="/models/tiny", experts=[], shadows=[[1, 0]])).ok  # type: ignore[list-item]
    assert (store.asked["experts"], store.asked["shadows"]) == ([], [(1, 0)])
    unreadable = await agent.import_model(name="tiny", source="/models/tiny", dtype="bf16", shadow='{"memory": 1}')
    assert (unreadable.ok, unreadable.error) == (False, "INVALID_REQUEST")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CheckpointError("expert 0/1: no such key"), "model tiny from /models/x: expert 0/1: no such key"),
        (FileNotFoundError(2, "No such file", "/models/x"), "model tiny from /models/x: No such file"),
    ],
)
async def test_a_checkpoint_that_must_not_be_served_is_refused_as_data(store: SlowStore, error: Exception, said: str) -> None:
    store.gate.set()
    store.error = error
    agent = NodeAgent(Path("unused"))
    reply = await agent.import_model(name="tiny", source="/models/x", dtype="checkpoint")
    assert (reply.ok, reply.error, reply.message) == (False, "CHECKPOINT_ERROR", said)
    assert await agent.progress() == {}


async def test_a_command_that_cannot_be_read_is_refused_as_data(store: SlowStore) -> None:
    store.gate.set()
    reply = await NodeAgent(Path("unused")).import_model(name="tiny", source="/models/x", dtype="int4")
    assert (reply.ok, reply.error) == (False, "INVALID_REQUEST")
    reply = await NodeAgent(Path("unused")).import_experts(manifest="{}", source="/models/x", experts=[])
    assert (reply.ok, reply.error) == (False, "INVALID_REQUEST")


async def test_a_real_model_is_imported_whole_on_one_node_and_in_part_on_another(tmp_path: Path) -> None:
    from kit.models import save_custom

    source = str(save_custom(tmp_path / "model"))
    imported = await NodeAgent(tmp_path / "node-1").import_model(name="tiny", source=source, dtype="bf16")
    assert imported.ok, imported.message
    part = await NodeAgent(tmp_path / "node-2").import_experts(manifest=imported.value, source=source, experts=[(0, 1), (2, 1)])
    assert part.ok, part.message
    manifest = Manifest.model_validate_json(imported.value)
    store = ExpertStore(tmp_path / "node-2")
    held = {place for place, digest in manifest.experts.items() if store.has(digest)}
    assert held == {"0/1", "2/1"}
    assert store.manifest(manifest.digest) == manifest
    wrong = await NodeAgent(tmp_path / "node-3").import_model(name="tiny", source=str(tmp_path / "nothing"), dtype="bf16")
    assert (wrong.ok, wrong.error) == (False, "CHECKPOINT_ERROR")
    assert f"model tiny from {tmp_path / 'nothing'}: " in wrong.message


class NvmlBroken(Exception):
    pass


class FakeNvml:
    """A driver with one GPU, and one that fell off its bus; without `works` it is not loaded."""

    NVMLError = NvmlBroken

    def __init__(self, *, works: bool) -> None:
        self.works = works
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802  (NVML's name)
        if not self.works:
            raise self.NVMLError
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index == 1:
            raise self.NVMLError("GPU is lost")  # noqa: EM101, TRY003  (as NVML words it)
        return index

    def nvmlDeviceGetMemoryInfo(self, _handle: int) -> Any:  # noqa: N802
        return type("Memory", (), {"total": 100})

    def nvmlDeviceGetUUID(self, _handle: int) -> bytes:  # noqa: N802
        return b"GPU-1"

    def nvmlDeviceGetName(self, _handle: int) -> str:  # noqa: N802
        return "H100"


async def test_gpus_are_read_where_there_is_a_driver_and_there_are_none_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeNvml(works=True)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    readings = json.loads(await NodeAgent(tmp_path).gpus())
    assert readings == [
        {"index": 0, "device": "cuda-1", "uuid": "GPU-1", "name": "H100", "total_bytes": 100, "problem": ""},
        {"index": 1, "device": "", "uuid": "", "name": "", "total_bytes": 0, "problem": "GPU is lost"},
    ]
    assert driver.open == 0
    troubled = FakeNvml(works=True)
    monkeypatch.setattr(troubled, "nvmlDeviceGetCount", FakeNvml(works=False).nvmlInit)
    for driver in (troubled, FakeNvml(works=False)):
        monkeypatch.setitem(sys.modules, "pynvml", driver)
        assert json.loads(await NodeAgent(tmp_path).gpus()) == []
        assert driver.open == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert json.loads(await NodeAgent(tmp_path).gpus()) == []


async def test_listening_to_the_gpus_begins_once_and_off_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    class Driver(FakeNvml):
        def nvmlInit(self) -> None:  # noqa: N802
            threads.append(threading.current_thread())
            super().nvmlInit()

    monkeypatch.setitem(sys.modules, "pynvml", Driver(works=False))
    agent = NodeAgent(tmp_path)
    assert await asyncio.gather(agent.gpu_faults(), agent.gpu_faults()) == ["[]", "[]"]
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()
