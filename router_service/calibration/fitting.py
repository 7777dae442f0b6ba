"""What stands in for experts, fitted to calibration rows: a matrix by ridge regression, narrow experts by a short run of AdamW.

Shape legend: N rows, D model width, F inner width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from actors.expert_layouts import _activate
from cluster.core.descriptors import ExpertDescriptor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Shares of the mean input power that are tried as the penalty."""


@dataclass(frozen=True, slots=True)
class Training:
    """A short run: batches of rows, the learning rate falling to nothing along a cosine."""

    steps: int = 1500
    batch: int = 512
    rate: float = 3e-3
    decay: float = 1e-2
    seed: int = 0


def ridge(x_ND: Tensor, y_ND: Tensor, weights_N: Tensor, held: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, float]:
    """The matrix [D, D], in double precision, whose products with the rows are close to `y_ND`, squared errors weighted; and the penalty's share.

    The penalty is the one of `RIDGES` that serves the held-out rows best (Hoerl & Kennard 1970).
    """
    x, y, w = x_ND.double(), y_ND.double(), weights_N.double()[:, None]
    moment_DD, cross_DD = x.T @ (w * x), x.T @ (w * y)
    power = float(moment_DD.diagonal().mean()) or 1.0
    held_x, held_y, held_w = (part.double() for part in held)
    best, best_error, best_share = torch.zeros_like(moment_DD), math.inf, math.nan
    for share in RIDGES:
        solved = torch.linalg.solve(moment_DD + share * power * torch.eye(len(moment_DD), dtype=torch.float64), cross_DD).T
        error = float((held_w * (held_x @ solved.T - held_y).square().sum(dim=1)).sum())
        if error < best_error:
            best, best_error, best_share = solved, error, share
    return best, best_share


def narrow_start(descriptor: ExpertDescriptor, tensors: Mapping[str, Tensor], x_ND: Tensor, inner: int) -> dict[str, Tensor]:
    """The `inner` units of an expert that add most to its outputs on these rows, as a narrow expert to train from."""
    first = "gate_up" if descriptor.gated else "up"
    with torch.no_grad():
        hidden_NF = _activate(_product(x_ND, tensors, first), descriptor)
        power_F = hidden_NF.square().sum(dim=0) * tensors["down"].square().sum(dim=0)
    units = power_F.topk(min(inner, power_F.numel())).indices.sort().values
    rows = torch.cat([units, units + descriptor.intermediate_size]) if descriptor.gated else units
    narrow: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "down":
            narrow[name] = tensor[:, units].clone()
        else:
            narrow[name] = tensor.clone() if name == "down_bias" else tensor[rows].clone()
    return narrow


def fresh_start(descriptor: ExpertDescriptor, seed: int) -> dict[str, Tensor]:
    """A narrow expert of small random weights."""
    generator = torch.Generator().manual_seed(seed)
    shapes = descriptor.tensor_shapes()
    return {name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) if len(shape) > 1 else torch.zeros(shape) for name, shape in shapes.items()}


def distilled(
    descriptor: ExpertDescriptor, start: Mapping[str, Tensor], x_ND: Tensor, y_ND: Tensor, weights_N: Tensor, training: Training
) -> dict[str, Tensor]:
    """An expert trained from `start` to give `y_ND` for `x_ND`, squared errors weighted (Hinton et al. 2015, on outputs). Equal arguments, equal weights."""
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=training.rate, weight_decay=training.decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    power = float((weights_N[:, None] * y_ND.square()).mean()) or 1.0
    generator = torch.Generator().manual_seed(training.seed)
    for _ in range(training.steps if len(x_ND) else 0):
        batch = torch.randint(len(x_ND), (training.batch,), generator=generator)
        found = forward_with_gradient(descriptor, parameters, x_ND[batch])
        loss = (weights_N[batch, None] * (found - y_ND[batch]).square()).mean() / power
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
        optimizer.step()
        schedule.step()
    return {name: tensor.detach() for name, tensor in parameters.items()}


def forward_with_gradient(descriptor: ExpertDescriptor, tensors: Mapping[str, Tensor], x_ND: Tensor) -> Tensor:
    """The expert's arithmetic, in the tensors' own type, to differentiate."""
    first = "gate_up" if descriptor.gated else "up"
    return _product(_activate(_product(x_ND, tensors, first), descriptor), tensors, "down")


def _product(x: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return linear(x, tensors[name], tensors.get(f"{name}_bias"))
