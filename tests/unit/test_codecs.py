"""Packed experts: what is lost is bounded, what is stored is counted, and the same expert always gives the same bytes."""

import hashlib
import math
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from actors.core.codecs import CODECS, PackedExpert, decode, encode, packed_bytes, packed_layout
from actors.core.packing import LEVELS
from cluster.core.descriptors import CodecRecord, DType, ExpertDescriptor
from cluster.core.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {DType.BF16: np.dtype(ml_dtypes.bfloat16), DType.FP16: np.dtype(np.float16), DType.FP32: np.dtype(np.float32)}
RECORDS = list(CODECS.values())
EVERY_RECORD = [CodecRecord(name="any", bits=bits, group_size=32, levels=levels, scales=scales) for levels, bits in LEVELS for scales in ("bf16", "e4m3")]
BIG = ExpertDescriptor(hidden_size=512, intermediate_size=2048)
SHIPPED = ExpertDescriptor(hidden_size=192, intermediate_size=256)
ODD = ExpertDescriptor(hidden_size=90, intermediate_size=71, gated=False, bias=True, activation="relu")

by_codec = pytest.mark.parametrize("codec", RECORDS, ids=lambda codec: codec.name)


def random_tensors(descriptor: ExpertDescriptor, seed: int = 0, spread: float = 0.02) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (spread * rng.standard_normal(shape)).astype(DTYPES[descriptor.dtype]) for name, shape in descriptor.tensor_shapes().items()}


def wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def group_size(width: int, codec: CodecRecord) -> int:
    groups = math.ceil(width / (codec.group_size or width))
    return math.ceil(width / groups)


def groups_of(array: np.ndarray, codec: CodecRecord) -> list[np.ndarray]:
    size = group_size(array.shape[1], codec)
    return [row[begin : begin + size] for row in wide(array) for begin in range(0, len(row), size)]


def error_share(codec: CodecRecord) -> float:
    """The most that a weight of an unclipped group can be off, as a share of the group's largest magnitude."""
    table = LEVELS[codec.levels, codec.bits]
    half_gap = max(upper - lower for lower, upper in pairwise(table)) / 2
    scale_rounding = 2.0**-4 if codec.scales == "e4m3" else 2.0**-8
    return max(half_gap / table[-1] * (1 + scale_rounding), scale_rounding) + 2.0**-8


def assert_bounded(array: np.ndarray, restored: np.ndarray, codec: CodecRecord) -> None:
    widest = np.abs(wide(array)).max()
    # Below 2**-126 a scale itself is rounded to a multiple of 2**-149.
    floor = 2 * float(ml_dtypes.finfo(array.dtype).smallest_subnormal) + LEVELS[codec.levels, codec.bits][-1] * 2.0**-149
    for weights, back in zip(groups_of(array, codec), groups_of(restored, codec), strict=True):
        rms = math.sqrt(np.square(weights - back).mean())
        assert rms <= np.abs(weights).max() * error_share(codec) + widest * 2.0**-16 + floor


def digest(packed: PackedExpert) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in packed.tensors.values())).hexdigest()


@by_codec
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    hidden=st.integers(1, 150),
    inner=st.integers(1, 150),
    dtype=st.sampled_from(list(DType)),
    exponent=st.integers(-12, 3),
)
def test_the_error_of_every_group_is_bounded_by_its_largest_weight(codec: CodecRecord, seed: int, hidden: int, inner: int, dtype: DType, exponent: int) -> None:
    descriptor = ExpertDescriptor(hidden_size=hidden, intermediate_size=inner, dtype=dtype)
    tensors = random_tensors(descriptor, seed, 2.0**exponent)
    rng = np.random.default_rng(seed)
    for array in tensors.values():
        # Outliers, and rows of very different size.
        array[rng.random(array.shape) < 0.01] *= 20
        array[rng.random(len(array)) < 0.2] *= 2.0**-6
    restored = decode(encode(descriptor, tensors, codec))
    for name, array in tensors.items():
        assert restored[name].dtype == array.dtype
        assert restored[name].shape == array.shape
        assert_bounded(array, restored[name], codec)


