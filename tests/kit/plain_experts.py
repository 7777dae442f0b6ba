"""Experts with random weights in memory, and what they compute in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from actors.expert_layouts import TORCH_DTYPES, ExpertWeights, expert_forward
from cluster.core.descriptors import DType, ExpertDescriptor

ROUNDING = {DType.FP32: 1e-5, DType.FP16: 3e-3, DType.BF16: 2e-2}


def make_weights(descriptor: ExpertDescriptor, seed: int = 0) -> ExpertWeights:
    """One expert."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(TORCH_DTYPES[descriptor.dtype])
        for name, shape in descriptor.tensor_shapes().items()
    }
    return ExpertWeights(descriptor, tensors, descriptor.num_bytes, descriptor.num_bytes)


def in_fp64(x_ND: torch.Tensor, experts: Sequence[ExpertWeights], rows: Sequence[int]) -> torch.Tensor:
    """What segments of these experts should give."""
    parts = []
    for part, expert in zip(x_ND.split(list(rows)), experts, strict=True):
        wide = {name: tensor.double() for name, tensor in expert.tensors.items()}
        parts.append(expert_forward(part.double(), ExpertWeights(expert.descriptor, wide, 0, 0)))
    return torch.cat(parts)


def row_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The worst row's error over that row's norm."""
    return float(((found.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())
