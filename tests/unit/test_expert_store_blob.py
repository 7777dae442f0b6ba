"""The blob format: equal values give equal bytes, and a header that lies is refused before anything is made of it."""

import json
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.expert_blob import ALIGNMENT, MAGIC, MAX_HEADER_BYTES, canonical_json, decode, digest_of, encode, views
from cluster.core.descriptors import DType, ExpertDescriptor, GateDescriptor
from cluster.core.errors import CheckpointError

EXPERT = ExpertDescriptor(hidden_size=6, intermediate_size=5, bias=True, dtype=DType.FP16)
GATE = GateDescriptor(num_experts=4, top_k=2, correction_bias=True)


def expert_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float16) for name, shape in EXPERT.tensor_shapes().items()}


def gate_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {"weight": rng.standard_normal((4, 6)).astype(ml_dtypes.bfloat16), "correction_bias": rng.standard_normal(4).astype(np.float32)}


def expert_blob() -> bytes:
    return b"".join(encode(EXPERT, expert_tensors()))


@pytest.mark.parametrize(("descriptor", "tensors"), [(EXPERT, expert_tensors()), (GATE, gate_tensors())])
def test_what_is_encoded_is_decoded(descriptor: Any, tensors: dict[str, np.ndarray]) -> None:
    blob = b"".join(encode(descriptor, tensors))
    header = decode(memoryview(blob), "b")
    assert header.descriptor == descriptor
    found = views(memoryview(blob), header)
    assert found.keys() == tensors.keys()
    for name, array in found.items():
        assert array.dtype == tensors[name].dtype
        assert array.tobytes() == tensors[name].tobytes()
        assert header.tensors[name].offset % ALIGNMENT == 0
        assert not array.flags.writeable


