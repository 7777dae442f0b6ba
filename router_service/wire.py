"""The Tensor message and arrays. Sizes are checked exactly, in Python's unbounded integers, before a byte is allocated.

Torch is imported only when a torch tensor is asked for. Little-endian, row-major, no padding.
An array made from a message is a view of the message's bytes; unless they are a bytearray of one's own, nobody may write into it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NoReturn

import ml_dtypes
import numpy as np
import numpy.typing as npt

from cluster.core.descriptors import DType
from cluster.core.errors import InvalidRequest
from protos.moelastic.router.v1 import router_pb2 as pb

if TYPE_CHECKING:
    import torch

BF16: Final = np.dtype(ml_dtypes.bfloat16)
_NUMPY: Final[dict[int, np.dtype[Any]]] = {
    pb.D_TYPE_BF16: BF16,
    pb.D_TYPE_FP16: np.dtype("<f2"),
    pb.D_TYPE_FP32: np.dtype("<f4"),
    pb.D_TYPE_INT32: np.dtype("<i4"),
    pb.D_TYPE_UINT32: np.dtype("<u4"),
    pb.D_TYPE_UINT8: np.dtype("u1"),
}
_TORCH_NAMES: Final[dict[int, str]] = {
    pb.D_TYPE_BF16: "bfloat16",
    pb.D_TYPE_FP16: "float16",
    pb.D_TYPE_FP32: "float32",
    pb.D_TYPE_INT32: "int32",
    pb.D_TYPE_UINT32: "uint32",
    pb.D_TYPE_UINT8: "uint8",
}
_BY_NUMPY: Final = {dtype: code for code, dtype in _NUMPY.items()}
_BY_TORCH_NAME: Final = {name: code for code, name in _TORCH_NAMES.items()}
_FLOATS: Final = {DType.BF16: pb.D_TYPE_BF16, DType.FP16: pb.D_TYPE_FP16, DType.FP32: pb.D_TYPE_FP32}
_BY_FLOAT: Final[dict[int, DType]] = {code: dtype for dtype, code in _FLOATS.items()}
SIZE_KEY: Final = "moelastic-message-bytes"  # metadata: the bytes of all messages of a call, declared by the caller before the first is read
MAX_DIM: Final = (1 << 31) - 1
CHUNK_BYTES: Final = 1 << 20
PLAN_BYTES_PER_CHOICE: Final = 18
Buffer = bytes | bytearray | memoryview

if sys.byteorder != "little":  # pragma: no cover
    MESSAGE = "moelastic's wire format is little-endian and this machine is not; it is not supported here"
    raise ImportError(MESSAGE)


@dataclass(frozen=True, slots=True)
class Layout:
    """A checked element type and shape: what `num_bytes` of data mean."""

    dtype: int
    shape: tuple[int, ...]
    num_bytes: int


def dtype_name(code: int) -> str:
    """The element type's name for people: bf16, int32, ..."""
    return pb.DType.Name(code).removeprefix("D_TYPE_").lower() if code in pb.DType.values() else f"dtype {code}"


def dtype_code(dtype: DType) -> pb.DType:
    """The wire's code of a float type."""
    return _FLOATS[dtype]


def float_dtype(code: int) -> DType:
    """The float type of a wire code; KeyError for an integer type."""
    return _BY_FLOAT[code]


