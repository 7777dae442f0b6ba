"""The arithmetic of experts against transformers' own eager experts and against plain arithmetic in fp64; mapped, copied and grouped weights alike."""

import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.activations import ACT2FN

from actors import expert_layouts
from actors.blob_files import StoredBlob
from actors.core.memory import IDLE_PLACES_BYTES
from actors.expert_layouts import TORCH_DTYPES, ExpertWeights, expert_forward, grouped_forward, load_weights
from actors.expert_slabs import PLACES_PER_SLAB, Slabs
from actors.expert_store import ExpertStore
from cluster.core.descriptors import DType, ExpertDescriptor
from cluster.core.errors import CheckpointError
from cluster.registry.convert import NUMPY_DTYPES
from cluster.registry.families import ACTIVATIONS
from kit.models import FAMILIES, save_custom, save_tiny, tiny_model
from kit.quantised import save_gpt_oss_mxfp4

CPU = torch.device("cpu")
# Spread beyond the clamp of GPT-OSS, so that both branches of it are taken.
SPREAD = 6.0


def experts_of(model: Any, layer: int) -> Any:
    return next(module for name, module in model.named_modules() if name.startswith(f"model.layers.{layer}.") and name.endswith(".experts"))


def eager(experts: Any, x_TD: torch.Tensor, index: int) -> torch.Tensor:
    """One expert of transformers' own eager module, at weight one."""
    ids = torch.full((len(x_TD), 1), index)
    with torch.no_grad():
        return experts(x_TD, ids, torch.ones((len(x_TD), 1), dtype=x_TD.dtype))


def row_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The worst row's error over that row's norm."""
    ours, theirs = ours.double(), theirs.double()
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())


def check_model(model: Any, folder: Path, store: ExpertStore, limit: float) -> None:
    manifest = store.import_model(folder, name="m")
    dtype = TORCH_DTYPES[manifest.model.dtype]
    generator = torch.Generator().manual_seed(11)
    for entry in manifest.model.layers:
        experts = experts_of(model, entry.layer)
        for index in range(entry.num_experts):
            x_TD = (torch.randn((9, entry.expert.hidden_size), generator=generator) * SPREAD).to(dtype)
            weights = load_weights(store.open(manifest.experts[f"{entry.layer}/{index}"]), CPU)
            ours = expert_forward(x_TD, weights)
            assert ours.dtype == dtype
            assert row_error(ours, eager(experts, x_TD, index)) <= limit, (entry.layer, index)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_equal_transformers_eager_in_fp32(family: str, tmp_path: Path) -> None:
    check_model(tiny_model(family, seed=2), save_tiny(family, tmp_path / "m", seed=2), ExpertStore(tmp_path / "store"), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_equal_transformers_eager_in_bf16(family: str, tmp_path: Path) -> None:
    """The same steps in the same element type: only the order of sums inside a matmul may differ."""
    model = tiny_model(family, torch.bfloat16, seed=2)
    check_model(model, save_tiny(family, tmp_path / "m", torch.bfloat16, seed=2), ExpertStore(tmp_path / "store"), 1e-2)


def test_mxfp4_experts_equal_transformers_dequantised(tmp_path: Path) -> None:
    folder = save_gpt_oss_mxfp4(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16, experts_implementation="eager")
    check_model(model, folder, ExpertStore(tmp_path / "store"), 1e-2)


def make_weights(descriptor: ExpertDescriptor, seed: int = 0) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(TORCH_DTYPES[descriptor.dtype])
        for name, shape in descriptor.tensor_shapes().items()
    }
    return ExpertWeights(descriptor, tensors, descriptor.num_bytes, descriptor.num_bytes)


def plain_forward(x_TD: torch.Tensor, weights: ExpertWeights, act: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The documented formula, in fp64, one row and one half at a time."""
    d, width = weights.descriptor, weights.descriptor.intermediate_size
    w = {name: tensor.double() for name, tensor in weights.tensors.items()}
    rows = []
    for x_D in x_TD.double():
        first = "gate_up" if d.gated else "up"
        hidden = w[first] @ x_D + (w[f"{first}_bias"] if d.bias else 0)
        if d.swiglu_limit is not None:
            gate, up = torch.minimum(hidden[:width], torch.tensor(d.swiglu_limit)), hidden[width:].clamp(-d.swiglu_limit, d.swiglu_limit)
            hidden = (up + d.swiglu_up_offset) * gate / (1 + torch.exp(-d.swiglu_alpha * gate))
        else:
            hidden = act(hidden[:width]) * hidden[width:] if d.gated else act(hidden)
        rows.append(w["down"] @ hidden + (w["down_bias"] if d.bias else 0))
    return torch.stack(rows)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_every_form_of_expert_equals_its_formula(activation: Any, bias: bool, gated: bool) -> None:
    descriptor = ExpertDescriptor(hidden_size=24, intermediate_size=20, activation=activation, bias=bias, gated=gated, dtype=DType.FP32)
    weights = make_weights(descriptor)
    x_TD = torch.randn((7, 24), generator=torch.Generator().manual_seed(4)) * 3
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != "gelu_tanh"}
    assert row_error(expert_forward(x_TD, weights), plain_forward(x_TD, weights, ACT2FN[names[activation]])) < 1e-5


