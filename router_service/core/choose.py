"""Choices of one request, whoever made them: the caller's own top-k, or the layer's gate with its overflow policy.

Shape legend: T tokens, D model width, K choices of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.core.errors import DataLoss
from router_service.core.capacity import apply_overflow
from router_service.core.combine import is_finite
from router_service.core.gate import Gate
from router_service.core.layer_call import GateChoice, Overflow, TopK


@dataclass(frozen=True, slots=True)
class Chosen:
    """int32 ids [T, K], -1 where nobody serves the choice; fp32 weights [T, K], 0 there; `dropped_TK` marks what capacity dropped."""

    ids_TK: NDArray[np.int32]
    weights_TK: torch.Tensor
    dropped_TK: NDArray[np.bool_]


def choose(routing: GateChoice | TopK, gate: Gate, x_TD: torch.Tensor) -> Chosen:
    """The choices of a checked call. Raises DataLoss, with the rows, when the gate's weights are not finite."""
    if isinstance(routing, TopK):
        ids_TK = routing.expert_ids_TK.numpy()
        return Chosen(ids_TK, _used(routing.weights_TK.detach(), ids_TK), np.zeros(ids_TK.shape, np.bool_))
    choices = gate(x_TD, routing.positions_T)
    _refuse_overflown(choices.weights_TK)
    ids_TK = choices.ids_TK.numpy()
    if routing.overflow is Overflow.NONE:
        return Chosen(ids_TK, choices.weights_TK, np.zeros(ids_TK.shape, np.bool_))
    kept = apply_overflow(ids_TK, choices.scores_TE.float().numpy(), routing.overflow, routing.capacity_factor)
    return Chosen(kept.ids_TK, _used(choices.weights_TK, kept.ids_TK), kept.dropped_TK)


def _used(weights_TK: torch.Tensor, ids_TK: NDArray[np.int32]) -> torch.Tensor:
    return weights_TK.masked_fill(torch.from_numpy(ids_TK < 0), 0.0)


def _refuse_overflown(weights_TK: torch.Tensor) -> None:
    if not is_finite(weights_TK):
        rows = torch.nonzero(~torch.isfinite(weights_TK).all(dim=1)).flatten().tolist()
        message = "the gate's scores are not finite; check the gate's weights, or send hidden states of a usual scale"
        raise DataLoss(message, failed_rows=tuple(rows))
