"""Shadows as bytes: an expert's weight matrices in 2, 3, 4 or 8 bits with a scale for each group, as thin factors, or both; or those of a narrow expert.

A weight comes back as level * scale * unit: a whole number of at most 8 bits, a scale of at most 8 bits and a power of two, so the product is exact
and is rounded once, to the expert's element type. Every device and library expands the same bytes to the same bits. (Where scale * unit lies below
2**-126 it is rounded first, as fp32 is there.) A narrow expert comes back with zeros for the inner units that it lacks.
Shape legend: R rows of a matrix, W its columns, G groups of a row, S columns of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from actors.core.compensation import compensated
from actors.core.low_rank import factor_layout, fit_factors, product, rank_of
from actors.core.packing import CODES_PER_UNIT, pack, packed_size, unpack
from actors.core.scales import Grid, fit_scales
from cluster.core.descriptors import CodecRecord, DType, ExpertDescriptor
from cluster.core.errors import CheckpointError

Array = NDArray[Any]
InputRows = Callable[[str, Mapping[str, Array]], Array]

CODECS: Mapping[str, CodecRecord] = {
    record.name: record
    for record in (
        CodecRecord(name="int8", bits=8, levels="integer", scales="bf16"),
        CodecRecord(name="int4", bits=4, group_size=64, levels="half", scales="bf16"),
        CodecRecord(name="int3", bits=3, group_size=64, levels="gaussian", scales="e4m3"),
        CodecRecord(name="int2", bits=2, group_size=64, levels="gaussian", scales="e4m3"),
    )
}
"""The codecs that need nothing but the primary, best first: 50, 26.6, 19.5 and 13.3 % of bf16."""

FITTED_CODECS: Mapping[str, CodecRecord] = {
    record.name: record
    for record in (
        CodecRecord(name="int2-lowrank", bits=2, group_size=64, levels="gaussian", scales="e4m3", rank_percent=3),
        CodecRecord(name="lowrank", bits=0, rank_percent=26),
        CodecRecord(name="narrow4", bits=4, group_size=64, levels="half", scales="bf16", inner_percent=50),
    )
}
"""The codecs whose shadows are fitted to calibration rows, 13 to 15 % of bf16 each: what 2 bits are measured against."""

_NUMPY_DTYPES: Mapping[DType, np.dtype[Any]] = {
    DType.BF16: np.dtype(ml_dtypes.bfloat16),
    DType.FP16: np.dtype(np.float16),
    DType.FP32: np.dtype(np.float32),
}
# Groups expanded at a time, a multiple of the codes of a unit: their fp32 copies stay in the second cache.
_EXPANDED_WEIGHTS = 1 << 16


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """Type and shape of one array of a packed expert."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class PackedExpert:
    """An expert in packed form: what its primary computes, how the matrices are packed, and the arrays named by `packed_layout`."""

    descriptor: ExpertDescriptor
    codec: CodecRecord
    tensors: Mapping[str, Array]

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays, without a blob's header and padding."""
        return sum(array.nbytes for array in self.tensors.values())


def packed_layout(descriptor: ExpertDescriptor, codec: CodecRecord) -> dict[str, PackedTensor]:
    """Every array of a packed expert, in storage order: NAME.codes, NAME.scales and NAME.unit for a matrix, NAME itself for a bias."""
    layout: dict[str, PackedTensor] = {}
    for name, shape in stored_descriptor(descriptor, codec).tensor_shapes().items():
        if len(shape) == 1:
            layout[name] = PackedTensor(_NUMPY_DTYPES[descriptor.dtype], shape)
            continue
        layout |= _matrix_layout(name, (shape[0], shape[1]), codec)
    return layout


