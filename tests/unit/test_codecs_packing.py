"""Codes as bytes: every width, every length, the order of bits fixed by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.core.packing import CODES_PER_UNIT, LEVELS, Bits, Levels, pack, packed_size, unpack

KINDS = list(LEVELS)


@pytest.mark.parametrize(("levels", "bits"), KINDS)
@given(seed=st.integers(0, 2**32 - 1), num_codes=st.integers(0, 200))
def test_every_code_comes_back_as_its_level(levels: Levels, bits: Bits, seed: int, num_codes: int) -> None:
    table = np.array(LEVELS[levels, bits], np.float32)
    codes = np.random.default_rng(seed).integers(0, len(table), num_codes, dtype=np.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8
    assert len(packed) == packed_size(num_codes, bits)
    found = unpack(packed, bits, levels)
    assert found.dtype == np.float32
    assert np.array_equal(found[:num_codes], table[codes])


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (2, [3, 2, 1, 0, 1], [0b00_01_10_11, 0b01]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11_010_001, 0b0_101_100_0, 0b000_111_11]),
        (4, [1, 15, 2], [0xF1, 0x02, 0, 0]),
        (8, [7, 254], [7, 254, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_the_first_code_lies_in_the_lowest_bits(bits: Bits, codes: list[int], packed: list[int]) -> None:
    assert pack(np.array(codes, np.uint8), bits).tolist() == packed


@given(num_codes=st.integers(0, 10**9), bits=st.sampled_from([2, 3, 4, 8]))
def test_packing_wastes_less_than_one_unit(num_codes: int, bits: Bits) -> None:
    waste_bits = 8 * packed_size(num_codes, bits) - num_codes * bits
    assert 0 <= waste_bits < CODES_PER_UNIT * bits


@pytest.mark.parametrize(("levels", "bits"), KINDS)
def test_levels_are_their_own_mirror_image_and_exact_in_eight_bits(levels: Levels, bits: Bits) -> None:
    table = LEVELS[levels, bits]
    assert len(table) in {1 << bits, (1 << bits) - 1}
    assert list(table) == sorted(set(table))
    assert [-level for level in reversed(table)] == list(table)
    assert max(table) < 1 << 8
