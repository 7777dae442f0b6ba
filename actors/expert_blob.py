"""One expert, gate, shadow or dense fallback as bytes: the file that the store keeps, whose SHA-256 is the expert's version.

    magic "MOELBLB1" | header length u32 | header | zeros to 64 | tensors, each at a multiple of 64 from the first      little-endian, row-major
    header   canonical JSON {kind, descriptor, tensors: {name: {dtype, shape, offset}}}; offsets count from the first tensor
    shadow   the same with its expert's descriptor, and {codec, primary}: how it is packed, and the SHA-256 of the expert that it stands for

Fields of a descriptor that have their default are left out, so that a field added later changes no digest.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from actors.core.codecs import PackedExpert, packed_layout
from cluster.core.descriptors import CodecRecord, DenseDescriptor, ExpertDescriptor, GateDescriptor
from cluster.core.errors import CheckpointError
from cluster.registry.convert import NUMPY_DTYPES, gate_shapes

MAGIC = b"MOELBLB1"
ALIGNMENT = 64
# A descriptor and at most eight tensors need under 2 KB.
MAX_HEADER_BYTES = 64 << 10
_PREFIX = struct.Struct("<8sI")

Array = NDArray[Any]
Kind = Literal["expert", "gate", "shadow", "dense"]
Descriptor = ExpertDescriptor | GateDescriptor | DenseDescriptor
Places = dict[str, dict[str, Any]]

_DESCRIPTORS: Mapping[str, type[Descriptor]] = {"expert": ExpertDescriptor, "gate": GateDescriptor, "dense": DenseDescriptor, "shadow": ExpertDescriptor}

# Bytes are the codes and small scales of shadows; no other kind may hold them.
_BYTES = np.dtype(np.uint8)
_STORED_DTYPES: Mapping[str, np.dtype[Any]] = {**{dtype.value: known for dtype, known in NUMPY_DTYPES.items()}, "u8": _BYTES}
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor lies: `offset` in the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class BlobHeader:
    """What a blob says of itself, checked. Only a shadow has a codec and a primary."""

    kind: Kind
    descriptor: Descriptor
    tensors: dict[str, TensorPlace]
    codec: CodecRecord | None = None
    primary: str = ""


def encode(descriptor: Descriptor, tensors: Mapping[str, Array]) -> tuple[bytes | memoryview, ...]:
    """The parts of a blob, to be written one after the other. The tensors must be of served float types; they are not copied when contiguous."""
    kind = next(kind for kind, known in _DESCRIPTORS.items() if isinstance(descriptor, known))
    for tensor in tensors.values():
        if tensor.dtype == _BYTES:
            raise _cannot_store(tensor)
    return _encode({"kind": kind, "descriptor": _written(descriptor)}, tensors)


def encode_shadow(packed: PackedExpert, primary: str) -> tuple[bytes | memoryview, ...]:
    """The parts of a shadow's blob; `primary` is the SHA-256 in hex of the expert that it was packed from."""
    header = {"kind": "shadow", "descriptor": _written(packed.descriptor), "codec": _written(packed.codec), "primary": primary}
    return _encode(header, packed.tensors)


def _encode(header: dict[str, Any], tensors: Mapping[str, Array]) -> tuple[bytes | memoryview, ...]:
    places: Places = {}
    parts: list[bytes | memoryview] = []
    end = 0
    for name, tensor in tensors.items():
        offset = _aligned(end)
        places[name] = {"dtype": _name_of(tensor), "shape": list(tensor.shape), "offset": offset}
        parts += [bytes(offset - end), np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data]
        end = offset + tensor.nbytes
    text = canonical_json({**header, "tensors": places})
    before = _PREFIX.size + len(text)
    return (_PREFIX.pack(MAGIC, len(text)), text, bytes(_aligned(before) - before), *parts)


def _written(record: Descriptor | CodecRecord) -> dict[str, Any]:
    return record.model_dump(mode="json", exclude_defaults=True)


