"""The layer that every row serves: random weights in the custom layout, and the answer it must give, in fp32.

Shape legend: T tokens, D model width, F expert width, E experts, K choices of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from actors.packed_matrix import can_pack, pack
from bench.settings import LAYER, WIDE_MODEL, Sizes
from examples.custom_moe.tiny_moe import GatedExpert, LinearGate, save_experts

BF16 = np.dtype(ml_dtypes.bfloat16)
# The largest element-wise difference that bf16 arithmetic explains, against the largest element of the answer.
TOLERANCE = 0.05
Rows = np.ndarray[Any, np.dtype[Any]]


def save_layer(folder: Path, sizes: Sizes, intermediate_size: int, seed: int = 0, layer: int = LAYER) -> Path:
    """Write the layer as a folder that the cluster can serve, or add it to one."""
    torch.manual_seed(seed)
    gate = LinearGate(sizes.hidden_size, sizes.num_experts).to(torch.bfloat16)
    experts = [GatedExpert(sizes.hidden_size, intermediate_size).to(torch.bfloat16) for _ in range(sizes.num_experts)]
    save_experts(folder, gate, experts, num_experts_per_token=sizes.top_k, layer=layer)
    return folder


def random_rows(sizes: Sizes, num_tokens: int, seed: int, model: str = "") -> Rows:
    """Hidden states [T, D] in bf16, or in fp32 with values of bf16 for the model that is served so."""
    rows = np.random.default_rng(seed).standard_normal((num_tokens, sizes.hidden_size)).astype(BF16)
    return rows.astype(np.float32) if model == WIDE_MODEL else rows


def to_torch(rows: Rows) -> Tensor:
    """bf16 rows as a tensor over the same memory."""
    return torch.from_numpy(rows.view(np.uint16)).view(torch.bfloat16)


def to_numpy(rows: Tensor) -> Rows:
    """A bf16 tensor as an array over the same memory."""
    return rows.contiguous().view(torch.uint16).numpy().view(BF16)


@dataclass(frozen=True)
class Expert:
    """The first two projections in one matrix [2F, D], as servers keep them; `down` is [D, F]."""

    gate_up: Tensor
    down: Tensor

    def __call__(self, x_TD: Tensor, multiply: Callable[[Tensor, Tensor], Tensor] = functional.linear) -> Tensor:
        """The expert's output [T, D]."""
        gate_TF, up_TF = multiply(x_TD, self.gate_up).chunk(2, dim=-1)
        return multiply(functional.silu(gate_TF) * up_TF, self.down)


class Layer:
    """Gate and experts in one process, written plainly and as fast as torch allows: the experts that `indices` names, or all."""

    def __init__(
        self,
        folder: Path,
        sizes: Sizes,
        dtype: torch.dtype = torch.bfloat16,
        indices: Sequence[int] | None = None,
    ) -> None:
        self._multiply: Callable[[Tensor, Tensor], Tensor] = functional.linear
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
        prefix = f"layers.{LAYER}"
        self.gate = tensors[f"{prefix}.gate.weight"]
        self._top_k = sizes.top_k
        self.experts: dict[int, Expert] = {}
        for index in range(sizes.num_experts) if indices is None else indices:
            gate, up, down = (tensors[f"{prefix}.experts.{index}.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj"))
            self.experts[index] = Expert(torch.cat([gate, up]), down)

    def packed(self, multiply: Callable[[Tensor, Tensor], Tensor]) -> Layer:
        """The same experts with packed matrices where there are such, and the product that takes them."""
        other = copy(self)
        pairs = {index: (pack(expert.gate_up), pack(expert.down)) for index, expert in self.experts.items()}
        if can_pack():
            other.experts = {index: Expert(gate_up, down) for index, (gate_up, down) in pairs.items() if gate_up is not None and down is not None}
            other._multiply = multiply
        return other

    def choose(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Experts [T, K] and their weights [T, K], fp32."""
        scores_TE = functional.linear(x_TD.float(), self.gate.float()).softmax(dim=-1)
        weights_TK, ids_TK = scores_TE.topk(self._top_k, dim=-1)
        return ids_TK, weights_TK / weights_TK.sum(dim=-1, keepdim=True)

    def __call__(self, x_TD: Tensor) -> Tensor:
        """The layer's output [T, D]."""
        ids_TK, weights_TK = self.choose(x_TD)
        total_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
        for index, token, weight in groups_of(ids_TK, weights_TK):
            total_TD.index_add_(0, token, self.experts[index](x_TD[token], self._multiply).float().mul_(weight))
        return total_TD.to(x_TD.dtype)


def groups_of(ids_TK: Tensor, weights_TK: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """Each expert that is chosen at all: its number, its tokens [n] and their weights [n, 1]. One sort instead of a search per expert."""
    flat = ids_TK.flatten()
    order = torch.argsort(flat, stable=True)
    used, counts = torch.unique_consecutive(flat[order], return_counts=True)
    token, weight = order // ids_TK.shape[1], weights_TK.flatten()[order].unsqueeze(-1)
    sizes = counts.tolist()
    return list(zip(used.tolist(), token.split(sizes), weight.split(sizes), strict=True))


def check(answer: Rows, rows: Rows, reference: nn.Module | Layer) -> float:
    """How far an answer, in fp32, is from the reference, relative to its largest element. Raises ValueError above the tolerance."""
    with torch.no_grad():
        expected_TD = reference(torch.from_numpy(rows.astype(np.float32)))
    difference = float((torch.from_numpy(answer) - expected_TD).abs().max() / expected_TD.abs().max())
    if not difference <= TOLERANCE:
        message = f"the answer differs from the reference by {difference:.3f} of its largest element; at most {TOLERANCE} is rounding"
        raise ValueError(message)
    return difference
