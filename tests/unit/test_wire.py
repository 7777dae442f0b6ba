from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.errors import InvalidRequest
from protos.moelastic.router.v1 import router_pb2 as pb
from router_service.wire import BF16, Layout, check_layout, check_tensor, data_of, dtype_name, numpy_view, tensor_message, torch_view

FLOATS = (pb.D_TYPE_BF16, pb.D_TYPE_FP32)
NUMPY_DTYPES = [BF16, np.float16, np.float32, np.int32, np.uint32, np.uint8]
TORCH_DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.uint32, torch.uint8]


def layout_of(message: pb.Tensor) -> Layout:
    return check_tensor(message, "x", axes=",".join("ABCD"[: len(message.shape)]), dtypes=pb.DType.values()[1:], max_bytes=1 << 20)


@pytest.mark.parametrize("dtype", NUMPY_DTYPES, ids=str)
def test_numpy_survives_the_wire_bit_by_bit(dtype: np.dtype) -> None:
    array = np.frombuffer(np.random.default_rng(1).bytes(3 * 5 * np.dtype(dtype).itemsize), dtype=dtype).reshape(3, 5)
    message = pb.Tensor.FromString(tensor_message(array).SerializeToString())
    back = numpy_view(layout_of(message), message.data)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_torch_survives_the_wire_bit_by_bit(dtype: torch.dtype) -> None:
    bits = torch.randint(0, 256, (4, 6 * dtype.itemsize), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tensor = bits.view(dtype)
    message = tensor_message(tensor)
    back = torch_view(layout_of(message), message.data)
    assert back.dtype is dtype
    assert torch.equal(back.view(torch.uint8), bits)


def test_numpy_and_torch_write_the_same_bytes() -> None:
    tensor = torch.randn(7, 3).bfloat16()
    array = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    assert tensor_message(tensor) == tensor_message(array)


def test_strided_arrays_are_written_row_major() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::3]
    assert bytes(data_of(array)) == array.copy().tobytes()
    assert bytes(data_of(torch.from_numpy(array.copy()).t())) == array.T.copy().tobytes()


def test_a_view_of_a_message_does_not_copy() -> None:
    body = bytearray(np.ones((2, 2), np.float32).tobytes())
    layout = Layout(pb.D_TYPE_FP32, (2, 2), 16)
    array, tensor = numpy_view(layout, body), torch_view(layout, body)
    array[0, 0] = 5
    assert tensor[0, 0] == 5


@pytest.mark.parametrize(
    ("shape", "data_bytes"),
    [
        ((2, 3), 23),
        ((2, 3), 25),
        ((2, 3), 0),
        ((1 << 20, 1 << 20), 24),
        ((1 << 31, 1), 24),
        ((0, 3), 0),
        ((3, 0), 0),
        ((-1, -6), 24),
        ((-2, 3), 24),
        ((6,), 24),
    ],
)
def test_a_shape_that_disagrees_with_its_bytes_is_refused_by_name(shape: tuple[int, ...], data_bytes: int) -> None:
    message = pb.Tensor(dtype=pb.D_TYPE_FP32, shape=shape, data=bytes(data_bytes))
    with pytest.raises(InvalidRequest) as caught:
        check_tensor(message, "hidden_states", axes="T,D", dtypes=FLOATS, max_bytes=1 << 20)
    assert caught.value.field.startswith("hidden_states.")
    assert "hidden_states" in str(caught.value)


def test_two_to_the_forty_elements_are_refused_before_any_allocation() -> None:
    message = pb.Tensor(dtype=pb.D_TYPE_FP32, shape=(1 << 20, 1 << 20))
    with pytest.raises(InvalidRequest, match=r"needs 4398046511104 bytes, over the limit of 1024"):
        check_layout(message, "hidden_states", axes="T,D", dtypes=FLOATS, max_bytes=1024)


@pytest.mark.parametrize("dtype", [0, pb.D_TYPE_INT32, 99, -3])
def test_an_element_type_that_is_not_accepted_is_refused(dtype: int) -> None:
    message = pb.Tensor(dtype=dtype, shape=(1, 1), data=bytes(4))
    with pytest.raises(InvalidRequest, match="accepted here: bf16, fp32") as caught:
        check_tensor(message, "hidden_states", axes="T,D", dtypes=FLOATS, max_bytes=1024)
    assert caught.value.field == "hidden_states.dtype"


@given(shape=st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=6), num_bytes=st.integers(0, 64), dtype=st.integers(-1, 9))
def test_only_tensors_that_tell_the_truth_pass(shape: list[int], num_bytes: int, dtype: int) -> None:
    message = pb.Tensor(dtype=dtype, shape=shape, data=bytes(num_bytes))
    try:
        layout = check_tensor(message, "x", axes="T,D", dtypes=FLOATS, max_bytes=64)
    except InvalidRequest:
        return
    itemsize = 2 if dtype == pb.D_TYPE_BF16 else 4
    assert len(shape) == 2
    assert math.prod(shape) * itemsize == layout.num_bytes == num_bytes


def test_numbers_without_a_wire_type_are_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="hidden_states has element type float64"):
        tensor_message(np.zeros((1, 1)), "hidden_states")
    with pytest.raises(InvalidRequest, match=r"hidden_states has element type torch\.complex64"):
        tensor_message(torch.zeros(1, 1, dtype=torch.complex64), "hidden_states")


def test_an_unknown_code_has_a_name_for_people() -> None:
    assert dtype_name(pb.D_TYPE_BF16) == "bf16"
    assert dtype_name(99) == "dtype 99"
