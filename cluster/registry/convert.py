"""From a checkpoint's tensors to the compute layout: one expert or one gate at a time, torch-free.

Shape legend: D model width, F expert width, E experts, H inner width of an MLP gate, P positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from cluster.core.descriptors import DType, ExpertDescriptor, GateDescriptor
from cluster.core.errors import CheckpointError
from cluster.registry.families import Layout
from cluster.registry.quantised import FP8_BLOCK, MXFP4_BLOCK, expand_fp8, expand_mxfp4
from cluster.registry.tensor_files import Array, TensorFiles

NUMPY_DTYPES: Mapping[DType, np.dtype[Any]] = {
    DType.BF16: np.dtype(ml_dtypes.bfloat16),
    DType.FP16: np.dtype("<f2"),
    DType.FP32: np.dtype("<f4"),
}
_STORED = {"BF16": DType.BF16, "F16": DType.FP16, "F32": DType.FP32}
_SCALE_SUFFIX = "_scale_inv"

# A free dimension of a gate tensor: whatever the checkpoint holds.
_ANY = None
Shape = tuple[int | None, ...]


def as_dtype(array: Array, dtype: DType, key: str) -> Array:
    """The array in another float type, rounded to nearest even. Raises CheckpointError when a finite value leaves the range of fp16."""
    target = NUMPY_DTYPES[dtype]
    if array.dtype == target:
        return array
    wide = array if array.dtype == np.float32 else array.astype(np.float32)
    with np.errstate(over="ignore"):
        narrow = wide.astype(target)
    if dtype is DType.FP16 and (np.isinf(narrow) & np.isfinite(wide)).any():
        message = f"{key} holds values beyond fp16; serve it as bf16 or fp32"
        raise CheckpointError(message)
    return narrow


class ExpertReader:
    """Reads experts of one checkpoint in one layout; every key and shape is known before a byte is read."""

    def __init__(self, files: TensorFiles, layout: Layout, *, fp8: bool) -> None:
        """`fp8`: weights may be E4M3 with a `<key>_scale_inv` beside them."""
        self._files = files
        self._layout = layout
        self._fp8 = fp8

    def check(self, layer: int, index: int, num_experts: int, expert: ExpertDescriptor) -> None:
        """That every tensor of an expert is there in the right shape and in a type that is served. Raises CheckpointError, naming the tensor."""
        for pattern, shape in self._wanted(expert):
            key = pattern.format(layer=layer, expert=index)
            stored = tuple(reversed(shape)) if self._layout.transposed else shape
            lead = (num_experts,) if self._layout.fused else ()
            if self._layout.mxfp4 and len(shape) > 1:
                out, width = shape
                self._expect(f"{key}_blocks", (*lead, out, width // MXFP4_BLOCK, MXFP4_BLOCK // 2), ("U8",))
                self._expect(f"{key}_scales", (*lead, out, width // MXFP4_BLOCK), ("U8", "F8_E8M0"))
            elif self._fp8 and len(shape) > 1 and self._files.entry(key).dtype == "F8_E4M3":
                self._expect(key, (*lead, *stored), ("F8_E4M3",))
                self._expect(key + _SCALE_SUFFIX, (*lead, *(-(-dim // FP8_BLOCK) for dim in stored)), ("F32",))
            else:
                self._expect(key, (*lead, *stored), tuple(_STORED))

    def read(self, layer: int, index: int, expert: ExpertDescriptor) -> dict[str, Array]:
        """An expert in compute layout, in the checkpoint's own float type (bf16 where it was quantised)."""
        at = {"layer": layer, "expert": index}
        layout = self._layout
        tensors: dict[str, Array] = {}
        if layout.gate_up is not None:
            tensors["gate_up"] = self._halves(self._weight(layout.gate_up.format(**at), index))
        elif layout.gate is not None and layout.up is not None and expert.gated:
            pair = [self._weight(key.format(**at), index) for key in (layout.gate, layout.up)]
            tensors["gate_up"] = np.concatenate(pair)
        elif layout.up is not None:
            tensors["up"] = self._weight(layout.up.format(**at), index)
        tensors["down"] = np.ascontiguousarray(self._weight(layout.down.format(**at), index))
        if layout.gate_up_bias is not None and layout.down_bias is not None:
            tensors["gate_up_bias"] = self._halves(self._slice(layout.gate_up_bias.format(**at), index))
            tensors["down_bias"] = self._slice(layout.down_bias.format(**at), index)
        return tensors

    def stored_dtype(self, layer: int) -> DType:
        """The float type that this layer's experts are stored in; bf16 where they are quantised."""
        if self._layout.mxfp4:
            return DType.BF16
        return _STORED.get(self._files.entry(self._layout.down.format(layer=layer, expert=0)).dtype, DType.BF16)

    def _wanted(self, expert: ExpertDescriptor) -> Iterable[tuple[str, tuple[int, ...]]]:
        layout, shapes = self._layout, expert.tensor_shapes()
        width, dim = expert.intermediate_size, expert.hidden_size
        patterns = (
            (layout.gate_up, (2 * width, dim)),
            (layout.gate if expert.gated else None, (width, dim)),
            (layout.up, (width, dim)),
            (layout.down, shapes["down"]),
            (layout.gate_up_bias, (2 * width,)),
            (layout.down_bias, (dim,)),
        )
        return ((pattern, shape) for pattern, shape in patterns if pattern is not None)

    def _expect(self, key: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        entry = self._files.entry(key)
        if entry.shape != shape:
            message = f"{key} has shape {list(entry.shape)}, but config.json asks for {list(shape)}"
            raise CheckpointError(message)
        if entry.dtype not in dtypes:
            message = f"{key} is stored as {entry.dtype}; {' or '.join(dtypes)} is needed here"
            raise CheckpointError(message)

    def _weight(self, key: str, index: int) -> Array:
        """One expert's matrix as [out, in]."""
        if self._layout.mxfp4:
            return expand_mxfp4(self._slice(f"{key}_blocks", index), self._slice(f"{key}_scales", index), key)
        weight = self._slice(key, index)
        if self._files.entry(key).dtype == "F8_E4M3":
            weight = expand_fp8(weight, self._slice(key + _SCALE_SUFFIX, index))
        return weight.T if self._layout.transposed else weight

    def _slice(self, key: str, index: int) -> Array:
        return self._files.read(key, index if self._layout.fused else None)

    def _halves(self, gate_up: Array) -> Array:
        """Gate rows first, up rows second, contiguous."""
        return np.concatenate((gate_up[0::2], gate_up[1::2])) if self._layout.interleaved else np.ascontiguousarray(gate_up)


def gate_shapes(gate: GateDescriptor, hidden_size: int) -> dict[str, Shape]:
    """Name and shape of every tensor of a gate; None stands for a dimension that the checkpoint is free to choose."""
    experts = gate.num_experts
    shapes: dict[str, Shape] = {}
    if gate.kind == "mlp_tanh":
        shapes |= {"fc1_weight": (_ANY, hidden_size), "fc1_bias": (_ANY,), "fc2_weight": (experts, _ANY), "fc2_bias": (experts,)}
    else:
        shapes["weight"] = (experts, hidden_size)
    if gate.kind == "position":
        shapes["position_embedding"] = (_ANY, hidden_size)
    if gate.bias:
        shapes["bias"] = (experts,)
    if gate.correction_bias:
        shapes["correction_bias"] = (experts,)
    return shapes


def check_gate(files: TensorFiles, layout: Layout, layer: int, gate: GateDescriptor, hidden_size: int) -> None:
    """That every tensor of a gate is there in a possible shape and type. Raises CheckpointError, naming the tensor."""
    for name, shape in gate_shapes(gate, hidden_size).items():
        entry = files.entry(_gate_key(layout, name, layer))
        fits = len(entry.shape) == len(shape) and all(want in (None, have) for want, have in zip(shape, entry.shape, strict=True))
        if not fits or 0 in entry.shape or entry.dtype not in _STORED:
            wanted = ", ".join("any" if dim is None else str(dim) for dim in shape)
            message = f"{_gate_key(layout, name, layer)} is {entry.dtype} {list(entry.shape)}; a float tensor of shape [{wanted}] is needed"
            raise CheckpointError(message)
    if gate.kind == "mlp_tanh":
        _check_inner_width(files, layout, layer)


def read_gate(files: TensorFiles, layout: Layout, layer: int, gate: GateDescriptor, hidden_size: int) -> dict[str, Array]:
    """A gate's tensors in the float types they are stored in."""
    return {name: files.read(_gate_key(layout, name, layer)) for name in gate_shapes(gate, hidden_size)}


def _check_inner_width(files: TensorFiles, layout: Layout, layer: int) -> None:
    fc1, bias, fc2 = (files.entry(_gate_key(layout, name, layer)).shape for name in ("fc1_weight", "fc1_bias", "fc2_weight"))
    if not fc1[0] == bias[0] == fc2[1]:
        message = f"the gate of layer {layer}: fc1 gives {fc1[0]} values, its bias has {bias[0]}, fc2 takes {fc2[1]}"
        raise CheckpointError(message)


def _gate_key(layout: Layout, name: str, layer: int) -> str:
    return layout.gates[name].format(layer=layer)
