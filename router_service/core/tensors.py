"""Arrays as tensors."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray


def as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """A tensor with a copy of an array; bf16 comes as ml_dtypes.bfloat16, which torch does not know."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