def test_the_layout_of_the_bytes_is_as_documented() -> None:
    blob = expert_blob()
    magic, length = struct.unpack_from("<8sI", blob)
    header = json.loads(blob[12 : 12 + length])
    start = -(-(12 + length) // 64) * 64
    assert magic == MAGIC == b"MOELBLB1"
    assert header["kind"] == "expert"
    assert header["descriptor"] == {"hidden_size": 6, "intermediate_size": 5, "bias": True, "dtype": "fp16"}
    assert header["tensors"]["gate_up"] == {"dtype": "fp16", "shape": [10, 6], "offset": 0}
    assert header["tensors"]["down"]["offset"] == 128
    assert blob[start : start + 120] == expert_tensors()["gate_up"].tobytes()
    assert canonical_json(header) == blob[12 : 12 + length]
    assert not any(blob[12 + length : start])


def test_equal_values_give_equal_bytes_and_others_do_not() -> None:
    strided = {name: np.asfortranarray(array) for name, array in expert_tensors().items()}
    assert digest_of(encode(EXPERT, strided)) == digest_of(encode(EXPERT, expert_tensors()))
    assert digest_of(encode(EXPERT, expert_tensors(1))) != digest_of(encode(EXPERT, expert_tensors()))
    assert digest_of(encode(EXPERT.model_copy(update={"activation": "gelu"}), expert_tensors())) != digest_of(encode(EXPERT, expert_tensors()))


def test_a_digest_is_the_same_in_every_release() -> None:
    tensors = {name: np.arange(np.prod(shape)).reshape(shape).astype(np.float16) for name, shape in EXPERT.tensor_shapes().items()}
    assert digest_of(encode(EXPERT, tensors)) == "9c997aa7a431a86f940018fcd3668fe956514724ba82ade28326c48234306c58"


def test_a_type_that_is_not_served_is_not_stored() -> None:
    with pytest.raises(CheckpointError, match="float64"):
        encode(EXPERT, {name: array.astype(np.float64) for name, array in expert_tensors().items()})


def lie(change: Callable[[dict[str, Any]], object]) -> bytes:
    blob = expert_blob()
    (length,) = struct.unpack_from("<I", blob, 8)
    header = json.loads(blob[12 : 12 + length])
    change(header)
    text = canonical_json(header)
    data = blob[-(-(12 + length) // 64) * 64 :]
    return struct.pack("<8sI", MAGIC, len(text)) + text + bytes(-(12 + len(text)) % 64) + data


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header: header["tensors"]["down"].update(offset=64), "overlaps"),
        (lambda header: header["tensors"]["down"].update(offset=63), "wrong field"),
        (lambda header: header["tensors"]["down"].update(offset=1 << 40), "leaves a hole"),
        (lambda header: header["tensors"]["down"].update(offset=-64), "wrong field"),
        (lambda header: header["tensors"]["down_bias"].update(shape=[1 << 40]), "its header describes"),
        (lambda header: header["tensors"]["down_bias"].update(shape=[1 << 40, 1 << 40]), "its header describes"),
        (lambda header: header["tensors"]["down_bias"].update(shape=[6.0]), "wrong field"),
        (lambda header: header["tensors"]["down_bias"].update(shape=[True]), "wrong field"),
        (lambda header: header["tensors"]["down_bias"].update(dtype="int8"), "wrong field"),
        (lambda header: header["tensors"]["gate_up"].update(shape=[6, 10]), "not those of its descriptor"),
        (lambda header: header["tensors"]["gate_up"].update(dtype="bf16"), "not those of its descriptor"),
        (lambda header: header["tensors"].update(up=header["tensors"].pop("gate_up")), "not those of its descriptor"),
        (lambda header: header["descriptor"].update(hidden_size=7), "not those of its descriptor"),
        (lambda header: header["descriptor"].update(bias=False), "not those of its descriptor"),
        (lambda header: header["descriptor"].update(speed=3), "wrong field"),
        (lambda header: header.update(kind="gate"), "wrong field"),
        (lambda header: header.update(tensors=[]), "wrong field"),
        (lambda header: header.pop("descriptor"), "wrong field"),
    ],
)
def test_a_header_that_lies_is_refused_by_name(change: Callable[[dict[str, Any]], object], words: str) -> None:
    with pytest.raises(CheckpointError, match=f"blob b is not valid: .*{words}"):
        decode(memoryview(lie(change)), "b")


def test_a_gate_with_tensors_of_another_kind_is_refused() -> None:
    for tensors in (
        {"weight": np.zeros((4, 6), np.float32)},
        {**gate_tensors(), "bias": np.zeros(4, np.float32)},
        {**gate_tensors(), "weight": np.zeros((5, 6), np.float32)},
    ):
        with pytest.raises(CheckpointError, match="not those of its gate"):
            decode(memoryview(b"".join(encode(GATE, tensors))), "b")


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"MOEL",
        MAGIC + bytes(3),
        b"NOTABLOB" + bytes(100),
        MAGIC + b"\xff\xff\xff\xff" + bytes(100),
        MAGIC + struct.pack("<I", MAX_HEADER_BYTES + 1) + bytes(1 << 17),
    ],
)
def test_what_is_no_blob_is_refused(blob: bytes) -> None:
    with pytest.raises(CheckpointError, match="blob b is not valid"):
        decode(memoryview(blob), "b")


@given(st.integers(0, 20_000), st.binary(min_size=1, max_size=4))
def test_any_damage_is_refused_or_leaves_a_blob_of_the_same_shape(position: int, damage: bytes) -> None:
    blob = bytearray(expert_blob())
    position %= len(blob)
    blob[position : position + len(damage)] = damage
    try:
        header = decode(memoryview(blob), "b")
    except CheckpointError:
        return
    assert views(memoryview(blob), header).keys() == header.tensors.keys()


@given(st.binary(max_size=200))
def test_any_header_text_is_refused(text: bytes) -> None:
    blob = struct.pack("<8sI", MAGIC, len(text)) + text + bytes(256)
    with pytest.raises(CheckpointError):
        decode(memoryview(blob), "b")
