"""Tiny random models of every family that is served: built by transformers itself, or, for `moelastic`, written as the custom layout says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

torch.set_num_threads(1)

HIDDEN = 32
EXPERT_WIDTH = 16
NUM_EXPERTS = 8
TOP_K = 2
NUM_LAYERS = 3
VOCAB = 128

CUSTOM = "moelastic"
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_DENSE_WIDTH = 48
_LATENT = {
    "n_shared_experts": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}


def _config(family: str) -> Any:
    import transformers as tf

    makers: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "mixtral": (tf.MixtralConfig, {"num_local_experts": NUM_EXPERTS, "intermediate_size": EXPERT_WIDTH}),
        # Layer 1 alone has experts: (index + 1) % 2 == 0.
        "qwen2_moe": (
            tf.Qwen2MoeConfig,
            {
                "num_experts": NUM_EXPERTS,
                "moe_intermediate_size": EXPERT_WIDTH,
                "intermediate_size": _DENSE_WIDTH,
                "shared_expert_intermediate_size": 24,
                "decoder_sparse_step": 2,
            },
        ),
        "qwen3_moe": (
            tf.Qwen3MoeConfig,
            {
                "num_experts": NUM_EXPERTS,
                "moe_intermediate_size": EXPERT_WIDTH,
                "intermediate_size": _DENSE_WIDTH,
                "head_dim": 8,
                "norm_topk_prob": True,
                "mlp_only_layers": [1],
            },
        ),
        "olmoe": (tf.OlmoeConfig, {"num_experts": NUM_EXPERTS, "intermediate_size": EXPERT_WIDTH}),
        "deepseek_v2": (
            tf.DeepseekV2Config,
            {
                "n_routed_experts": NUM_EXPERTS,
                "moe_intermediate_size": EXPERT_WIDTH,
                "intermediate_size": _DENSE_WIDTH,
                "first_k_dense_replace": 1,
                "topk_method": "group_limited_greedy",
                "n_group": 4,
                "topk_group": 2,
                "routed_scaling_factor": 1.5,
                **_LATENT,
            },
        ),
        "deepseek_v3": (
            tf.DeepseekV3Config,
            {
                "n_routed_experts": NUM_EXPERTS,
                "moe_intermediate_size": EXPERT_WIDTH,
                "intermediate_size": _DENSE_WIDTH,
                "first_k_dense_replace": 1,
                "n_group": 4,
                "topk_group": 2,
                **_LATENT,
            },
        ),
        "gpt_oss": (tf.GptOssConfig, {"num_local_experts": NUM_EXPERTS, "intermediate_size": HIDDEN, "head_dim": 8, "max_position_embeddings": 131_072}),
        "granitemoe": (tf.GraniteMoeConfig, {"num_local_experts": NUM_EXPERTS, "intermediate_size": EXPERT_WIDTH, "residual_multiplier": 0.5}),
        "phimoe": (tf.PhimoeConfig, {"num_local_experts": NUM_EXPERTS, "intermediate_size": EXPERT_WIDTH, "router_jitter_noise": 0.3}),
    }
    make, own = makers[family]
    return make(**{**_BASE, **own})


FAMILIES: tuple[str, ...] = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "phimoe")


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random transformers model in eval mode with eager experts.

    Parameters are spread wide enough that experts differ and choices are rarely tied; norms stay near one.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(family), dtype=torch.float32, experts_implementation="eager")
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name or "inv_freq" in name:
                continue
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 25
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    model = model.to(dtype).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()  # as from_pretrained keeps it
    return model


def save_tiny(family: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write `tiny_model` (or, for family `moelastic`, a custom model) as a checkpoint folder; returns the folder."""
    if family == CUSTOM:
        return save_custom(folder, dtype=dtype, seed=seed)
    from transformers.utils import logging

    logging.disable_progress_bar()
    tiny_model(family, dtype, seed).save_pretrained(folder)
    return folder


def save_custom(folder: Path, *, gate: dict[str, Any] | None = None, gated: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A custom model: MoE layers 0 and 2. `gate` holds the fields of GateDescriptor; without, a linear softmax gate that normalises."""
    folder.mkdir(parents=True, exist_ok=True)
    gate = gate or {"kind": "linear", "score": "softmax", "normalize": True}
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def add(key: str, *shape: int) -> None:
        tensors[key] = (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    for layer in (0, 2):
        for expert in range(NUM_EXPERTS):
            for name in ("gate_proj", "up_proj") if gated else ("up_proj",):
                add(f"layers.{layer}.experts.{expert}.{name}.weight", EXPERT_WIDTH, HIDDEN)
            add(f"layers.{layer}.experts.{expert}.down_proj.weight", HIDDEN, EXPERT_WIDTH)
        _add_gate(add, layer, gate)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": CUSTOM,
        "hidden_size": HIDDEN,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_layers": [0, 2],
        "expert_intermediate_size": EXPERT_WIDTH,
        "hidden_act": "silu" if gated else "gelu",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "gate": gate,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _add_gate(add: Callable[..., None], layer: int, gate: dict[str, Any]) -> None:
    if gate.get("kind") == "mlp_tanh":
        add(f"layers.{layer}.gate.fc1.weight", 24, HIDDEN)
        add(f"layers.{layer}.gate.fc1.bias", 24)
        add(f"layers.{layer}.gate.fc2.weight", NUM_EXPERTS, 24)
        add(f"layers.{layer}.gate.fc2.bias", NUM_EXPERTS)
        return
    add(f"layers.{layer}.gate.weight", NUM_EXPERTS, HIDDEN)
    if gate.get("bias"):
        add(f"layers.{layer}.gate.bias", NUM_EXPERTS)
    if gate.get("correction_bias"):
        add(f"layers.{layer}.gate.correction_bias", NUM_EXPERTS)
    if gate.get("kind") == "position":
        add(f"layers.{layer}.gate.position_embedding", 64, HIDDEN)