@pytest.mark.parametrize(("limit", "alpha", "offset"), [(7.0, 1.702, 1.0), (0.5, 1.0, 0.0)])
def test_the_clamped_form_equals_its_formula(limit: float, alpha: float, offset: float) -> None:
    descriptor = ExpertDescriptor(
        hidden_size=24, intermediate_size=20, bias=True, swiglu_limit=limit, swiglu_alpha=alpha, swiglu_up_offset=offset, dtype=DType.FP32
    )
    weights = make_weights(descriptor)
    x_TD = torch.randn((7, 24), generator=torch.Generator().manual_seed(4)) * SPREAD
    assert row_error(expert_forward(x_TD, weights), plain_forward(x_TD, weights, torch.relu)) < 1e-5


@pytest.mark.parametrize("dtype", list(DType))
def test_each_segment_of_a_group_equals_the_expert_alone_bit_for_bit(dtype: DType) -> None:
    descriptor = ExpertDescriptor(hidden_size=32, intermediate_size=16, dtype=dtype)
    experts = [make_weights(descriptor, seed) for seed in range(5)]
    rows = [3, 0, 17, 1, 64]
    x_ND = torch.randn((sum(rows), 32), generator=torch.Generator().manual_seed(1)).to(TORCH_DTYPES[dtype])
    y_ND = grouped_forward(x_ND, experts, rows)
    assert y_ND.shape == x_ND.shape
    assert y_ND.dtype == x_ND.dtype
    for part, output, expert in zip(x_ND.split(rows), y_ND.split(rows), experts, strict=True):
        assert torch.equal(output, expert_forward(part, expert))
    assert torch.equal(grouped_forward(x_ND, experts[:1], [len(x_ND)]), expert_forward(x_ND, experts[0]))


def test_experts_of_different_widths_share_a_group() -> None:
    experts = [make_weights(ExpertDescriptor(hidden_size=32, intermediate_size=width, dtype=DType.FP32)) for width in (8, 40)]
    x_ND = torch.randn((6, 32))
    y_ND = grouped_forward(x_ND, experts, [2, 4])
    assert torch.equal(y_ND[:2], expert_forward(x_ND[:2], experts[0]))
    assert torch.equal(y_ND[2:], expert_forward(x_ND[2:], experts[1]))


@pytest.mark.parametrize("rows", [[2], [2, 3], [5, 1]])
def test_segments_that_are_not_the_rows_are_refused(rows: list[int]) -> None:
    weights = make_weights(ExpertDescriptor(hidden_size=8, intermediate_size=8, dtype=DType.FP32))
    with pytest.raises(ValueError, match="do not make up 4 rows"):
        grouped_forward(torch.zeros(4, 8), [weights, weights], rows)


