"""Quantised forms against constants computed by hand, against transformers, and against plain arithmetic in higher precision."""

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from cluster.core.descriptors import DType
from cluster.core.errors import CheckpointError
from cluster.registry.checkpoint import Checkpoint
from cluster.registry.quantised import BF16, expand_fp8, expand_mxfp4, quant_method
from kit.models import save_tiny
from kit.quantised import FP8_EXPERTS, FP8_HIDDEN, FP8_WIDTH, save_deepseek_fp8, save_gpt_oss_mxfp4


def as_torch(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)


def test_mxfp4_nibbles_have_their_values_low_one_first() -> None:
    blocks = np.zeros((1, 2, 16), np.uint8)
    blocks[0, 0] = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE, *[0] * 8]
    blocks[0, 1, 0] = 0x7F
    scales = np.array([[127, 129]], np.uint8)
    row = expand_mxfp4(blocks, scales, "w").astype(np.float32)[0]
    assert row[:16].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert np.signbit(row[8])
    assert row[32:34].tolist() == [-24.0, 24.0]


@pytest.mark.parametrize(("scale", "factor"), [(0, 2.0**-127), (120, 2.0**-7), (127, 1.0), (252, 2.0**125)])
def test_mxfp4_scales_are_powers_of_two_over_their_whole_range(scale: int, factor: float) -> None:
    row = expand_mxfp4(np.full((1, 1, 16), 0x71, np.uint8), np.array([[scale]], np.uint8), "w")
    assert row.dtype == BF16
    assert row.astype(np.float64)[0, :2].tolist() == [0.5 * factor, 6 * factor]


@pytest.mark.parametrize("scale", [253, 255])
def test_mxfp4_scales_that_bf16_cannot_hold_are_refused_by_name(scale: int) -> None:
    with pytest.raises(CheckpointError, match=r"layer\.w_scales"):
        expand_mxfp4(np.zeros((1, 1, 16), np.uint8), np.array([[scale]], np.uint8), "layer.w")


def test_mxfp4_expands_as_transformers_does() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 150, (3, 10, 4), generator=generator, dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales)
    for expert in range(3):
        ours = expand_mxfp4(blocks[expert].numpy(), scales[expert].numpy(), "w")
        assert torch.equal(as_torch(ours), theirs[expert].T)


def test_fp8_blocks_have_their_own_scales_and_edges_are_cut() -> None:
    weight = np.ones((130, 257), ml_dtypes.float8_e4m3fn)
    weight[129, 256] = -448
    expanded = expand_fp8(weight, np.array([[1, 2, 3], [4, 5, 0.5]], np.float32)).astype(np.float32)
    assert expanded.shape == (130, 257)
    assert [expanded[place] for place in ((0, 0), (127, 127), (0, 128), (127, 256), (128, 0), (128, 255))] == [1, 1, 2, 3, 4, 5]
    assert expanded[129, 256] == -224


def test_fp8_products_are_rounded_once_to_nearest_even() -> None:
    weight = np.array([[1.0, 1.125, 240.0]], ml_dtypes.float8_e4m3fn)
    # 1 + 2**-8 lies halfway between two bf16 values: to even is down; 1 + 3 * 2**-8 goes up.
    assert expand_fp8(weight, np.array([[1 + 2**-8]], np.float32)).astype(np.float64)[0, 0] == 1.0
    assert expand_fp8(weight, np.array([[1 + 3 * 2**-8]], np.float32)).astype(np.float64)[0, 0] == 1 + 2**-6


def test_fp8_expands_as_plain_arithmetic_does() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn((300, 200), generator=generator) * 50).to(torch.float8_e4m3fn)
    scale = torch.rand((3, 2), generator=generator) / 300
    spread = scale.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
    ours = as_torch(expand_fp8(weight.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn), scale.numpy()))
    assert torch.equal(ours, (weight.float() * spread).bfloat16())
    exact = weight.double() * spread.double()
    assert ((ours.double() - exact).abs() <= exact.abs() * 2**-8 * (1 + 2**-15)).all()


def test_a_quantised_gpt_oss_reads_as_transformers_loads_it(tmp_path: Path) -> None:
    folder = save_gpt_oss_mxfp4(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16)
    with Checkpoint.open(folder) as checkpoint:
        descriptor = checkpoint.descriptor("m")
        assert descriptor.dtype is DType.BF16
        for entry in descriptor.layers:
            experts = model.model.layers[entry.layer].mlp.experts
            for index in range(entry.num_experts):
                ours = {name: as_torch(array) for name, array in checkpoint.expert(entry.layer, index).items()}
                for name, stored in (("gate_up", experts.gate_up_proj[index].T), ("gate_up_bias", experts.gate_up_proj_bias[index])):
                    assert torch.equal(ours[name], torch.cat((stored[0::2], stored[1::2])))
                assert torch.equal(ours["down"], experts.down_proj[index].T)
                assert torch.equal(ours["down_bias"], experts.down_proj_bias[index])


def test_a_quantised_deepseek_reads_in_blocks(tmp_path: Path) -> None:
    folder = save_deepseek_fp8(tmp_path)
    stored = load_file(folder / "model.safetensors")

    def expanded(expert: int, name: str) -> torch.Tensor:
        key = f"model.layers.1.mlp.experts.{expert}.{name}.weight"
        weight, scale = stored[key].float(), stored[f"{key}_scale_inv"]
        spread = scale.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]
        return (weight * spread).bfloat16()

    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.descriptor("m").dtype is DType.BF16
        for expert in range(FP8_EXPERTS):
            ours = checkpoint.expert(1, expert)
            assert ours["gate_up"].shape == (2 * FP8_WIDTH, FP8_HIDDEN)
            assert torch.equal(as_torch(ours["gate_up"]), torch.cat((expanded(expert, "gate_proj"), expanded(expert, "up_proj"))))
            assert torch.equal(as_torch(ours["down"]), expanded(expert, "down_proj"))


@pytest.mark.parametrize(
    "section",
    [
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "gptq"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [64, 128]},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"},
        {},
        "int8",
    ],
)
def test_every_other_quantised_form_is_refused_by_name(section: Any, tmp_path: Path) -> None:
    name = section.get("quant_method") if isinstance(section, dict) else None
    with pytest.raises(CheckpointError, match=re.escape(f"quant_method {name!r} is not served")):
        quant_method({"quantization_config": section})
    folder = save_tiny("olmoe", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    with pytest.raises(CheckpointError, match="is not served"):
        Checkpoint.open(folder)


def test_quantised_tensors_need_a_config_that_says_so(tmp_path: Path) -> None:
    for folder, words in ((save_gpt_oss_mxfp4(tmp_path / "a"), "the tensors are MXFP4"), (save_deepseek_fp8(tmp_path / "b"), "is stored as F8_E4M3")):
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=words):
            Checkpoint.open(folder)


@pytest.mark.parametrize("suffix", ["_scale_inv", ""])
def test_a_missing_scale_or_weight_is_named(suffix: str, tmp_path: Path) -> None:
    folder = save_deepseek_fp8(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    key = f"model.layers.1.mlp.experts.2.down_proj.weight{suffix}"
    del tensors[key]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(key)):
        Checkpoint.open(folder)
