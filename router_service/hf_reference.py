"""The twin as a transformers experts implementation: the cluster's arithmetic on weights that this process has loaded. For tests, demos and doubt.

Shape legend: T rows, D model width, F expert width, E experts, K choices per row.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn
from transformers.integrations.moe import _default_apply_gate

from actors.expert_layouts import ExpertWeights, expert_forward
from cluster.core.descriptors import DType, ExpertDescriptor
from cluster.core.errors import ConfigError
from router_service.core.reference import experts_output

_DTYPES: Final = {torch.bfloat16: DType.BF16, torch.float16: DType.FP16, torch.float32: DType.FP32}
# By the class of the module's `act_fn`: configs name their activation in too many ways.
_ACTIVATIONS: Final = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}
# Classes whose own `_apply_gate` is the clamped SwiGLU of ExpertDescriptor.
_CLAMPED: Final = frozenset({"GptOssExperts"})


def reference_experts(module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """The experts contract: [T, D], [T, K], [T, K] -> [T, D]; each expert once on its rows, combined in fp32 in column order."""
    num_experts = int(module.num_experts)  # type: ignore[arg-type]
    ids_TK = torch.where((top_k_index >= 0) & (top_k_index < num_experts), top_k_index, -1).to(torch.int32)
    experts = {int(index): _weights(module, int(index)) for index in torch.unique(ids_TK) if index >= 0}
    total_TD = experts_output(
        hidden_states.detach(), ids_TK.numpy(), top_k_weights.detach().to(torch.float32), lambda index, rows_ND: expert_forward(rows_ND, experts[index])
    )
    return total_TD.to(hidden_states.dtype)


def _weights(module: nn.Module, index: int) -> ExpertWeights:
    """One expert of a loaded module in compute layout; views where the module's layout is the same."""
    descriptor = _descriptor(module)
    first = "gate_up" if descriptor.gated else "up"
    sources: dict[str, Any] = {first: getattr(module, f"{first}_proj"), "down": module.down_proj}
    if descriptor.bias:
        sources |= {f"{first}_bias": getattr(module, f"{first}_proj_bias"), "down_bias": module.down_proj_bias}
    tensors = {}
    for name, parameter in sources.items():
        tensor = parameter.detach()[index]
        if module.is_transposed and not name.endswith("_bias"):
            tensor = tensor.T
        if name.startswith("gate_up") and not module.is_concatenated:
            tensor = torch.cat([tensor[0::2], tensor[1::2]])
        tensors[name] = tensor.contiguous()
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return ExpertWeights(descriptor=descriptor, tensors=tensors, num_bytes=num_bytes, private_bytes=num_bytes)


def _descriptor(module: nn.Module) -> ExpertDescriptor:
    is_clamped = type(module).__name__ in _CLAMPED
    if module.has_post_expert_norm or not (is_clamped or module._apply_gate.__func__ is _default_apply_gate):  # type: ignore[union-attr]
        message = f"{type(module).__name__} has a norm or a gate of its own after its projections, which is not served; choose another family"
        raise ConfigError(message)
    activation = "silu" if is_clamped else _activation(module)
    down: torch.Tensor = module.down_proj  # type: ignore[assignment]
    width, inner = (down.shape[2], down.shape[1]) if module.is_transposed else (down.shape[1], down.shape[2])
    return ExpertDescriptor(
        hidden_size=width,
        intermediate_size=inner,
        activation=activation,
        gated=bool(module.has_gate),
        bias=bool(module.has_bias),
        swiglu_limit=float(module.limit) if is_clamped else None,  # type: ignore[arg-type]
        swiglu_alpha=float(module.alpha) if is_clamped else 1.702,  # type: ignore[arg-type]
        dtype=_DTYPES[down.dtype],
    )


def _activation(module: nn.Module) -> str:
    name = type(getattr(module, "act_fn", None)).__name__
    if name not in _ACTIVATIONS:
        message = f"activation {name} is not served; served: {', '.join(sorted(_ACTIVATIONS))}"
        raise ConfigError(message)
    return _ACTIVATIONS[name]
