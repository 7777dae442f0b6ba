"""Arrays as tensors, and tensors in the dtype that is wanted."""

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


def as_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in this dtype. One that has it is not asked for it: to torch that is as much work as a few rows."""
    return x if x.dtype is dtype else x.to(dtype)
