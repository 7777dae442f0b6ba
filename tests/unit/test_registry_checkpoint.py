"""Checkpoint folders: every expert equals the model's own parameters, little is read at a time, and what is wrong is refused by name."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cluster.core.descriptors import DType
from cluster.core.errors import CheckpointError, NotFound
from cluster.registry import tensor_files
from cluster.registry.checkpoint import Checkpoint
from cluster.registry.convert import as_dtype
from cluster.registry.tensor_files import TensorFiles
from kit.models import FAMILIES, NUM_EXPERTS, save_custom, save_tiny, tiny_model

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
VICTIM = "model.layers.1.mlp.experts.3.up_proj.weight"


def as_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def parts_of(model: Any, layer: int) -> tuple[Any, Any]:
    """The experts and gate modules of a decoder layer."""
    modules = dict(model.named_modules())
    experts = next(name for name in modules if name.startswith(f"model.layers.{layer}.") and name.endswith(".experts"))
    stem = experts.removesuffix("experts")
    return modules[experts], modules.get(f"{stem}gate") or modules[f"{stem}router"]


def compute_layout(experts: Any, index: int) -> dict[str, torch.Tensor]:
    """An expert in our layout, made from transformers' parameters in another way than ours."""
    tensors = {name.replace("_proj", ""): parameter[index].detach() for name, parameter in experts.named_parameters()}
    if getattr(experts, "is_transposed", False):
        tensors = {name: tensor.T if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    if not getattr(experts, "is_concatenated", True):
        order = torch.arange(len(tensors["gate_up"])).reshape(-1, 2).T.reshape(-1)
        tensors |= {name: tensor[order] for name, tensor in tensors.items() if name.startswith("gate_up")}
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_and_gates_equal_the_model_s_own_parameters(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(family, dtype, seed=3)
    with Checkpoint.open(save_tiny(family, tmp_path, dtype, seed=3)) as checkpoint:
        for entry in checkpoint.descriptor("m").layers:
            experts, gate = parts_of(model, entry.layer)
            for index in range(entry.num_experts):
                ours, theirs = checkpoint.expert(entry.layer, index), compute_layout(experts, index)
                assert {name: array.shape for name, array in ours.items()} == entry.expert.tensor_shapes()
                assert all(torch.equal(as_torch(ours[name]), theirs[name]) for name in theirs)
            state = {name.replace("e_score_", ""): value for name, value in gate.state_dict().items()}
            ours = checkpoint.gate(entry.layer)
            assert ours.keys() == state.keys()
            assert all(torch.equal(as_torch(ours[name]), state[name]) for name in state)


def sharded(folder: Path) -> Path:
    """The same qwen3_moe checkpoint in several shards."""
    tiny_model("qwen3_moe").save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def test_a_sharded_checkpoint_reads_like_a_single_file(tmp_path: Path) -> None:
    save_tiny("qwen3_moe", tmp_path / "one")
    with Checkpoint.open(tmp_path / "one") as one, Checkpoint.open(sharded(tmp_path / "many")) as many:
        assert one.descriptor("m") == many.descriptor("m")
        for layer in (0, 2):
            for index in range(NUM_EXPERTS):
                ours, theirs = one.expert(layer, index), many.expert(layer, index)
                assert all((ours[name] == theirs[name]).all() for name in ours)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "gpt_oss"])
