"""The rungs below the copies: a generalist and a dense matrix for every layer, fitted, rounded to the served type, and measured.

Shape legend: T tokens, D model width, K choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actors.expert_layouts import ExpertWeights, expert_forward
from cluster.core.descriptors import DType, ExpertDescriptor, LayerDescriptor
from cluster.registry.convert import as_dtype
from router_service.calibration.fitting import Training, distilled, fresh_start, ridge
from router_service.calibration.subject import LayerRows, Subject, wide_weights
from router_service.core.reference import experts_output
from router_service.core.tensors import as_tensor

Arrays = Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class LayerTargets:
    """A layer's rows, its whole output [T, D], and that output over the sum of the weights: what its experts say in the mean."""

    x_TD: torch.Tensor
    output_TD: torch.Tensor
    mean_TD: torch.Tensor
    sums_T: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LowerRungs:
    """One layer's fallbacks in the served type, and the relative error of each on held-out rows, as a stand-in for the experts' mean."""

    generalist: ExpertDescriptor
    tensors: Mapping[str, Arrays]
    relative_errors: Mapping[str, float]

    def compute(self, rung: str, x_ND: torch.Tensor) -> torch.Tensor:
        """In fp32, whatever the served type."""
        wide = {name: as_tensor(np.asarray(array, np.float32)) for name, array in self.tensors[rung].items()}
        if rung == "dense":
            return torch.nn.functional.linear(x_ND, wide["weight"])
        descriptor = self.generalist.model_copy(update={"dtype": DType.FP32})
        return expert_forward(x_ND, ExpertWeights(descriptor, wide, 0, 0))


def targets_of(subject: Subject, layer: int, rows: LayerRows) -> LayerTargets:
    """What a layer answers to its rows."""

    def forward(index: int, x_ND: torch.Tensor) -> torch.Tensor:
        return expert_forward(x_ND, wide_weights(subject, (layer, index), subject.primaries[layer, index]))

    output_TD = experts_output(rows.x_TD, rows.ids_TK.numpy(), rows.weights_TK, forward)
    sums_T = rows.weights_TK.sum(dim=1)
    return LayerTargets(rows.x_TD, output_TD, output_TD / sums_T.clamp(min=torch.finfo(torch.float32).tiny)[:, None], sums_T)


def fit_lower_rungs(entry: LayerDescriptor, fitted: LayerTargets, judged: LayerTargets, training: Training) -> LowerRungs:
    """Both fallbacks of one layer. The generalist is as wide as keeps it no larger than the dense matrix."""
    own = entry.expert
    matrix, _ = ridge(fitted.x_TD, fitted.mean_TD, fitted.sums_T, (judged.x_TD, judged.mean_TD, judged.sums_T))
    narrow = ExpertDescriptor(hidden_size=own.hidden_size, intermediate_size=max(1, own.hidden_size // 3), dtype=own.dtype)
    trained = distilled(narrow, fresh_start(narrow, training.seed), fitted.x_TD, fitted.mean_TD, fitted.sums_T, training)
    tensors = {
        "dense": {"weight": as_dtype(matrix.float().numpy(), own.dtype, "dense")},
        "generalist": {name: as_dtype(tensor.numpy(), own.dtype, name) for name, tensor in trained.items()},
    }
    rungs = LowerRungs(narrow, tensors, {})
    errors = {rung: _relative_error(rungs.compute(rung, judged.x_TD), judged) for rung in tensors}
    return LowerRungs(narrow, tensors, errors)


def _relative_error(found_TD: torch.Tensor, targets: LayerTargets) -> float:
    weights_T1 = targets.sums_T[:, None].double()
    lost = (weights_T1 * (found_TD - targets.mean_TD).double().square()).sum()
    whole = (weights_T1 * targets.mean_TD.double().square()).sum()
    return float((lost / whole).sqrt()) if whole > 0.0 else 0.0
