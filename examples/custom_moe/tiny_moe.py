"""A Mixture-of-Experts layer in plain PyTorch, and how to save any such layer so that the cluster can serve it.

Shapes: T tokens, D model, F hidden, E experts, K experts per token, P positions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional


class GatedExpert(nn.Module):
    """SwiGLU feed-forward network: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        """Make the three projections, without biases."""
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return [T, D]."""
        output: Tensor = self.down_proj(functional.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))
        return output


class LinearGate(nn.Module):
    """Scores tokens by one linear map: the usual gate."""

    kind = "linear"

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        """Start from small random scores."""
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, hidden_size) / hidden_size**0.5)

    def forward(self, x_TD: Tensor, positions_T: Tensor) -> Tensor:  # noqa: ARG002 (one call for every gate)
        """Return logits [T, E]; positions are not used."""
        return functional.linear(x_TD, self.weight)


class MlpTanhGate(nn.Module):
    """Scores tokens by two linear maps with a tanh between them."""

    kind = "mlp_tanh"

    def __init__(self, hidden_size: int, num_experts: int, inner_size: int) -> None:
        """Make the two maps, with biases."""
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, num_experts)

    def forward(self, x_TD: Tensor, positions_T: Tensor) -> Tensor:  # noqa: ARG002 (one call for every gate)
        """Return logits [T, E]; positions are not used."""
        logits: Tensor = self.fc2(torch.tanh(self.fc1(x_TD)))
        return logits


class PositionGate(nn.Module):
    """Adds a learnt embedding of the token's position to the row before a linear map."""

    kind = "position"

    def __init__(self, hidden_size: int, num_experts: int, num_positions: int) -> None:
        """Start from small random scores and positions."""
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, hidden_size) / hidden_size**0.5)
        self.position_embedding = nn.Parameter(torch.randn(num_positions, hidden_size))

    def forward(self, x_TD: Tensor, positions_T: Tensor) -> Tensor:
        """Return logits [T, E]; positions index the embedding table, 0 to P - 1."""
        return functional.linear(x_TD + self.position_embedding[positions_T], self.weight)


class TinyMoE(nn.Module):
    """A gate and its experts: softmax over all experts, the K best, weights scaled to sum to one."""

    def __init__(self, gate: nn.Module, experts: Sequence[nn.Module], num_experts_per_token: int) -> None:
        """Keep the given parts; any module with the same forward will do."""
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList(experts)
        self.num_experts_per_token = num_experts_per_token

    def forward(self, x_TD: Tensor, positions_T: Tensor | None = None) -> Tensor:
        """Return [T, D]; positions default to 0, 1, 2, ..."""
        positions = torch.arange(len(x_TD)) if positions_T is None else positions_T
        scores = self.gate(x_TD, positions).softmax(dim=-1)
        weights, indices = scores.topk(self.num_experts_per_token, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        output = torch.zeros_like(x_TD)
        for number, expert in enumerate(self.experts):
            token, choice = torch.where(indices == number)
            if len(token):
                output.index_add_(0, token, expert(x_TD[token]) * weights[token, choice].unsqueeze(-1))
        return output


def save_experts(folder: Path, gate: nn.Module, experts: Sequence[nn.Module], *, num_experts_per_token: int, layer: int = 0, hidden_act: str = "silu") -> None:
    """Save one layer as a folder that the cluster can serve; call again with another ``layer`` to add one.

    An expert is any module with ``up_proj`` and ``down_proj`` (nn.Linear without bias) and, if gated, ``gate_proj``; a
    gate is any module with a ``kind`` and the tensors that README.md lists for it. All layers have the same shape.
    """
    path, prefix = folder / "model.safetensors", f"layers.{layer}"
    tensors = load_file(path) if path.exists() else {}
    tensors |= {f"{prefix}.gate.{name}": tensor for name, tensor in gate.state_dict().items()}
    for number, expert in enumerate(experts):
        tensors |= {f"{prefix}.experts.{number}.{name}": tensor for name, tensor in expert.state_dict().items()}
    up = tensors[f"{prefix}.experts.0.up_proj.weight"]
    config = {
        "model_type": "moelastic",
        "hidden_size": up.shape[1],
        "num_experts": len(experts),
        "num_experts_per_tok": num_experts_per_token,
        "moe_layers": sorted({int(name.split(".")[1]) for name in tensors}),
        "expert_intermediate_size": up.shape[0],
        "hidden_act": hidden_act,
        "torch_dtype": str(up.dtype).removeprefix("torch."),
        "gate": {"kind": gate.kind, "score": "softmax", "normalize": True},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