def check_layout(message: pb.Tensor, field: str, *, axes: str, dtypes: Collection[int], max_bytes: int) -> Layout:
    """Check type, rank and size of a tensor before its bytes exist. `axes` names the dimensions, as in `T,D`. Raises InvalidRequest."""
    if message.dtype not in dtypes:
        wanted = ", ".join(dtype_name(code) for code in dtypes)
        refuse(f"{field}.dtype", f"{field}.dtype is {dtype_name(message.dtype)}; accepted here: {wanted}")
    names = axes.split(",")
    if len(message.shape) != len(names):
        refuse(f"{field}.shape", f"{field}.shape has {len(message.shape)} dimensions where [{axes}] has {len(names)}; flatten or add one")
    num_bytes = _NUMPY[message.dtype].itemsize
    for name, dim in zip(names, message.shape, strict=True):
        if not 1 <= dim <= MAX_DIM:
            refuse(f"{field}.shape", f"{field}.shape: {name} must be between 1 and {MAX_DIM}")
        num_bytes *= dim
    if num_bytes > max_bytes:
        refuse(f"{field}.shape", f"{field}.shape needs {num_bytes} bytes, over the limit of {max_bytes}; send fewer tokens at once")
    return Layout(message.dtype, tuple(message.shape), num_bytes)


def check_tensor(message: pb.Tensor, field: str, *, axes: str, dtypes: Collection[int], max_bytes: int) -> Layout:
    """Check a tensor with its data: as `check_layout`, and the shape must need exactly the bytes that came. Raises InvalidRequest."""
    layout = check_layout(message, field, axes=axes, dtypes=dtypes, max_bytes=max_bytes)
    if layout.num_bytes != len(message.data):
        text = f"{field}.shape needs {layout.num_bytes} bytes of {dtype_name(layout.dtype)} and {field}.data has {len(message.data)}; they must be equal"
        refuse(f"{field}.data", text)
    return layout


def refuse(field: str, message: str) -> NoReturn:
    """Raise InvalidRequest for a field of the request."""
    raise InvalidRequest(message, field=field)


def numpy_view(layout: Layout, data: Buffer) -> npt.NDArray[Any]:
    """An array over checked bytes, without a copy; bf16 as ml_dtypes.bfloat16."""
    return np.frombuffer(data, dtype=_NUMPY[layout.dtype]).reshape(layout.shape)


def torch_view(layout: Layout, data: Buffer) -> torch.Tensor:
    """A tensor over checked bytes, without a copy."""
    library = _torch()
    flat: torch.Tensor = library.frombuffer(data, dtype=getattr(library, _TORCH_NAMES[layout.dtype]))
    return flat.reshape(layout.shape)


@cache
def _torch() -> Any:  # noqa: ANN401  (a module)
    import torch

    with warnings.catch_warnings():
        # Said once per process: the buffer is read-only. It is meant to be; see the module's first lines.
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)
    return torch


def is_torch(value: object) -> bool:
    """Whether a value is a torch tensor, without importing torch."""
    library = sys.modules.get("torch")
    return library is not None and isinstance(value, library.Tensor)


def code_of_array(array: npt.NDArray[Any] | torch.Tensor, field: str) -> int:
    """The wire's element type of an array or tensor. Raises InvalidRequest for one that has none."""
    found = _BY_TORCH_NAME.get(str(array.dtype).removeprefix("torch.")) if is_torch(array) else _BY_NUMPY.get(np.dtype(array.dtype))  # type: ignore[arg-type]
    if found is None:
        refuse(field, f"{field} has element type {array.dtype}; bf16, fp16 and fp32 go over the wire")
    return found


def data_of(array: npt.NDArray[Any] | torch.Tensor) -> memoryview:
    """The bytes of an array or tensor, row-major, copied only when it is strided or not in host memory."""
    if is_torch(array):
        tensor: torch.Tensor = array.detach().cpu().contiguous()  # type: ignore[union-attr]
        flat: npt.NDArray[np.uint8] = tensor.reshape(-1).view(_torch().uint8).numpy()
    else:
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return flat.data


def tensor_message(array: npt.NDArray[Any] | torch.Tensor, field: str = "tensor", *, with_data: bool = True) -> pb.Tensor:
    """A Tensor message of an array or torch tensor; without data where the bytes travel in chunks."""
    data = bytes(data_of(array)) if with_data else b""
    return pb.Tensor(dtype=code_of_array(array, field), shape=list(array.shape), data=data)  # type: ignore[arg-type]
