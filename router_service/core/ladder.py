"""The ladder below the copies: what serves the choices of experts that nobody computed, rung by rung in the order that the model's spec gives.

    fewer_experts   the choice is left out; the weights of the token's other choices grow to the sum that the gate gave
    generalist      one narrow expert of the layer answers in the lost expert's place, with its weight
    dense           one matrix of the layer does

A shadow is a copy, so it is not decided here. Whatever set of experts is gone: no weight becomes NaN, none changes its sign, and a choice that no rung
serves is named, never forgotten.
Shape legend: T tokens, K choices of a token, N dispatched rows, M rows for one fallback, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from router_service.core.outcomes import Outcome

FEWER_EXPERTS = "fewer_experts"
FALLBACK_OUTCOMES: Mapping[str, Outcome] = {"generalist": Outcome.GENERALIST, "dense": Outcome.DENSE}
"""Rungs that compute, with what their choices are reported as."""

Compute = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class FallbackRows:
    """Choices that one fallback serves, in order of (token, choice): row m is token `tokens_M[m]`, for its choice column `columns_M[m]`."""

    tokens_M: NDArray[np.intp]
    columns_M: NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class Degraded:
    """A request whose lost choices are decided.

    `weights_TK`: fp32, as the combine shall use them; those of omitted choices are 0. `outcomes_TK`: uint8, an Outcome for each choice of a lost expert, 0
    elsewhere and where nothing serves it. `fallbacks`: rows to compute by rung. `unserved_tokens`: ascending; the request must fail for them.
    """

    weights_TK: torch.Tensor
    outcomes_TK: NDArray[np.uint8]
    fallbacks: Mapping[str, FallbackRows]
    unserved_tokens: NDArray[np.intp]


def stand_in(ids_TK: NDArray[np.int32], weights_TK: torch.Tensor, lost: Collection[int], rungs: Sequence[str]) -> Degraded:
    """Decide for every choice of a lost expert.

    Args:
        ids_TK: expert ids, below 0 where nobody computes.
        weights_TK: fp32, the gate's or the caller's.
        lost: expert ids that no copy answered for.
        rungs: what may stand in, first choice first; others than the three of this module are passed over.
    """
    open_TK = np.isin(ids_TK, np.fromiter(lost, np.int32, len(lost))) & (ids_TK >= 0)
    outcomes_TK = np.zeros(ids_TK.shape, np.uint8)
    fallbacks: dict[str, FallbackRows] = {}
    weights = weights_TK
    for rung in rungs:
        if not open_TK.any():
            break
        if rung == FEWER_EXPERTS:
            weights, served_TK = _with_fewer(ids_TK, weights, open_TK)
            outcomes_TK[served_TK] = Outcome.OMITTED
        elif rung in FALLBACK_OUTCOMES:
            served_TK = open_TK
            fallbacks[rung] = FallbackRows(*np.nonzero(served_TK))
            outcomes_TK[served_TK] = FALLBACK_OUTCOMES[rung]
        else:
            continue
        open_TK = open_TK & ~served_TK
    return Degraded(weights, outcomes_TK, fallbacks, np.flatnonzero(open_TK.any(axis=1)))


def compute_stand_ins(
    degraded: Degraded, place_TK: NDArray[np.intp], y_ND: torch.Tensor, x_TD: torch.Tensor, compute: Compute
) -> tuple[torch.Tensor, NDArray[np.intp]]:
    """Outputs and places for the combine: `compute(rung, rows)` fills in for the lost choices, and an omitted choice has no place.

    Rows of `y_ND` that lost experts should have filled are never looked at. Results come in the dtype of `y_ND`.
    """
    parts, places = [y_ND], np.where(degraded.outcomes_TK == 0, place_TK, -1)
    end = y_ND.shape[0]
    for rung, rows in degraded.fallbacks.items():
        parts.append(compute(rung, x_TD.index_select(0, torch.from_numpy(rows.tokens_M))).to(y_ND.dtype))
        places[rows.tokens_M, rows.columns_M] = np.arange(end, end + rows.tokens_M.size)
        end += rows.tokens_M.size
    return torch.cat(parts) if len(parts) > 1 else y_ND, places


def _with_fewer(ids_TK: NDArray[np.int32], weights_TK: torch.Tensor, open_TK: NDArray[np.bool_]) -> tuple[torch.Tensor, NDArray[np.bool_]]:
    """Weights without the open choices, and which of these are thereby served: all of a token's or none.

    A token without another choice cannot do with fewer; nor can one whose other weights do not sum to more than 0, as nothing could be scaled to the sum.
    """
    wide_TK = np.where(ids_TK >= 0, weights_TK.detach().numpy().astype(np.float64), 0.0)
    kept_TK = np.where(open_TK, 0.0, wide_TK)
    has_other_T = ((ids_TK >= 0) & ~open_TK).any(axis=1)
    sum_T, kept_T = wide_TK.sum(axis=1), kept_TK.sum(axis=1)
    is_same_T = (np.where(open_TK, wide_TK, 0.0) == 0.0).all(axis=1)
    scale_T = np.divide(sum_T, kept_T, out=np.zeros_like(sum_T), where=(kept_T > 0.0) & (sum_T > 0.0))
    scale_T[is_same_T] = 1.0
    with np.errstate(over="ignore"):
        scaled_TK = (kept_TK * scale_T[:, None]).astype(np.float32)
    served_T = has_other_T & (scale_T > 0.0) & np.isfinite(scaled_TK).all(axis=1)
    served_TK = open_TK & served_T[:, None]
    changed_T = served_TK.any(axis=1)
    weights = weights_TK.detach().clone()
    weights[torch.from_numpy(changed_T)] = torch.from_numpy(scaled_TK[changed_T])
    return weights, served_TK
