"""Codes of 2, 3, 4 or 8 bits as bytes, and the levels that they stand for.

Eight codes make up `bits` bytes, the first code in the lowest bits of the first byte; the last unit is filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

# A record may say 0, for no codes at all; such codes are never packed.
Bits = Literal[0, 2, 3, 4, 8]
Levels = Literal["integer", "half", "gaussian"]

CODES_PER_UNIT = 8


def _mirrored(*magnitudes: int) -> tuple[int, ...]:
    return (*(-magnitude for magnitude in reversed(magnitudes)), *magnitudes)


# Whole numbers of at most 8 bits: times a scale of at most 8 bits they are exact in fp32, so every device expands a shadow to the same bits.
# Gaussian: the optimal quantiser of a normal distribution (Max 1960, table I) with its inner levels scaled to 3 or 8.
LEVELS: Mapping[tuple[Levels, Bits], tuple[int, ...]] = {
    ("integer", 8): tuple(range(-127, 128)),
    ("integer", 4): tuple(range(-7, 8)),
    ("integer", 3): tuple(range(-3, 4)),
    ("integer", 2): (-1, 0, 1),
    ("half", 8): _mirrored(*range(1, 256, 2)),
    ("half", 4): _mirrored(*range(1, 16, 2)),
    ("half", 3): _mirrored(1, 3, 5, 7),
    ("half", 2): _mirrored(1, 3),
    ("gaussian", 4): _mirrored(8, 24, 41, 59, 78, 101, 129, 170),
    ("gaussian", 3): _mirrored(8, 25, 44, 70),
    ("gaussian", 2): _mirrored(3, 10),
}

# Bits that are looked up at once. A larger table is no faster: it leaves the first cache.
_WINDOW_BITS: Mapping[Bits, int] = {2: 8, 3: 12, 4: 8, 8: 8}
# Gathering one wide number per window is twice as fast as gathering a row; the types are carriers only, no arithmetic is done in them.
_CARRIERS: Mapping[int, type[np.generic]] = {1: np.float32, 2: np.float64, 4: np.complex128}


def packed_size(num_codes: int, bits: Bits) -> int:
    """Bytes that hold this many codes."""
    return -(-num_codes // CODES_PER_UNIT) * bits


def pack(codes: NDArray[np.uint8], bits: Bits) -> NDArray[np.uint8]:
    """Flat codes below 2**bits as bytes, [packed_size]."""
    if bits == 8:  # noqa: PLR2004  (a code is a byte)
        return np.concatenate([codes, np.zeros(-len(codes) % CODES_PER_UNIT, np.uint8)])
    units = np.zeros((-(-len(codes) // CODES_PER_UNIT), CODES_PER_UNIT), np.uint8)
    units.reshape(-1)[: len(codes)] = codes
    words = np.zeros(len(units), np.uint32)
    for place in range(CODES_PER_UNIT):
        words |= units[:, place].astype(np.uint32) << np.uint32(bits * place)
    packed: NDArray[np.uint8] = np.ascontiguousarray(words.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :bits]).reshape(-1)
    return packed


def unpack(packed: NDArray[np.uint8], bits: Bits, levels: Levels) -> NDArray[np.float32]:
    """The level of every code in whole units of bytes, flat; codes beyond the last level stand for 0."""
    windows = _split_words(packed) if bits == 3 else packed  # noqa: PLR2004  (the one width whose codes cross bytes)
    return _table(bits, levels).take(windows).view(np.float32)


def _split_words(packed: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Three bytes as two windows of 12 bits."""
    triples = packed.reshape(-1, 3).astype(np.uint16)
    windows = np.empty((len(triples), 2), np.uint16)
    windows[:, 0] = triples[:, 0] | (triples[:, 1] & 15) << 8
    windows[:, 1] = triples[:, 1] >> 4 | triples[:, 2] << 4
    return windows.reshape(-1)


@cache
def _table(bits: Bits, levels: Levels) -> NDArray[Any]:
    """For every window, the levels of its codes side by side in one carrier."""
    values = np.zeros(1 << bits, np.float32)
    known = LEVELS[levels, bits]
    values[: len(known)] = known
    window_bits = _WINDOW_BITS[bits]
    places = range(0, window_bits, bits)
    windows = np.arange(1 << window_bits)
    rows = np.stack([values[windows >> place & ((1 << bits) - 1)] for place in places], axis=1)
    return np.ascontiguousarray(rows).view(_CARRIERS[len(places)]).reshape(-1)