@settings(max_examples=60, deadline=None)
@given(codec=st.sampled_from(EVERY_RECORD), seed=st.integers(0, 2**32 - 1))
def test_the_bound_holds_for_every_codec_that_can_be_written_down(codec: CodecRecord, seed: int) -> None:
    descriptor = ExpertDescriptor(hidden_size=40, intermediate_size=32)
    tensors = random_tensors(descriptor, seed)
    restored = decode(encode(descriptor, tensors, codec))
    for name, array in tensors.items():
        assert_bounded(array, restored[name], codec)


def test_a_codec_without_levels_is_refused() -> None:
    with pytest.raises(ValidationError, match="gaussian levels are defined for 2, 3 and 4 bits"):
        CodecRecord(name="gaussian8", bits=8, levels="gaussian")


@pytest.mark.parametrize(("name", "snr_db"), [("int8", 40.0), ("int4", 20.0), ("int3", 14.8), ("int2", 9.2)])
def test_normally_distributed_weights_keep_the_expected_signal_to_noise(name: str, snr_db: float) -> None:
    tensors = random_tensors(SHIPPED)
    restored = decode(encode(SHIPPED, tensors, CODECS[name]))
    signal = sum(np.square(wide(array)).sum() for array in tensors.values())
    noise = sum(np.square(wide(array) - wide(restored[name])).sum() for name, array in tensors.items())
    assert 10 * math.log10(signal / noise) > snr_db


@pytest.mark.parametrize("descriptor", [BIG, SHIPPED, ODD], ids=["big", "shipped", "odd"])
@pytest.mark.parametrize(("name", "percent"), [("int8", 51.0), ("int4", 27.0), ("int3", 20.0), ("int2", 15.0)])
def test_packed_bytes_stay_below_their_share_of_bf16(descriptor: ExpertDescriptor, name: str, percent: float) -> None:
    share = packed_bytes(descriptor, CODECS[name]) / descriptor.num_bytes
    assert 100 * share <= percent + (2.5 if descriptor is ODD else 0.0)


def test_the_two_bit_codec_leaves_room_within_fifteen_percent() -> None:
    assert packed_bytes(BIG, CODECS["int2"]) / BIG.num_bytes < 0.133
    assert packed_bytes(SHIPPED, CODECS["int2"]) / SHIPPED.num_bytes < 0.133


@by_codec
@pytest.mark.parametrize("descriptor", [SHIPPED, ODD], ids=["shipped", "odd"])
def test_the_layout_says_exactly_what_encoding_makes(codec: CodecRecord, descriptor: ExpertDescriptor) -> None:
    packed = encode(descriptor, random_tensors(descriptor), codec)
    layout = packed_layout(descriptor, codec)
    assert {name: (array.dtype, array.shape) for name, array in packed.tensors.items()} == {name: (spot.dtype, spot.shape) for name, spot in layout.items()}
    assert list(packed.tensors) == list(layout)
    assert packed.num_bytes == packed_bytes(descriptor, codec) == sum(array.nbytes for array in packed.tensors.values())


