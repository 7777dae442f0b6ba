"""The data path in one process: the same order, experts and combine as the pipeline's, without a cluster between. The twin and the replay are made of it.

Shape legend: T tokens, D model width, K choices of a token, N rows that experts compute.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import torch
from numpy.typing import NDArray

from router_service.core.combine import combine
from router_service.core.dispatch import order_choices
from router_service.core.ladder import Compute, Degraded, compute_stand_ins

Forward = Callable[[int, torch.Tensor], torch.Tensor]


@torch.no_grad()
def experts_output(x_TD: torch.Tensor, ids_TK: NDArray[np.int32], weights_TK: torch.Tensor, forward: Forward) -> torch.Tensor:
    """fp32 [T, D]: `forward(id, rows)` once for each id with all its rows, then the combine. Ids below 0 are computed by nobody."""
    y_ND, place_TK = _computed(x_TD, ids_TK, forward, ())
    return combine(y_ND, place_TK, weights_TK)


@torch.no_grad()
def degraded_output(
    x_TD: torch.Tensor, ids_TK: NDArray[np.int32], degraded: Degraded, lost: Collection[int], forward: Forward, compute: Compute
) -> torch.Tensor:
    """The same where experts are `lost`: `compute(rung, rows)` fills in as `degraded` says."""
    y_ND, place_TK = _computed(x_TD, ids_TK, forward, lost)
    return combine(*compute_stand_ins(degraded, place_TK, y_ND, x_TD, compute), degraded.weights_TK)


def _computed(x_TD: torch.Tensor, ids_TK: NDArray[np.int32], forward: Forward, lost: Collection[int]) -> tuple[torch.Tensor, NDArray[np.intp]]:
    order = order_choices(ids_TK)
    y_ND = torch.empty((order.rows_N.size, x_TD.shape[1]), dtype=x_TD.dtype)
    for part in order.experts:
        if part.index not in lost:
            rows = torch.from_numpy(order.rows_N[part.start : part.stop])
            y_ND[part.start : part.stop] = forward(part.index, x_TD.index_select(0, rows))
    return y_ND, order.place_TK
