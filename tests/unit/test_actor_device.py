"""The device of an actor: what its errors mean, that it tests itself, and that rows reach it without a copy where they can."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

from actors import device as device_module
from actors.core.frames import Group, Piece
from actors.device import STICKY_EXIT_CODE, ErrorKind, SelfTestFailed, choose_device, device_label, error_kind, measure_memory, self_test
from actors.staging import CpuStaging, open_staging
from cluster.core.descriptors import DType
from cluster.core.errors import ConfigError

torch.set_num_threads(1)
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


class CodedAcceleratorError(torch.AcceleratorError):
    def __init__(self, error_code: int) -> None:
        super().__init__("CUDA error")
        self.error_code = error_code


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError(), ErrorKind.OUT_OF_MEMORY),
        (MemoryError(), ErrorKind.OUT_OF_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ErrorKind.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ErrorKind.OUT_OF_MEMORY),
        (CodedAcceleratorError(2), ErrorKind.OUT_OF_MEMORY),
        (CodedAcceleratorError(710), ErrorKind.STICKY),
        (torch.AcceleratorError(), ErrorKind.STICKY),
        (SelfTestFailed(), ErrorKind.STICKY),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ErrorKind.FAULT),
        (ValueError(), ErrorKind.FAULT),
    ],
)
def test_errors_are_told_apart(error: BaseException, kind: ErrorKind) -> None:
    assert error_kind(error) is kind


def test_a_tensor_that_is_too_large_for_the_host_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert error_kind(caught.value) is ErrorKind.OUT_OF_MEMORY


def test_the_self_test_passes_here_and_fails_on_a_device_that_multiplies_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    self_test(CPU)
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda left, right: torch.mm(left, right) + (left.dtype == torch.float32))
    with pytest.raises(SelfTestFailed, match="a matrix product came back wrong"):
        self_test(CPU)


def test_cuda_is_refused_by_name_where_there_is_none_and_auto_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == CPU
    with pytest.raises(ConfigError, match=r"actors\.device is 'cuda'"):
        choose_device("cuda")
    assert device_label(CPU) == "cpu"
    assert device_label(torch.device("cuda", 1)) == "cuda:1"


def test_host_memory_is_never_more_than_the_cgroup_allows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("4096\n")
    monkeypatch.setattr(device_module, "_CGROUP_LIMITS", (str(limit),))
    memory = measure_memory(CPU)
    assert (memory.free_bytes, memory.total_bytes, memory.is_device) == (4096, 4096, False)
    limit.write_text("max\n")
    assert measure_memory(CPU).total_bytes > 4096


def group(*ranges: tuple[int, int], dtype: DType = DType.FP32, dim: int = 2) -> Group:
    row_bytes = dim * dtype.itemsize
    return Group(dtype, dim, tuple(Piece(number, (item,), (item[1] - item[0]) // row_bytes) for number, item in enumerate(ranges)))


def test_rows_that_lie_together_are_computed_where_they_were_received() -> None:
    numbers = torch.arange(10, dtype=torch.float32)
    body = numbers.view(torch.uint8).numpy().data
    x_ND = CpuStaging().load(group((8, 24), (24, 40)), body)
    assert x_ND.data_ptr() == numbers.data_ptr() + 8
    assert torch.equal(x_ND, numbers[2:].view(4, 2))


@pytest.mark.parametrize("ranges", [((0, 8), (16, 24)), ((2, 10),)])
def test_rows_that_do_not_or_are_not_aligned_are_packed_once(ranges: tuple[tuple[int, int], ...]) -> None:
    body = memoryview(bytearray(range(40)))
    x_ND = CpuStaging().load(group(*ranges), body)
    assert x_ND.reshape(-1).view(torch.uint8).tolist() == [value for start, stop in ranges for value in range(start, stop)]


def test_a_read_only_body_is_packed_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x_ND = CpuStaging().load(group((0, 16)), memoryview(bytes(16)))
    assert x_ND.shape == (2, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_unloaded_rows_are_the_tensors_own_bytes(dtype: torch.dtype) -> None:
    y_ND = torch.randn(3, 5).to(dtype)
    staging = open_staging(CPU)
    with staging.scope(), torch.inference_mode():
        rows = staging.unload(y_ND)
    assert (rows.ndim, rows.itemsize, rows.nbytes) == (1, 1, 3 * 5 * dtype.itemsize)
    assert torch.equal(torch.frombuffer(bytearray(rows), dtype=dtype).view(3, 5), y_ND)


STICKY_PROGRAM = """
    import sys
    import torch
    from kit.experts import Ask, RandomBlobs, Replies, expert_copy, frame_of, random_rows
    from actors.expert_layouts import grouped_forward
    from actors.expert_runtime import ExpertRuntime
    from cluster.core.actor_config import ExpertActorConfig

    where = sys.argv[1]

    def forward(x_ND, weights, rows):
        import threading
        if threading.current_thread().name == where:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered, value 1.25")
        return grouped_forward(x_ND, weights, rows)

    class Answered(Replies):
        def __call__(self, result, buffers):
            print("answered", flush=True)

    config = ExpertActorConfig(deployment="d", actor_id="e", generation=1, num_slots=1, memory_bytes=1 << 20, store_dir="unused")
    blobs = RandomBlobs()
    runtime = ExpertRuntime(config, blobs, torch.device("cpu"), forward=forward)
    if where == "self-test":
        import actors.expert_runtime as module
        from actors.device import SelfTestFailed
        def fail(device):
            raise SelfTestFailed
        module.self_test = fail
    runtime.start(20)
    copy = expert_copy(0)
    runtime.assume(blobs.sized(copy), 1)
    while runtime.slots()[0].state == "loading":
        pass
    runtime.submit(*frame_of(Ask(copy, random_rows(0, 2))), Answered())
    runtime.stop(20)
    print("still here")
"""


@pytest.mark.parametrize("where", ["compute", "copy-loader", "self-test"])
def test_a_broken_device_ends_the_process_with_its_code_before_anything_is_answered(where: str) -> None:
    program = textwrap.dedent(STICKY_PROGRAM)
    command = [sys.executable, "-c", program, where]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == STICKY_EXIT_CODE == 70, done.stderr
    assert done.stdout == ""
    assert "ends with code 70" in done.stderr
    assert "1.25" not in done.stderr