def stored_descriptor(descriptor: ExpertDescriptor, codec: CodecRecord) -> ExpertDescriptor:
    """The expert whose matrices are packed: the primary's shape, or the narrow one's."""
    if not codec.inner_percent:
        return descriptor
    return descriptor.model_copy(update={"intermediate_size": max(1, descriptor.intermediate_size * codec.inner_percent // 100)})


def _matrix_layout(name: str, shape: tuple[int, int], codec: CodecRecord) -> dict[str, PackedTensor]:
    rows, width = shape
    layout: dict[str, PackedTensor] = {}
    if codec.bits:
        layout[f"{name}.codes"] = PackedTensor(np.dtype(np.uint8), (packed_size(rows * width, codec.bits),))
        scale_dtype = np.dtype(np.uint8) if codec.scales == "e4m3" else _NUMPY_DTYPES[DType.BF16]
        layout[f"{name}.scales"] = PackedTensor(scale_dtype, (rows, -(-width // _group_size(width, codec))))
        layout[f"{name}.unit"] = PackedTensor(np.dtype(np.float32), (1,))
    if codec.rank_percent:
        layout |= {key: PackedTensor(*place) for key, place in factor_layout(name, shape, rank_of(shape, codec.rank_percent)).items()}
    return layout


def packed_bytes(descriptor: ExpertDescriptor, codec: CodecRecord) -> int:
    """Bytes of a packed expert: known before it is packed."""
    return sum(tensor.num_bytes for tensor in packed_layout(descriptor, codec).values())


def encode(descriptor: ExpertDescriptor, tensors: Mapping[str, Array], codec: CodecRecord, inputs: InputRows | None = None) -> PackedExpert:
    """Pack an expert given in compute layout.

    Args:
        descriptor: what the expert computes.
        tensors: its tensors, by the names and shapes of `stored_descriptor`: those of a narrow expert come ready from whoever trained it.
        codec: how to pack the matrices.
        inputs: for a matrix's name, and the matrices before it as they come back, the calibration rows [N, W] that reach it; where they are given,
            rounding errors are compensated for these rows, which halves the damage of low-bit codecs. None: each weight is rounded to the nearest.

    Equal arguments give equal bytes; with `inputs` on one machine only, as linear algebra libraries differ in the last bits.
    Raises CheckpointError when a tensor is missing, has another shape or is not finite.
    """
    packed: dict[str, Array] = {}
    restored: dict[str, Array] = {}
    for name, shape in stored_descriptor(descriptor, codec).tensor_shapes().items():
        weights = _checked(name, tensors, shape)
        if len(shape) == 1:
            packed[name] = restored[name] = np.array(weights, _NUMPY_DTYPES[descriptor.dtype])
            continue
        rows = None if inputs is None else _checked_rows(name, inputs(name, restored), shape[1])
        packed |= _encode_matrix(name, weights, descriptor.dtype, codec, rows)
        restored[name] = _decode_matrix(name, packed, shape, descriptor.dtype, codec)
    return PackedExpert(descriptor, codec, packed)


def decode(packed: PackedExpert) -> dict[str, Array]:
    """The expert's tensors in compute layout and its own element type, in fresh memory. Raises CheckpointError when an array is not as `packed_layout` says."""
    for name, wanted in packed_layout(packed.descriptor, packed.codec).items():
        array = packed.tensors.get(name)
        if array is None or array.dtype != wanted.dtype or array.shape != wanted.shape:
            found = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
            message = f"shadow ({packed.codec.name}): {name} is {found} where {wanted.dtype} {list(wanted.shape)} belongs; derive the shadow again"
            raise CheckpointError(message)
    stored = stored_descriptor(packed.descriptor, packed.codec)
    tensors = {
        name: np.array(packed.tensors[name]) if len(shape) == 1 else _decode_matrix(name, packed.tensors, shape, packed.descriptor.dtype, packed.codec)
        for name, shape in stored.tensor_shapes().items()
    }
    return tensors if stored == packed.descriptor else _widened(packed.descriptor, stored, tensors)


def _widened(descriptor: ExpertDescriptor, stored: ExpertDescriptor, tensors: dict[str, Array]) -> dict[str, Array]:
    """A narrow expert in its primary's shape: inner units of zeros, whose activation is 0, change no output."""
    parts = 2 if descriptor.gated else 1
    missing = descriptor.intermediate_size - stored.intermediate_size
    wide: dict[str, Array] = {}
    for name, tensor in tensors.items():
        if name.startswith("down"):
            wide[name] = tensor if tensor.ndim == 1 else np.pad(tensor, ((0, 0), (0, missing)))
            continue
        halves = tensor.reshape(parts, stored.intermediate_size, *tensor.shape[1:])
        padding = ((0, 0), (0, missing), *((0, 0),) * (tensor.ndim - 1))
        wide[name] = np.pad(halves, padding).reshape(parts * descriptor.intermediate_size, *tensor.shape[1:])
    return wide


def _encode_matrix(name: str, weights: Array, dtype: DType, codec: CodecRecord, rows: Array | None) -> dict[str, Array]:
    packed = _encode_codes(name, weights, dtype, codec, rows) if codec.bits else {}
    if codec.rank_percent:
        rest_RW = weights.astype(np.float64)
        if codec.bits:
            rest_RW -= _decode_codes(name, packed, weights.shape, DType.FP32, codec)
        packed |= fit_factors(name, rest_RW, rank_of((weights.shape[0], weights.shape[1]), codec.rank_percent), rows)
    return packed


def _encode_codes(name: str, weights: Array, dtype: DType, codec: CodecRecord, rows: Array | None) -> dict[str, Array]:
    weights_RW = weights.astype(np.float32)
    unit = _unit(weights_RW, Grid(codec))
    grid = Grid(codec, limit=float(ml_dtypes.finfo(_NUMPY_DTYPES[dtype]).max) / float(unit))
    weights_RW /= unit
    size = _group_size(weights.shape[1], codec)
    codes_RW, scales_RG = _rounded(weights_RW, grid, size) if rows is None else compensated(weights_RW, rows, grid, size)
    stored_RG = scales_RG.astype(grid.scale_dtype)
    return {
        f"{name}.codes": pack(np.ascontiguousarray(codes_RW).reshape(-1), codec.bits),
        f"{name}.scales": stored_RG.view(np.uint8) if codec.scales == "e4m3" else stored_RG,
        f"{name}.unit": np.array([unit], np.float32),
    }


def _unit(weights_RW: NDArray[np.float32], grid: Grid) -> np.float32:
    """The power of two in which a matrix is measured: its largest magnitude takes the scales to the top of their range."""
    _, exponent = np.frexp(np.abs(weights_RW).max(initial=0.0))
    smallest = int(np.finfo(np.float32).minexp) - int(np.finfo(np.float32).nmant)
    unit: np.float32 = np.ldexp(np.float32(1.0), max(int(exponent) - 1 - grid.headroom_bits, smallest))
    return unit


def _rounded(weights_RW: NDArray[np.float32], grid: Grid, size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    rows, width = weights_RW.shape
    groups = -(-width // size)
    # A short last group is filled up with its own last weight, which hardly moves its scale.
    whole_RW = np.pad(weights_RW, ((0, 0), (0, groups * size - width)), mode="edge")
    weights_NS = whole_RW.reshape(-1, size)
    scales_N = fit_scales(weights_NS, grid)
    codes_NS = grid.codes(weights_NS, scales_N[:, None]).astype(np.uint8)
    return codes_NS.reshape(rows, -1)[:, :width], scales_N.reshape(rows, groups)


def _decode_matrix(name: str, packed: Mapping[str, Array], shape: tuple[int, ...], dtype: DType, codec: CodecRecord) -> Array:
    if not codec.rank_percent:
        return _decode_codes(name, packed, shape, dtype, codec)
    restored = product(name, packed)
    if codec.bits:
        restored += _decode_codes(name, packed, shape, DType.FP32, codec)
    # Factors may lead a little beyond what the element type can hold.
    most = float(ml_dtypes.finfo(_NUMPY_DTYPES[dtype]).max)
    return np.clip(restored, -most, most).astype(_NUMPY_DTYPES[dtype])


def _decode_codes(name: str, packed: Mapping[str, Array], shape: tuple[int, ...], dtype: DType, codec: CodecRecord) -> Array:
    rows, width = shape
    size = _group_size(width, codec)
    scales_RG = _scales(packed[f"{name}.scales"]) * packed[f"{name}.unit"]
    codes = packed[f"{name}.codes"]
    restored = np.empty(shape, _NUMPY_DTYPES[dtype])
    if width % size:
        levels_RW = unpack(codes, codec.bits, codec.levels)[: rows * width].reshape(shape)
        restored[:] = levels_RW * np.repeat(scales_RG, size, axis=1)[:, :width]
        return restored
    flat_NS, scales_N1 = restored.reshape(-1, size), scales_RG.reshape(-1, 1)
    for groups, units in _spans(len(flat_NS), size):
        levels = unpack(codes[units.start * codec.bits : units.stop * codec.bits], codec.bits, codec.levels)
        levels_NS = levels[: (groups.stop - groups.start) * size].reshape(-1, size)
        levels_NS *= scales_N1[groups]
        flat_NS[groups] = levels_NS
    return restored


def _spans(num_groups: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Groups that are expanded together, and the units of codes that hold them; all but the last fill their units."""
    step = -(-_EXPANDED_WEIGHTS // size // CODES_PER_UNIT) * CODES_PER_UNIT
    for begin in range(0, num_groups, step):
        end = min(begin + step, num_groups)
        yield slice(begin, end), slice(begin * size // CODES_PER_UNIT, -(-end * size // CODES_PER_UNIT))


def _scales(stored: Array) -> NDArray[np.float32]:
    typed = stored.view(ml_dtypes.float8_e4m3fn) if stored.dtype == np.uint8 else stored
    return typed.astype(np.float32)


def _group_size(width: int, codec: CodecRecord) -> int:
    """Columns of a group: a row is divided into equal groups as far as it can be, none larger than the codec's."""
    groups = -(-width // (codec.group_size or width))
    return -(-width // groups)


def _checked(name: str, tensors: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    array = tensors.get(name)
    if array is None or array.shape != shape:
        message = f"expert tensor {name} is {'missing' if array is None else list(array.shape)} where {list(shape)} belongs; import the model again"
        raise CheckpointError(message)
    if not np.isfinite(array.astype(np.float32)).all():
        message = f"expert tensor {name} holds NaN or infinity, so no shadow can stand for it; import the model again"
        raise CheckpointError(message)
    return array


def _checked_rows(name: str, rows: Array, width: int) -> Array:
    if rows.ndim != 2 or rows.shape[1] != width or not np.isfinite(rows.astype(np.float32)).all():  # noqa: PLR2004  (a matrix)
        message = f"calibration rows for {name} must be finite, of shape [rows, {width}]; they are of shape {list(rows.shape)}"
        raise CheckpointError(message)
    return rows