def plain_decode(packed: PackedExpert, name: str) -> np.ndarray:
    """Weight by weight, from the bits, in float64."""
    codec = packed.codec
    rows, width = packed.descriptor.tensor_shapes()[name]
    bits = "".join(f"{byte:08b}"[::-1] for byte in packed.tensors[f"{name}.codes"].tolist())
    scales = packed.tensors[f"{name}.scales"]
    scales = wide(scales.view(ml_dtypes.float8_e4m3fn) if codec.scales == "e4m3" else scales)
    unit, size = float(packed.tensors[f"{name}.unit"][0]), group_size(width, codec)
    table = LEVELS[codec.levels, codec.bits]
    values = np.empty((rows, width))
    for place in range(rows * width):
        row, column = divmod(place, width)
        code = int(bits[place * codec.bits : (place + 1) * codec.bits][::-1], 2)
        values[row, column] = table[code] * scales[row, column // size] * unit
    return values


@by_codec
@pytest.mark.parametrize("descriptor", [ODD, ExpertDescriptor(hidden_size=128, intermediate_size=40)], ids=["odd", "even"])
def test_decoding_equals_plain_arithmetic_in_higher_precision(codec: CodecRecord, descriptor: ExpertDescriptor) -> None:
    packed = encode(descriptor, random_tensors(descriptor, 3), codec)
    restored = decode(packed)
    for name, shape in descriptor.tensor_shapes().items():
        if len(shape) == 2:
            expected = plain_decode(packed, name).astype(DTYPES[descriptor.dtype])
            assert np.array_equal(restored[name], expected)


@by_codec
def test_torch_expands_the_same_bytes_to_the_same_bits(codec: CodecRecord) -> None:
    packed = encode(SHIPPED, random_tensors(SHIPPED, 4), codec)
    restored = decode(packed)
    for name, (rows, width) in SHIPPED.tensor_shapes().items():
        flat = packed.tensors[f"{name}.codes"]
        eight = np.unpackbits(flat, bitorder="little").reshape(-1, codec.bits)
        codes = torch.from_numpy((eight << np.arange(codec.bits, dtype=np.uint8)).sum(axis=1)[: rows * width].astype(np.int64))
        scales = packed.tensors[f"{name}.scales"]
        scales = (scales.view(ml_dtypes.float8_e4m3fn) if codec.scales == "e4m3" else scales).astype(np.float32) * packed.tensors[f"{name}.unit"]
        # Levels and scales are exact in bf16, so one bf16 product rounds once, like ours.
        levels = torch.tensor(LEVELS[codec.levels, codec.bits]).bfloat16()[codes].view(scales.size, -1)
        product = (levels * torch.from_numpy(scales).bfloat16().view(-1, 1)).view(rows, width)
        assert np.array_equal(product.view(torch.int16).numpy(), restored[name].view(np.int16))


@by_codec
def test_biases_come_back_bit_for_bit(codec: CodecRecord) -> None:
    tensors = random_tensors(ODD, 5)
    restored = decode(encode(ODD, tensors, codec))
    for name in ("up_bias", "down_bias"):
        assert np.array_equal(restored[name].view(np.uint16), tensors[name].view(np.uint16))


def test_a_group_of_exact_levels_is_stored_as_written_down() -> None:
    descriptor = ExpertDescriptor(hidden_size=4, intermediate_size=4, gated=False, dtype=DType.FP32)
    weights = np.tile(np.array([10, 3, -3, -10], np.float32) * np.float32(208 / 2048), (4, 1))
    packed = encode(descriptor, {"up": weights, "down": weights}, CODECS["int2"])
    assert packed.tensors["up.codes"].tolist() == [0b00_01_10_11] * 4
    assert packed.tensors["up.scales"].tolist() == [[np.array(208, ml_dtypes.float8_e4m3fn).view(np.uint8)]] * 4
    assert packed.tensors["up.unit"].tolist() == [2.0**-11]
    assert np.array_equal(decode(packed)["up"], weights)


@by_codec
@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("kind", ["zeros", "constant", "denormal", "huge", "one_huge", "mixed"])
def test_degenerate_groups_come_back_finite_and_bounded(codec: CodecRecord, dtype: DType, kind: str) -> None:
    descriptor = ExpertDescriptor(hidden_size=128, intermediate_size=64, gated=False, dtype=dtype)
    info = ml_dtypes.finfo(DTYPES[dtype])
    rng = np.random.default_rng(6)
    tensors = {name: (0.5 * rng.standard_normal(shape)).clip(-1, 1) for name, shape in descriptor.tensor_shapes().items()}
    for array in tensors.values():
        match kind:
            case "zeros":
                array[:] = 0.0
            case "constant":
                array[:] = -0.37
            case "denormal":
                array[:] = array * 8 * float(info.smallest_subnormal)
            case "huge":
                array[:] = np.sign(array) * float(info.max)
            case "one_huge":
                array[3, 5] = -float(info.max)
            case _:
                array[0] = 0.0
                array[1] *= float(info.smallest_normal)
                array[2] = float(info.max)
    stored = {name: array.astype(DTYPES[dtype]) for name, array in tensors.items()}
    restored = decode(encode(descriptor, stored, codec))
    for name, array in stored.items():
        assert np.isfinite(wide(restored[name])).all()
        assert_bounded(array, restored[name], codec)
        for weights, back in zip(groups_of(array, codec), groups_of(restored[name], codec), strict=True):
            assert weights.any() or not back.any()


@by_codec
def test_equal_experts_give_equal_bytes_whatever_their_memory_looks_like(codec: CodecRecord) -> None:
    tensors = random_tensors(ODD, 7)
    strided: dict[str, Any] = {name: np.repeat(array, 2, axis=0)[::2] for name, array in tensors.items()}
    columns = {name: np.asfortranarray(array) for name, array in tensors.items()}
    frozen = {name: array.copy() for name, array in tensors.items()}
    for array in frozen.values():
        array.flags.writeable = False
    digests = {digest(encode(ODD, version, codec)) for version in (tensors, strided, columns, frozen)}
    assert len(digests) == 1


def test_a_fresh_process_encodes_the_same_bytes() -> None:
    script = """
import numpy as np, ml_dtypes, hashlib
from actors.core.codecs import CODECS, encode
from cluster.core.descriptors import ExpertDescriptor
descriptor = ExpertDescriptor(hidden_size=192, intermediate_size=64)
rng = np.random.default_rng(8)
tensors = {name: (0.02 * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16) for name, shape in descriptor.tensor_shapes().items()}
for codec in CODECS.values():
    print(hashlib.sha256(b"".join(array.tobytes() for array in encode(descriptor, tensors, codec).tensors.values())).hexdigest())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    descriptor = ExpertDescriptor(hidden_size=192, intermediate_size=64)
    tensors = random_tensors(descriptor, 8)
    assert done.stdout.split() == [digest(encode(descriptor, tensors, codec)) for codec in RECORDS]


def test_decoding_leaves_the_packed_expert_as_it_is_and_shares_no_memory() -> None:
    packed = encode(ODD, random_tensors(ODD, 9), CODECS["int3"])
    before = digest(packed)
    for array in decode(packed).values():
        array[:] = 0
    assert digest(packed) == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_get_no_shadow(value: float) -> None:
    tensors = random_tensors(SHIPPED)
    tensors["down"][1, 2] = value
    with pytest.raises(CheckpointError, match="down holds NaN or infinity"):
        encode(SHIPPED, tensors, CODECS["int2"])


def test_missing_and_misshapen_tensors_are_refused_by_name() -> None:
    tensors = random_tensors(SHIPPED)
    with pytest.raises(CheckpointError, match="down is missing"):
        encode(SHIPPED, {"gate_up": tensors["gate_up"]}, CODECS["int2"])
    with pytest.raises(CheckpointError, match=r"down is \[256, 192\] where \[192, 256\] belongs"):
        encode(SHIPPED, {**tensors, "down": tensors["down"].T}, CODECS["int2"])


@pytest.mark.parametrize("damage", ["missing", "short", "type"])
def test_a_packed_expert_that_contradicts_its_record_is_refused(damage: str) -> None:
    packed = encode(SHIPPED, random_tensors(SHIPPED), CODECS["int3"])
    tensors: dict[str, Any] = dict(packed.tensors)
    name = "down.scales"
    match damage:
        case "missing":
            del tensors[name]
        case "short":
            tensors[name] = tensors[name][:-1]
        case _:
            tensors[name] = tensors[name].astype(np.float32)
    with pytest.raises(CheckpointError, match=r"down\.scales is .* where uint8 \[192, 4\] belongs"):
        decode(PackedExpert(packed.descriptor, packed.codec, tensors))


def test_a_codec_is_data_and_further_ones_need_no_code() -> None:
    tensors = random_tensors(SHIPPED, 10)
    noise = {}
    for size in (16, 128):
        codec = CodecRecord(name=f"int4-g{size}", bits=4, group_size=size, levels="gaussian", scales="e4m3")
        restored: Mapping[str, np.ndarray] = decode(encode(SHIPPED, tensors, codec))
        noise[size] = sum(np.square(wide(array) - wide(restored[name])).sum() for name, array in tensors.items())
    assert noise[16] < noise[128]
