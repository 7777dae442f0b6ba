"""A matrix reordered once for oneDNN's bf16 kernels on the CPU, as the compute layout `packed` keeps it beside the mapped one.

Without it oneDNN reorders a matrix anew for each product, which for a few rows costs more than the product itself. The packed form cannot be mapped:
it is private memory, as much again. A product by it has the bits of a product by the mapped matrix, so that replies replay from their plans all the
same; that is tried for every matrix, and one whose bits differ is not packed. Shape legend: T rows, I input width, O output width.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

logger = logging.getLogger(__name__)

# Kernels are chosen by the number of rows: a few, a tile, more than a tile.
_TRIED_ROWS = (2, 16, 33)


@torch.inference_mode()
def pack(weight_OI: Tensor) -> Tensor | None:
    """The packed form; None where this build or processor has none for it, or its products would have other bits."""
    if weight_OI.device.type != "cpu" or weight_OI.dtype is not torch.bfloat16 or weight_OI.dim() != 2 or not can_pack():  # noqa: PLR2004  (a matrix)
        return None
    packed: Tensor = _operators()._reorder_linear_weight(weight_OI)  # noqa: SLF001  (torch offers it under no other name)
    generator = torch.Generator().manual_seed(0)
    for num_rows in _TRIED_ROWS:
        x_TI = torch.randn((num_rows, weight_OI.shape[1]), generator=generator).to(weight_OI.dtype)
        if not torch.equal(linear(x_TI, weight_OI), multiply_packed(x_TI, packed)):
            _note_other_bits(tuple(weight_OI.shape))
            return None
    return packed


def multiply_packed(x_TI: Tensor, packed: Tensor) -> Tensor:
    """`linear` without bias by a packed matrix: [T, O]."""
    product: Tensor = _multiplier()(x_TI, packed, None, "none", [], "")
    return product


@cache
def _multiplier() -> Any:  # noqa: ANN401  (as below)
    """The one overload: its packet would choose it anew for each product."""
    return _operators()._linear_pointwise.default  # noqa: SLF001  (as above)


@cache
def can_pack() -> bool:
    """Whether this build of torch has oneDNN's operators and this processor its bf16 instructions."""
    operators = _operators()
    has_operators = all(hasattr(operators, name) for name in ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported"))
    return has_operators and bool(operators._is_mkldnn_bf16_supported())  # noqa: SLF001  (as above)


def _operators() -> Any:  # noqa: ANN401  (a namespace that torch makes at run time)
    return torch.ops.mkldnn


@cache
def _note_other_bits(shape: tuple[int, ...]) -> None:
    logger.warning("actors.layout packed: products of matrices %s would have other bits than mapped ones; they stay mapped", shape)