def test_one_expert_is_read_at_a_time(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_bytes = []
    fill = TensorFiles._fill

    def counting(self: TensorFiles, file: str, begin: int, target: memoryview, key: str) -> None:
        read_bytes.append(len(target))
        fill(self, file, begin, target, key)

    monkeypatch.setattr(TensorFiles, "_fill", counting)
    with Checkpoint.open(save_tiny(family, tmp_path)) as checkpoint:
        assert not read_bytes
        expert = checkpoint.descriptor("m").layers[0].expert
        checkpoint.expert(0, 2)
    assert sum(read_bytes) == expert.num_bytes


def test_a_place_without_an_expert_is_not_found(tmp_path: Path) -> None:
    with Checkpoint.open(save_tiny("qwen3_moe", tmp_path)) as checkpoint:
        for layer, index in ((1, 0), (0, NUM_EXPERTS), (0, -1), (9, 0)):
            with pytest.raises(NotFound, match=f"{layer}/{index}"):
                checkpoint.expert(layer, index)
        with pytest.raises(NotFound, match="layer 1"):
            checkpoint.gate(1)


def refused(folder: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(words)):
        Checkpoint.open(folder)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.fixture
def olmoe(tmp_path: Path) -> Path:
    return save_tiny("olmoe", tmp_path / "olmoe")


def test_a_missing_expert_is_named(olmoe: Path) -> None:
    rewrite(olmoe, lambda tensors: tensors.pop(VICTIM))
    refused(olmoe, f"no tensor {VICTIM}")


def test_a_missing_first_expert_is_named(olmoe: Path) -> None:
    rewrite(olmoe, lambda tensors: tensors.pop("model.layers.0.mlp.experts.0.down_proj.weight"))
    refused(olmoe, "expert 0 of layer 0 is missing")


def test_a_missing_gate_is_named(olmoe: Path) -> None:
    rewrite(olmoe, lambda tensors: tensors.pop("model.layers.2.mlp.gate.weight"))
    refused(olmoe, "no tensor model.layers.2.mlp.gate.weight")


def test_a_custom_expert_without_its_gate_projection_is_named(tmp_path: Path) -> None:
    folder = save_custom(tmp_path)
    rewrite(folder, lambda tensors: tensors.pop("layers.0.experts.0.gate_proj.weight"))
    refused(folder, "no tensor layers.0.experts.0.gate_proj.weight")


def test_a_custom_mlp_gate_whose_layers_do_not_fit_is_named(tmp_path: Path) -> None:
    folder = save_custom(tmp_path, gate={"kind": "mlp_tanh"})
    rewrite(folder, lambda tensors: tensors.update({"layers.2.gate.fc2.weight": torch.zeros(NUM_EXPERTS, 7)}))
    refused(folder, "the gate of layer 2: fc1 gives 24 values")


def test_a_wrong_shape_is_named_with_both_shapes(olmoe: Path) -> None:
    rewrite(olmoe, lambda tensors: tensors.update({VICTIM: tensors[VICTIM].T.contiguous()}))
    refused(olmoe, f"{VICTIM} has shape [32, 16], but config.json asks for [16, 32]")


def test_a_gate_of_another_width_is_named(olmoe: Path) -> None:
    rewrite(olmoe, lambda tensors: tensors.update({"model.layers.1.mlp.gate.weight": torch.zeros(NUM_EXPERTS + 1, 32)}))
    refused(olmoe, "model.layers.1.mlp.gate.weight is F32 [9, 32]")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e5m2])
def test_an_element_type_without_a_reader_is_named(dtype: torch.dtype, olmoe: Path) -> None:
    rewrite(olmoe, lambda tensors: tensors.update({VICTIM: tensors[VICTIM].to(dtype)}))
    refused(olmoe, f"{VICTIM} is stored as")


def test_a_folder_without_weights_or_config_is_refused(tmp_path: Path, olmoe: Path) -> None:
    refused(tmp_path, "cannot read config.json")
    (olmoe / WEIGHTS).unlink()
    refused(olmoe, f"cannot open {WEIGHTS}")


@pytest.mark.parametrize(
    ("text", "words"), [("{", "not valid JSON"), ("[]", "not a JSON object"), ('{"a": 1, "a": 2}', "not valid JSON"), ("[" * 99_999, "JSON")]
)
def test_a_broken_config_is_refused(text: str, words: str, olmoe: Path) -> None:
    (olmoe / "config.json").write_text(text)
    refused(olmoe, words)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    refused(folder, f"cannot open {shard.name}")


def test_a_shard_that_lost_a_tensor_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    lost = min(tensors)
    del tensors[lost]
    save_file(tensors, shard)
    refused(folder, f"names {lost} in {shard.name}")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", 3])
def test_an_index_that_points_out_of_the_folder_is_refused(name: Any, tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][VICTIM] = name
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "not a safetensors file of this folder")


