"""Digests of resident weights that any device can take again where they lie, a piece at a time: a wrapping sum of each row's bits.

Every flipped bit changes its row's sum, and so do several unless they cancel within one row. Exact, equal on every device and in any order. The
SHA-256 of the store says that a file is right; this says that memory still holds what was loaded from it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


def row_digests(tensor: Tensor) -> Tensor:
    """The digest of each row of a contiguous matrix, or of a vector as one row: int64, on the tensor's device."""
    rows = tensor.reshape(1, -1) if tensor.dim() == 1 else tensor
    row_bytes = rows.shape[1] * rows.element_size()
    word = next(dtype for size, dtype in _WORDS if row_bytes % size == 0)
    return rows.view(torch.uint8).view(word).sum(1, dtype=torch.int64)


def row_spans(tensor: Tensor, chunk_bytes: int) -> list[tuple[int, int]]:
    """Where to cut the rows of a tensor, so that each piece [first, stop) has about `chunk_bytes`."""
    num_rows = 1 if tensor.dim() == 1 else tensor.shape[0]
    step = max(1, chunk_bytes * num_rows // max(1, tensor.nbytes))
    return [(first, min(num_rows, first + step)) for first in range(0, num_rows, step)]


def have_changed(tensor: Tensor, digests: Tensor, first: int, stop: int) -> bool:
    """Whether rows [first, stop) are not those that were digested."""
    rows = tensor.reshape(1, -1) if tensor.dim() == 1 else tensor
    return not torch.equal(row_digests(rows[first:stop]), digests[first:stop])


def array_digests(arrays: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """One digest for each packed array of a shadow."""
    return {name: array_digest(array) for name, array in arrays.items()}


def array_digest(array: NDArray[Any]) -> int:
    """CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
