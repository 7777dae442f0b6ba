"""Quantised checkpoints at small size: GPT-OSS in MXFP4 and DeepSeek-V3 in FP8 blocks, with random bits in the form that the real ones have."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kit.models import save_tiny

FP8_HIDDEN = 160
FP8_WIDTH = 136
FP8_EXPERTS = 4


def save_gpt_oss_mxfp4(folder: Path, seed: int = 0) -> Path:
    """A whole tiny GPT-OSS whose expert matrices are MXFP4 blocks and E8M0 scales."""
    save_tiny("gpt_oss", folder, torch.bfloat16, seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        num_experts, width, out = tensors.pop(key).shape
        shape = (num_experts, out, width // 32)
        tensors[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(121, 126, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _update_config(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]})
    return folder


def save_deepseek_fp8(folder: Path, seed: int = 0) -> Path:
    """The experts and gates of one DeepSeek-V3 layer in E4M3 with 128x128 blocks; neither side is a multiple of 128. Nothing else of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    stem = "model.layers.1.mlp."
    tensors = {
        f"{stem}gate.weight": torch.randn((FP8_EXPERTS, FP8_HIDDEN), generator=generator).bfloat16(),
        f"{stem}gate.e_score_correction_bias": torch.randn(FP8_EXPERTS, generator=generator),
    }
    for expert in range(FP8_EXPERTS):
        for name, shape in (("gate_proj", (FP8_WIDTH, FP8_HIDDEN)), ("up_proj", (FP8_WIDTH, FP8_HIDDEN)), ("down_proj", (FP8_HIDDEN, FP8_WIDTH))):
            key = f"{stem}experts.{expert}.{name}.weight"
            tensors[key] = (torch.randn(shape, generator=generator) * 100).to(torch.float8_e4m3fn)
            tensors[f"{key}_scale_inv"] = torch.rand((2, 2), generator=generator) / 1000
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "deepseek_v3",
        "hidden_size": FP8_HIDDEN,
        "moe_intermediate_size": FP8_WIDTH,
        "n_routed_experts": FP8_EXPERTS,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    _update_config(folder, {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]})
    return folder


def _update_config(folder: Path, quantization: dict[str, object]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))
