"""What an expert computes, in plain numpy and fp32: to measure shadows where there is no torch. The arithmetic that is served is `actors.expert_layouts`'.

Shape legend: N rows, D model width, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.core.descriptors import ExpertDescriptor

Array = NDArray[Any]
Floats = NDArray[np.float32]

_GELU_TANH_CUBE = 0.044715
_erf = np.vectorize(math.erf, otypes=[np.float32])


def plain_forward(descriptor: ExpertDescriptor, rows_ND: Array, tensors: Mapping[str, Array]) -> Floats:
    """One expert's output [N, D] for rows [N, D], from its tensors in compute layout."""
    # What leaves the range of fp32 becomes infinite, which whoever measures sees.
    hidden_NF = inner_rows(descriptor, rows_ND, tensors)
    with np.errstate(over="ignore", invalid="ignore"):
        return _linear(hidden_NF, tensors, "down")


def inner_rows(descriptor: ExpertDescriptor, rows_ND: Array, tensors: Mapping[str, Array]) -> Floats:
    """The rows [N, F] that reach `down`."""
    first = "gate_up" if descriptor.gated else "up"
    with np.errstate(over="ignore", invalid="ignore"):
        return _activate(_linear(rows_ND.astype(np.float32), tensors, first), descriptor)


def _activate(hidden: Floats, descriptor: ExpertDescriptor) -> Floats:
    if not descriptor.gated:
        return _ACTIVATIONS[descriptor.activation](hidden)
    gate_NF, up_NF = np.split(hidden, 2, axis=1)
    if descriptor.swiglu_limit is None:
        gated_NF: Floats = _ACTIVATIONS[descriptor.activation](gate_NF) * up_NF
        return gated_NF
    limit = np.float32(descriptor.swiglu_limit)
    gate_NF, up_NF = np.minimum(gate_NF, limit), np.clip(up_NF, -limit, limit)
    hidden_NF: Floats = (up_NF + np.float32(descriptor.swiglu_up_offset)) * gate_NF * _sigmoid(gate_NF * np.float32(descriptor.swiglu_alpha))
    return hidden_NF


def _linear(x: Floats, tensors: Mapping[str, Array], name: str) -> Floats:
    output: Floats = x @ tensors[name].astype(np.float32).T
    bias = tensors.get(f"{name}_bias")
    if bias is not None:
        output += bias.astype(np.float32)
    return output


def _sigmoid(x: Floats) -> Floats:
    shares: Floats = (np.tanh(x * np.float32(0.5)) + np.float32(1.0)) * np.float32(0.5)
    return shares


def _gelu(x: Floats) -> Floats:
    widths: Floats = _erf(x * np.float32(math.sqrt(0.5)))
    return np.float32(0.5) * x * (np.float32(1.0) + widths)


def _gelu_tanh(x: Floats) -> Floats:
    inner: Floats = (np.float32(math.sqrt(2.0 / math.pi)) * (x + np.float32(_GELU_TANH_CUBE) * x * x * x)).astype(np.float32)
    return x * np.float32(0.5) * (np.tanh(inner) + np.float32(1.0)).astype(np.float32)


def _relu(x: Floats) -> Floats:
    return np.maximum(x, np.float32(0.0))


_ACTIVATIONS: Mapping[str, Callable[[Floats], Floats]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": lambda x: np.square(_relu(x)),
}