def test_rows_with_a_gradient_give_rows_without() -> None:
    """Of `expert_forward`, which anybody may call; `grouped_forward` is a compute thread's, whose inference mode has a test of its own."""
    weights = make_weights(ExpertDescriptor(hidden_size=8, intermediate_size=8, dtype=DType.FP32))
    x_TD = torch.randn((3, 8), requires_grad=True)
    assert not expert_forward(x_TD, weights).requires_grad
    with torch.inference_mode():
        assert not grouped_forward(x_TD, [weights, weights], [1, 2]).requires_grad


@pytest.fixture
def stored(tmp_path: Path) -> tuple[ExpertStore, dict[str, str]]:
    store = ExpertStore(tmp_path / "store")
    return store, store.import_model(save_custom(tmp_path / "m", dtype=torch.bfloat16), name="m").experts


def test_cpu_weights_are_the_mapping_itself(stored: tuple[ExpertStore, dict[str, str]]) -> None:
    store, experts = stored
    blob = store.open(experts["0/1"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = load_weights(blob, CPU)
    assert weights.private_bytes == 0
    assert weights.num_bytes == weights.descriptor.num_bytes
    for name, tensor in weights.tensors.items():
        assert tensor.data_ptr() == blob.tensors[name].ctypes.data
        assert tensor.data_ptr() % 64 == 0
        assert tensor.shape == blob.tensors[name].shape
        assert not blob.tensors[name].flags.writeable


def private_bytes_of(address: int) -> tuple[int, int]:
    """Bytes of the mapping at an address: all, and those that were made private by a write."""
    size = dirty = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(maxsplit=1)[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            inside = begin <= address < end
            size = end - begin if inside else size
        elif inside and head in ("Private_Dirty:", "Anonymous:"):
            dirty += int(line.split()[1]) * 1024
    return size, dirty


def test_computing_makes_no_page_private(stored: tuple[ExpertStore, dict[str, str]]) -> None:
    store, experts = stored
    weights = load_weights(store.open(experts["0/1"]), CPU)
    expert_forward(torch.randn((4, weights.descriptor.hidden_size)).bfloat16(), weights)
    size, dirty = private_bytes_of(weights.tensors["down"].data_ptr())
    assert size >= weights.num_bytes
    assert dirty == 0


def test_a_stray_write_stays_in_its_process(stored: tuple[ExpertStore, dict[str, str]]) -> None:
    store, experts = stored
    weights, other = (load_weights(store.open(experts["0/1"]), CPU) for _ in range(2))
    before = other.tensors["down"].clone()
    weights.tensors["down"][0, 0] += 1
    assert private_bytes_of(weights.tensors["down"].data_ptr())[1] > 0
    assert torch.equal(other.tensors["down"], before)
    assert torch.equal(load_weights(store.open(experts["0/1"]), CPU).tensors["down"], before)


def test_weights_outlive_their_blob(stored: tuple[ExpertStore, dict[str, str]]) -> None:
    store, experts = stored
    blob = store.open(experts["2/3"])
    wanted = blob.tensors["down"].tobytes()
    weights = load_weights(blob, CPU)
    del blob
    gc.collect()
    assert weights.tensors["down"].view(torch.uint8).numpy().tobytes() == wanted


def test_memory_that_cannot_be_shared_is_copied_and_counted() -> None:
    descriptor = ExpertDescriptor(hidden_size=4, intermediate_size=4, dtype=DType.FP32)
    tensors = {name: np.frombuffer(bytes(4 * int(np.prod(shape))), np.float32).reshape(shape) for name, shape in descriptor.tensor_shapes().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = load_weights(StoredBlob("0" * 64, "expert", descriptor, tensors, 0), CPU)
    assert weights.private_bytes == weights.num_bytes == descriptor.num_bytes


def test_a_gate_is_not_an_expert(tmp_path: Path) -> None:
    store = ExpertStore(tmp_path / "store")
    manifest = store.import_model(save_custom(tmp_path / "m"), name="m")
    with pytest.raises(CheckpointError, match="is a gate"):
        load_weights(store.open(manifest.gates["0"]), CPU)


def slab_weights(slabs: Slabs, descriptor: ExpertDescriptor, seed: int) -> ExpertWeights:
    """As `load_weights` places them on CUDA, but here."""
    place = slabs.take(descriptor, TORCH_DTYPES[descriptor.dtype], CPU)
    for name, tensor in make_weights(descriptor, seed).tensors.items():
        place.tensors()[name].copy_(tensor)
    return ExpertWeights(descriptor, place.tensors(), descriptor.num_bytes, descriptor.num_bytes, place)


GROUPED = [
    ExpertDescriptor(hidden_size=64, intermediate_size=32),
    ExpertDescriptor(hidden_size=64, intermediate_size=32, gated=False, activation="gelu"),
    ExpertDescriptor(hidden_size=64, intermediate_size=32, bias=True, swiglu_limit=7.0),
]


@pytest.mark.parametrize("descriptor", GROUPED)
@pytest.mark.parametrize(("chosen", "rows"), [([0, 1, 2], [4, 1, 9]), ([6, 2, 4], [3, 0, 5]), ([9, 1, 8, 0], [2, 3, 4, 5]), ([3, 3], [2, 2])])
def test_the_grouped_matmul_equals_the_loop(descriptor: ExpertDescriptor, chosen: list[int], rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    slabs = Slabs()
    experts = [slab_weights(slabs, descriptor, seed) for seed in range(10)]
    weights = [experts[index] for index in chosen]
    x_ND = torch.randn((sum(rows), 64), generator=torch.Generator().manual_seed(2)).bfloat16()
    loop = grouped_forward(x_ND, weights, rows)
    calls = []
    grouped_mm = expert_layouts.grouped_mm
    monkeypatch.setattr(expert_layouts, "_has_grouped_mm", lambda _device: True)
    monkeypatch.setattr(expert_layouts, "grouped_mm", lambda *args, **kwargs: calls.append(args) or grouped_mm(*args, **kwargs))
    grouped = grouped_forward(x_ND, weights, rows)
    assert bool(calls) is (len(set(chosen)) == len(chosen))
    assert row_error(grouped, loop) < 1e-2


@pytest.mark.parametrize(
    "descriptor", [ExpertDescriptor(hidden_size=64, intermediate_size=32, dtype=DType.FP32), ExpertDescriptor(hidden_size=64, intermediate_size=20)]
)
def test_what_the_grouped_matmul_cannot_do_is_looped(descriptor: ExpertDescriptor, monkeypatch: pytest.MonkeyPatch) -> None:
    slabs = Slabs()
    experts = [slab_weights(slabs, descriptor, seed) for seed in range(2)]
    monkeypatch.setattr(expert_layouts, "_has_grouped_mm", lambda _device: True)
    monkeypatch.setattr(expert_layouts, "grouped_mm", None)
    x_ND = torch.randn((5, 64)).to(TORCH_DTYPES[descriptor.dtype])
    assert torch.equal(grouped_forward(x_ND, experts, [2, 3])[:2], expert_forward(x_ND[:2], experts[0]))


def test_slab_places_are_used_again_and_empty_slabs_let_go() -> None:
    slabs, descriptor = Slabs(), GROUPED[0]
    places = [slabs.take(descriptor, torch.bfloat16, CPU) for _ in range(PLACES_PER_SLAB + 1)]
    assert len({(id(place.slab), place.index) for place in places}) == len(places)
    assert [place.slab is places[0].slab for place in places] == [True] * PLACES_PER_SLAB + [False]
    slabs.giver(places[3])()
    again = slabs.take(descriptor, torch.bfloat16, CPU)
    assert (again.slab, again.index) == (places[3].slab, places[3].index)
    other = slabs.take(GROUPED[1], torch.bfloat16, CPU)
    assert other.slab not in (places[0].slab, places[-1].slab)
    for place in [*places, other]:
        slabs.giver(place)()
    assert not slabs._slabs


def test_places_of_a_slab_that_was_made_in_inference_mode_may_be_written_to_in_any() -> None:
    slabs = Slabs()
    with torch.inference_mode():
        first = slab_weights(slabs, GROUPED[0], 1)
    second = slab_weights(slabs, GROUPED[0], 2)
    assert first.place is not None
    assert second.place is not None
    assert first.place.slab is second.place.slab
    assert torch.equal(second.tensors["down"], make_weights(GROUPED[0], 2).tensors["down"])


def test_a_slab_that_does_not_fit_becomes_one_place_in_the_room_that_its_own_beginning_took(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, made = torch.empty, list[weakref.ref[torch.Tensor]]()

    def small(shape: tuple[int, ...], **kwargs: Any) -> torch.Tensor:
        if shape[0] > 1 and made:
            raise torch.OutOfMemoryError
        if shape[0] == 1 and made:
            assert made.pop()() is None, "the device is still full of what did not fit"
        tensor = empty(shape, **kwargs)
        made.extend([weakref.ref(tensor)] if shape[0] > 1 else [])
        return tensor

    monkeypatch.setattr(torch, "empty", small)
    slabs = Slabs()
    places = [slabs.take(GROUPED[0], torch.bfloat16, CPU) for _ in range(2)]
    assert [place.slab.num_places for place in places] == [1, 1]
    assert made == []


@pytest.mark.parametrize(("hidden_size", "intermediate_size", "num_places"), [(512, 2048, PLACES_PER_SLAB), (2048, 2048, 3), (4096, 14336, 1)])
def test_large_experts_share_smaller_slabs_so_that_little_lies_idle(hidden_size: int, intermediate_size: int, num_places: int) -> None:
    descriptor = ExpertDescriptor(hidden_size=hidden_size, intermediate_size=intermediate_size)
    place = Slabs().take(descriptor, torch.bfloat16, torch.device("meta"))
    assert place.slab.num_places == num_places
    assert (num_places - 1) * descriptor.num_bytes <= IDLE_PLACES_BYTES


def test_weights_that_are_gone_give_their_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA path of `load_weights`, on a CPU that plays the device."""
    slabs = Slabs()
    monkeypatch.setattr(expert_layouts, "_SLABS", slabs)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: torch.Stream("cpu"))
    descriptor = GROUPED[2]
    source = make_weights(descriptor, 5)
    arrays = {name: tensor.view(torch.int16).numpy().view(NUMPY_DTYPES[DType.BF16]) for name, tensor in source.tensors.items()}
    blob = StoredBlob("0" * 64, "expert", descriptor, arrays, 0)
    weights = expert_layouts._copy_weights(blob, descriptor, CPU)
    assert weights.private_bytes == descriptor.num_bytes
    assert all(torch.equal(weights.tensors[name], source.tensors[name]) for name in arrays)
    assert slabs._slabs
    del weights
    gc.collect()
    assert not slabs._slabs


def test_a_place_is_given_back_only_when_no_copy_into_it_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    slabs, idle_at_sync, pins = Slabs(), list[bool](), list[int]()

    class Stream:
        def synchronize(self) -> None:
            (slab,) = slabs._slabs
            idle_at_sync.append(len(slab.free) == slab.num_places)

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pins.append(1)
        if len(pins) > 1:
            raise torch.OutOfMemoryError
        return tensor.clone()

    monkeypatch.setattr(expert_layouts, "_SLABS", slabs)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: Stream())
    descriptor = GROUPED[0]
    arrays = {name: tensor.view(torch.int16).numpy().view(NUMPY_DTYPES[DType.BF16]) for name, tensor in make_weights(descriptor, 5).tensors.items()}
    with pytest.raises(torch.OutOfMemoryError):
        expert_layouts._copy_weights(StoredBlob("0" * 64, "expert", descriptor, arrays, 0), descriptor, CPU)
    assert idle_at_sync == [False]
    gc.collect()
    assert not slabs._slabs