def digest_of(parts: Sequence[bytes | memoryview]) -> str:
    """SHA-256 of a blob in hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys and without spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def decode(blob: memoryview, name: str) -> BlobHeader:
    """The checked header of a blob. Raises CheckpointError, saying what `name` gets wrong; nothing is allocated by what the header claims."""
    if len(blob) < _PREFIX.size:
        raise _lies(name, "it is shorter than a header")
    magic, length = _PREFIX.unpack_from(blob)
    if magic != MAGIC:
        raise _lies(name, "it is not a moelastic blob")
    if length > MAX_HEADER_BYTES or _PREFIX.size + length > len(blob):
        raise _lies(name, f"its header of {length} bytes does not fit (limit {MAX_HEADER_BYTES}, file {len(blob)})")
    header = _parse(bytes(blob[_PREFIX.size : _PREFIX.size + length]), name)
    try:
        kind = _kind(header["kind"])
        descriptor = _DESCRIPTORS[kind].model_validate(header["descriptor"])
        codec = CodecRecord.model_validate(header["codec"]) if kind == "shadow" else None
        primary = _digest(header["primary"]) if kind == "shadow" else ""
        start = _aligned(_PREFIX.size + length)
        tensors = {key: _place(place, start) for key, place in header["tensors"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
        raise _lies(name, "its header has a wrong field") from error
    _check_places(name, tensors, start, len(blob))
    _check_shapes(name, descriptor, codec, tensors)
    return BlobHeader(kind, descriptor, tensors, codec, primary)


def views(blob: memoryview, header: BlobHeader) -> dict[str, Array]:
    """Read-only arrays over the blob's bytes."""
    return dict(_views(blob, header))


def _views(blob: memoryview, header: BlobHeader) -> Iterator[tuple[str, Array]]:
    for name, spot in header.tensors.items():
        array = np.frombuffer(blob, spot.dtype, math.prod(spot.shape), spot.offset).reshape(spot.shape)
        array.flags.writeable = False
        yield name, array


def _parse(text: bytes, name: str) -> Any:  # noqa: ANN401  # JSON; every field is checked by the caller
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _lies(name, "its header is not JSON") from error


def _kind(text: object) -> Kind:
    for kind in get_args(Kind):
        if text == kind:
            return kind  # type: ignore[no-any-return]  # get_args is not typed
    message = "kind"
    raise ValueError(message)


def _digest(text: str) -> str:
    if not _DIGEST.fullmatch(text):
        message = "primary"
        raise ValueError(message)
    return text


def _place(place: Mapping[str, Any], start: int) -> TensorPlace:
    shape, offset = tuple(place["shape"]), place["offset"]
    if not all(type(value) is int and value >= 0 for value in (*shape, offset)) or offset % ALIGNMENT:
        message = "place"
        raise ValueError(message)
    return TensorPlace(_STORED_DTYPES[place["dtype"]], shape, start + offset)


def _check_places(name: str, tensors: Mapping[str, TensorPlace], start: int, size: int) -> None:
    """Tensors follow on one another with less than one alignment between them, to the last byte."""
    end = start
    for key, spot in sorted(tensors.items(), key=lambda item: item[1].offset):
        if spot.offset != _aligned(end):
            raise _lies(name, f"{key} overlaps another tensor or leaves a hole")
        end = spot.offset + spot.num_bytes
    if end != size:
        raise _lies(name, f"its header describes {end} bytes, the file has {size}")


def _check_shapes(name: str, descriptor: Descriptor, codec: CodecRecord | None, tensors: Mapping[str, TensorPlace]) -> None:
    have = {key: spot.shape for key, spot in tensors.items()}
    if not isinstance(descriptor, GateDescriptor):
        wanted_tensors = _expert_tensors(descriptor, codec)
        if {key: (spot.dtype, spot.shape) for key, spot in tensors.items()} != wanted_tensors:
            raise _lies(name, "its tensors are not those of its descriptor")
        return
    if any(spot.dtype == _BYTES for spot in tensors.values()):
        raise _lies(name, "a gate has no tensors of bytes")
    width = next((shape[-1] for key, shape in have.items() if key in ("weight", "fc1_weight") and shape), 0)
    wanted = gate_shapes(descriptor, width)
    fits = have.keys() == wanted.keys() and all(
        len(have[key]) == len(shape) and all(want in (None, dim) for want, dim in zip(shape, have[key], strict=True)) for key, shape in wanted.items()
    )
    if not fits:
        raise _lies(name, "its tensors are not those of its gate")


def _expert_tensors(descriptor: ExpertDescriptor | DenseDescriptor, codec: CodecRecord | None) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    if codec is None or isinstance(descriptor, DenseDescriptor):
        return {key: (NUMPY_DTYPES[descriptor.dtype], shape) for key, shape in descriptor.tensor_shapes().items()}
    return {key: (tensor.dtype, tensor.shape) for key, tensor in packed_layout(descriptor, codec).items()}


def _name_of(tensor: Array) -> str:
    for name, known in _STORED_DTYPES.items():
        if tensor.dtype == known:
            return name
    raise _cannot_store(tensor)


def _cannot_store(tensor: Array) -> CheckpointError:
    return CheckpointError(f"a tensor of type {tensor.dtype} cannot be stored; one of {', '.join(NUMPY_DTYPES)} is needed")


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _lies(name: str, what: str) -> CheckpointError:
    return CheckpointError(f"blob {name} is not valid: {what}; import the model again")