def with_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header of the weights, leaving the data as it is."""
    raw = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def _overlap(header: dict[str, Any]) -> None:
    header[VICTIM]["data_offsets"] = list(header["model.layers.0.mlp.gate.weight"]["data_offsets"])
    header[VICTIM]["shape"] = header["model.layers.0.mlp.gate.weight"]["shape"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_overlap, "neither overlap nor leave holes"),
        (lambda header: header.pop(VICTIM), "neither overlap nor leave holes"),
        (lambda header: header[VICTIM].update(shape=[1 << 40, 1 << 40]), "not what its shape and type need"),
        (lambda header: header[VICTIM].update(data_offsets=[0, 1 << 60]), "not what its shape and type need"),
        (lambda header: header[VICTIM].update(data_offsets=[-8, 2040]), "no valid data_offsets"),
        (lambda header: header[VICTIM].update(data_offsets=[9, 8]), "no valid data_offsets"),
        (lambda header: header[VICTIM].update(data_offsets="0"), "no valid data_offsets"),
        (lambda header: header[VICTIM].update(shape=[-1, 512]), "no valid shape"),
        (lambda header: header[VICTIM].update(shape=[16.0, 32]), "no valid shape"),
        (lambda header: header[VICTIM].update(dtype="F33"), "no valid dtype"),
        (lambda header: header[VICTIM].update(dtype=["F32"]), "no valid dtype"),
        (lambda header: header.update({VICTIM: 7}), "no valid data_offsets"),
    ],
)
def test_a_header_that_lies_is_refused_by_name(change: Callable[[dict[str, Any]], object], words: str, olmoe: Path) -> None:
    with_header(olmoe, change)
    refused(olmoe, words)


@pytest.mark.parametrize("keep", [0, 4, 8, 1000, -1, -4096])
def test_a_truncated_file_is_refused(keep: int, olmoe: Path) -> None:
    raw = (olmoe / WEIGHTS).read_bytes()
    (olmoe / WEIGHTS).write_bytes(raw[:keep])
    with pytest.raises(CheckpointError, match=WEIGHTS):
        Checkpoint.open(olmoe)


def test_a_longer_file_is_refused(olmoe: Path) -> None:
    with (olmoe / WEIGHTS).open("ab") as file:
        file.write(bytes(64))
    refused(olmoe, "the file is truncated or was damaged")


@pytest.mark.parametrize("length", [(1 << 63) - 1, 1 << 40, 1 << 64 >> 1])
def test_a_header_length_beyond_the_file_allocates_nothing(length: int, olmoe: Path) -> None:
    raw = (olmoe / WEIGHTS).read_bytes()
    (olmoe / WEIGHTS).write_bytes(struct.pack("<Q", length) + raw[8:])
    refused(olmoe, "not a whole safetensors file")


def test_a_header_over_the_limit_is_refused_with_both_numbers(olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "MAX_HEADER_BYTES", 2000)
    (olmoe / "config.json").write_text(
        json.dumps({key: value for key, value in json.loads((olmoe / "config.json").read_text()).items() if key != "rope_parameters"})
    )
    refused(olmoe, "at most 2000 are read")


def test_a_source_truncated_while_it_is_read_is_an_error_by_name(olmoe: Path) -> None:
    with Checkpoint.open(olmoe) as checkpoint:
        with (olmoe / WEIGHTS).open("r+b") as file:
            file.truncate(200)
        with pytest.raises(CheckpointError, match="truncated while it was read"):
            checkpoint.expert(2, 7)


def test_a_checkpoint_replaced_by_rename_is_read_as_it_was_opened(olmoe: Path, tmp_path: Path) -> None:
    other = save_tiny("olmoe", tmp_path / "other", seed=9)
    with Checkpoint.open(olmoe) as checkpoint:
        before = checkpoint.expert(1, 1)
        (other / WEIGHTS).replace(olmoe / WEIGHTS)
        after = checkpoint.expert(1, 1)
    assert all((before[name] == after[name]).all() for name in before)


@given(st.binary(max_size=300))
def test_any_bytes_for_a_file_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError):
        TensorFiles(folder)


_JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=6)
_RECORD = st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), _JSON | st.sampled_from(["F32", "U8", "F4"]), max_size=3)


@given(st.dictionaries(st.text(max_size=4), _RECORD | _JSON, min_size=1, max_size=4))
def test_any_header_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("header")
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    try:
        with TensorFiles(folder) as files:
            entries = files.entries
    except CheckpointError:
        return
    assert sum(entry.num_bytes for entry in entries.values()) == 8


def test_conversion_rounds_to_nearest_even() -> None:
    ulp = 2.0**-7
    ties = np.array([1 + ulp / 2, 1 + 3 * ulp / 2, 1 + ulp / 2 + 2**-20, -1 - ulp / 2], np.float32)
    assert as_dtype(ties, DType.BF16, "x").astype(np.float32).tolist() == [1.0, 1 + 2 * ulp, 1 + ulp, -1.0]
    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    assert (as_dtype(values, DType.BF16, "x").view(np.int16) == torch.from_numpy(values).bfloat16().view(torch.int16).numpy()).all()
    narrow = as_dtype(values, DType.BF16, "x")
    assert (as_dtype(narrow, DType.FP16, "x") == as_torch(narrow).half().numpy()).all()
    assert as_dtype(narrow, DType.FP32, "x").dtype == np.float32


def test_values_beyond_fp16_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="down of expert 1/2 holds values beyond fp16"):
        as_dtype(np.array([1.0, 70000.0], np.float32), DType.FP16, "down of expert 1/2")


def test_an_expert_can_be_read_in_another_element_type(olmoe: Path) -> None:
    with Checkpoint.open(olmoe) as checkpoint:
        own, narrow = checkpoint.expert(0, 0), checkpoint.expert(0, 0, DType.BF16)
        assert checkpoint.descriptor("m", DType.BF16).layers[0].expert.dtype is DType.BF16
        assert checkpoint.gate(0, DType.BF16)["weight"].dtype == ml_dtypes.bfloat16
    assert all(torch.equal(as_torch(own[name]).bfloat16(), as_torch(narrow[name])) for name in own)


def test_the_correction_bias_stays_in_fp32(tmp_path: Path) -> None:
    with Checkpoint.open(save_tiny("deepseek_v3", tmp_path, torch.bfloat16)) as checkpoint:
        gate = checkpoint.gate(1)
    assert gate["correction_bias"].dtype == np.float32
    assert gate["weight"].dtype == ml_dtypes.bfloat16
