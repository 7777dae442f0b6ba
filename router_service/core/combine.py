"""Combine: bring the experts' outputs back, weighted, in a fixed order. In fp32, so that the answer is the same whichever copies answered.

Shape legend: T tokens, D model width, K choices of a token, N rows that experts computed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.core.errors import DataLoss

_FEW_ELEMENTS = 1 << 14
_TOGETHER_ELEMENTS = 1 << 17
_ZERO = np.float32(0.0)  # what columns are added to: -0.0 becomes 0.0


def combine(y_ND: torch.Tensor, place_TK: NDArray[np.intp], weights_TK: torch.Tensor) -> torch.Tensor:
    """fp32 [T, D]: for each choice column in ascending order, add weight * output; choices without a place (-1) add nothing.

    Product and sum are two rounded steps, never fused, so that any IEEE machine gets the same bits.
    """
    num_tokens, top_k = place_TK.shape
    if place_TK.size and not np.count_nonzero(place_TK < 0):
        return (_combine_few if place_TK.size * y_ND.shape[1] <= _FEW_ELEMENTS else _combine_whole)(y_ND, place_TK, weights_TK)
    total_TD = torch.zeros((num_tokens, y_ND.shape[1]), dtype=torch.float32)
    for column in range(top_k):
        place_T = place_TK[:, column]
        used = np.flatnonzero(place_T >= 0)
        if used.size:
            rows = torch.from_numpy(used)
            weight_T1 = weights_TK[:, column, None]
            total_TD.index_add_(0, rows, y_ND.index_select(0, torch.from_numpy(place_T[used])).float().mul_(weight_T1[rows]))
    return total_TD


def _combine_few(y_ND: torch.Tensor, place_TK: NDArray[np.intp], weights_TK: torch.Tensor) -> torch.Tensor:
    """The same as `_combine_whole` for few rows, for which numpy takes half as long."""
    products_TKD = y_ND.float().numpy().take(place_TK, axis=0)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found in the reply
        products_TKD *= weights_TK.detach().numpy()[:, :, None]
        total_TD = products_TKD[:, 0] + _ZERO
        for column in range(1, place_TK.shape[1]):
            total_TD += products_TKD[:, column]
    return torch.from_numpy(total_TD)


def _combine_whole(y_ND: torch.Tensor, place_TK: NDArray[np.intp], weights_TK: torch.Tensor) -> torch.Tensor:
    """The usual case, in which every choice has a place: the same steps, in fewer operations where all products fit the cache together."""
    num_tokens, top_k = place_TK.shape
    width = y_ND.shape[1]
    if place_TK.size * width <= _TOGETHER_ELEMENTS:
        place_N = torch.from_numpy(place_TK.reshape(-1))
        products = y_ND.index_select(0, place_N).float().view(num_tokens, top_k, width).mul_(weights_TK.unsqueeze(-1)).unbind(1)
        total_TD = products[0] + 0.0
        for product_TD in products[1:]:
            total_TD += product_TD
        return total_TD
    total_TD = torch.zeros((num_tokens, width), dtype=torch.float32)
    for column in range(top_k):
        total_TD += y_ND.index_select(0, torch.from_numpy(place_TK[:, column])).float().mul_(weights_TK[:, column, None])
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
