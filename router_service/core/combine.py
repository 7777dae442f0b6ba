"""Combine: bring the experts' outputs back, weighted, in a fixed order. In fp32, so that the answer is the same whichever copies answered.

Shape legend: T tokens, D model width, K choices of a token, N rows that experts computed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.core.errors import DataLoss


def combine(y_ND: torch.Tensor, place_TK: NDArray[np.intp], weights_TK: torch.Tensor) -> torch.Tensor:
    """fp32 [T, D]: for each choice column in ascending order, add weight * output; choices without a place (-1) add nothing.

    Product and sum are two rounded steps, never fused, so that any IEEE machine gets the same bits.
    """
    num_tokens, top_k = place_TK.shape
    total_TD = torch.zeros((num_tokens, y_ND.shape[1]), dtype=torch.float32)
    is_whole = place_TK.size > 0 and int(place_TK.min()) >= 0
    for column in range(top_k):
        place_T = place_TK[:, column]
        weight_T1 = weights_TK[:, column, None]
        if is_whole:
            total_TD += y_ND.index_select(0, torch.from_numpy(place_T)).float().mul_(weight_T1)
            continue
        used = np.flatnonzero(place_T >= 0)
        if used.size:
            rows = torch.from_numpy(used)
            total_TD.index_add_(0, rows, y_ND.index_select(0, torch.from_numpy(place_T[used])).float().mul_(weight_T1[rows]))
    return total_TD


def finish(total_TD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The reply [T, D] in the caller's dtype. Raises DataLoss, with the rows, when finite input gave an output that is not finite in that dtype."""
    reply_TD = total_TD.to(dtype)
    if not is_finite(reply_TD):
        raise not_finite(reply_TD)
    return reply_TD


def not_finite(reply_TD: torch.Tensor) -> DataLoss:
    """What to say of a reply that is not finite in its dtype, with its rows."""
    bad = torch.nonzero(~torch.isfinite(reply_TD).all(dim=1)).flatten().tolist()
    dtype = str(reply_TD.dtype).removeprefix("torch.")
    message = f"{len(bad)} rows of the output are not finite in {dtype}; check the weights, or send fp32 hidden states"
    return DataLoss(message, failed_rows=tuple(bad))


def is_finite(x: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; one pass, many times faster than isfinite over all."""
    low, high = torch.aminmax(x)
    return math.isfinite(low.item()) and math.isfinite(high.item())
