"""What an expert computes: the one definition of the arithmetic, for actors, twin and replay alike.

Every step is taken in the model's element type, as transformers' eager experts take it.
Shape legend: T rows of one expert, N rows of a frame, D model width, F expert width, G segments of a frame, P places of a slab.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, grouped_mm, linear, relu, silu

from actors.blob_files import StoredBlob
from actors.core.abft import BlockSums
from actors.core.codecs import PackedExpert, decode
from actors.core.magnitude import Reach
from actors.expert_blob import Array
from actors.expert_slabs import SlabPlace, Slabs
from actors.packed_matrix import multiply_packed, pack
from actors.product_watch import current_watcher
from cluster.core.descriptors import DType, ExpertDescriptor
from cluster.core.errors import CheckpointError

TORCH_DTYPES: Mapping[DType, torch.dtype] = {DType.BF16: torch.bfloat16, DType.FP16: torch.float16, DType.FP32: torch.float32}

Multiply = Callable[[Tensor, Tensor], Tensor]
"""Rows [T, I] times a matrix [O, I]: [T, O]."""

_SLABS = Slabs()
# torch's grouped matmul wants every row and column stride to be a multiple of 16 bytes, and Ampere or newer.
_GROUPED_ALIGNMENT_BYTES = 16
_GROUPED_CAPABILITY = (8, 0)


# Compared by identity, and weakly referable: its slab place is free again when it is gone.
@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """One expert ready to compute. `private_bytes` are those that this process alone holds; weights mapped from the store have none.

    `checksums` of its matrices, `digests` of all tensors and the `reach` of its outputs (one, or none while it is not known) are taken when it is loaded,
    by whoever checks them later. `packed` are matrices that products use in the place of those in `tensors`, with the same bits.
    """

    descriptor: ExpertDescriptor
    tensors: dict[str, Tensor]
    num_bytes: int
    private_bytes: int
    place: SlabPlace | None = None
    checksums: dict[str, BlockSums] = field(default_factory=dict)
    digests: dict[str, Tensor] = field(default_factory=dict)
    reach: list[Reach] = field(default_factory=list)
    packed: dict[str, Tensor] = field(default_factory=dict)


def with_packed(weights: ExpertWeights) -> ExpertWeights:
    """The same expert with its matrices packed, as far as this build and processor can; `num_bytes` and `private_bytes` then count them, too.

    Where nothing is packed it is the very same: a copy on CUDA would not keep the place in the slab, which is free again when the original is gone.
    """
    packed = {name: found for name, tensor in weights.tensors.items() if (found := pack(tensor)) is not None}
    if not packed:
        return weights
    num_bytes = sum(weights.tensors[name].nbytes for name in packed)
    return replace(weights, packed=packed, num_bytes=weights.num_bytes + num_bytes, private_bytes=weights.private_bytes + num_bytes)


def load_weights(blob: StoredBlob, device: torch.device) -> ExpertWeights:
    """An expert's weights on a device: on the CPU views of the blob's mapping, on CUDA one copy through pinned memory, complete when this returns.

    A shadow is expanded to its expert's own layout and element type, into private memory.
    Raises CheckpointError when the blob is neither an expert nor a shadow, torch.OutOfMemoryError when the device has no room.
    """
    if not isinstance(blob.descriptor, ExpertDescriptor):
        message = f"blob {blob.digest[:12]} is a gate, not an expert"
        raise CheckpointError(message)
    if blob.kind == "shadow":
        weights = load_weights(_expanded(blob, blob.descriptor), device)
        return weights if weights.place is not None else replace(weights, private_bytes=weights.num_bytes)
    if device.type == "cpu":
        return _map_weights(blob, blob.descriptor)
    return _copy_weights(blob, blob.descriptor, device)


@torch.no_grad()
def expert_forward(x_TD: Tensor, weights: ExpertWeights, multiply: Multiply = linear) -> Tensor:
    """One expert's output [T, D] for rows [T, D] of its own element type; `multiply` takes rows and a matrix, as `linear` does."""
    return _forward(x_TD, weights, multiply)


def _forward(x_TD: Tensor, weights: ExpertWeights, multiply: Multiply = linear) -> Tensor:
    """`expert_forward` for callers that have gradients turned off."""
    if x_TD.shape[0] == 1 and x_TD.dtype is not torch.float32 and x_TD.device.type == "cpu":
        # A single row takes another kernel, whose bits differ from those of the same row among others; two rows cost hardly more than one.
        return _forward(torch.cat((x_TD, x_TD)), weights, multiply)[:1]
    first = "gate_up" if weights.descriptor.gated else "up"
    hidden_TF = _activate(_linear(x_TD, weights, first, multiply), weights.descriptor)
    return _linear(hidden_TF, weights, "down", multiply)


def grouped_forward(x_ND: Tensor, weights: Sequence[ExpertWeights], rows: Sequence[int]) -> Tensor:
    """The outputs [N, D] of G segments that lie one after the other in `x_ND`: segment g has `rows[g]` rows and expert `weights[g]`.

    On the CPU each segment equals `expert_forward` bit for bit. Experts of one CUDA slab share a grouped matmul where shapes allow. Whoever calls this has
    gradients turned off: a compute thread does so once, not for every frame.
    Raises ValueError when the segments are not exactly the rows.
    """
    check_segments(x_ND, weights, rows)
    if len(weights) == 1:
        return _forward(x_ND, weights[0])
    parts = _split(x_ND, rows)
    outputs = list(parts)
    for members in _members(weights):
        if len(members) == 1:
            outputs[members[0]] = _forward(parts[members[0]], weights[members[0]])
            continue
        grouped = _slab_forward(torch.cat([parts[member] for member in members]), [weights[member] for member in members], [rows[member] for member in members])
        for member, output in zip(members, _split(grouped, [rows[member] for member in members]), strict=True):
            outputs[member] = output
    return torch.cat(outputs)


def check_segments(x_ND: Tensor, weights: Sequence[ExpertWeights], rows: Sequence[int]) -> None:
    """Raises ValueError when the segments are not exactly the rows."""
    if len(weights) != len(rows) or sum(rows) != x_ND.shape[0]:
        message = f"{len(weights)} experts and segments of {sum(rows)} rows do not make up {x_ND.shape[0]} rows"
        raise ValueError(message)


def _split(x_ND: Tensor, rows: Sequence[int]) -> tuple[Tensor, ...]:
    return torch.split_with_sizes(x_ND, list(rows))


def _activate(hidden: Tensor, descriptor: ExpertDescriptor) -> Tensor:
    if not descriptor.gated:
        return _ACTIVATIONS[descriptor.activation](hidden)
    gate_TF, up_TF = hidden.chunk(2, dim=-1)
    if descriptor.swiglu_limit is None:
        return _ACTIVATIONS[descriptor.activation](gate_TF) * up_TF
    gate_TF = gate_TF.clamp(max=descriptor.swiglu_limit)
    up_TF = up_TF.clamp(min=-descriptor.swiglu_limit, max=descriptor.swiglu_limit)
    return (up_TF + descriptor.swiglu_up_offset) * (gate_TF * torch.sigmoid(gate_TF * descriptor.swiglu_alpha))


def _linear(x: Tensor, weights: ExpertWeights, name: str, multiply: Multiply) -> Tensor:
    packed = weights.packed.get(name) if multiply is linear else None
    output = multiply(x, weights.tensors[name]) if packed is None else multiply_packed(x, packed)
    if (watcher := current_watcher()) is not None:
        watcher(x, weights.tensors[name], output)
    bias = weights.tensors.get(f"{name}_bias")
    # Added on its own: a fused addition would round once less than the eager experts do.
    return output if bias is None else output + bias


def _relu2(x: Tensor) -> Tensor:
    return relu(x).square()


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
    "relu": relu,
    "relu2": _relu2,
}


def _members(weights: Sequence[ExpertWeights]) -> list[list[int]]:
    """Segments that one grouped matmul can serve, in the order of their places; every other segment by itself."""
    slabs: dict[int, list[int]] = {}
    alone: list[list[int]] = []
    for member, expert in enumerate(weights):
        if expert.place is not None and _can_group(expert):
            slabs.setdefault(id(expert.place.slab), []).append(member)
        else:
            alone.append([member])
    for members in slabs.values():
        places = [place.index for member in members if (place := weights[member].place)]
        if len(set(places)) == len(places):
            alone.append([member for _, member in sorted(zip(places, members, strict=True))])
        else:
            alone += [[member] for member in members]
    return alone


def _can_group(expert: ExpertWeights) -> bool:
    descriptor = expert.descriptor
    widths = (descriptor.hidden_size, descriptor.intermediate_size)
    is_aligned = all(width * descriptor.dtype.itemsize % _GROUPED_ALIGNMENT_BYTES == 0 for width in widths)
    return is_aligned and descriptor.dtype is DType.BF16 and _has_grouped_mm(expert.tensors["down"].device)


@cache
def _has_grouped_mm(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _GROUPED_CAPABILITY


def _slab_forward(x_ND: Tensor, weights: Sequence[ExpertWeights], rows: Sequence[int]) -> Tensor:
    """Segments in ascending order of their places in one slab. Places between them that hold others have no rows here."""
    places = [place for expert in weights if (place := expert.place)]
    slab, first, stop = places[0].slab, places[0].index, places[-1].index + 1
    counts = [0] * (stop - first)
    for place, num_rows in zip(places, rows, strict=True):
        counts[place.index - first] = num_rows
    counts_P = torch.tensor(counts, dtype=torch.int32, device=x_ND.device)
    ends_P = counts_P.cumsum(0, dtype=torch.int32)
    descriptor = weights[0].descriptor

    def project(x: Tensor, name: str) -> Tensor:
        output = grouped_mm(x, slab.tensors[name][first:stop].transpose(-2, -1), offs=ends_P)
        if (watcher := current_watcher()) is not None:
            for place, part, product in zip(places, _split(x, rows), _split(output, rows), strict=True):
                watcher(part, slab.tensors[name][place.index], product)
        bias = slab.tensors.get(f"{name}_bias")
        return output if bias is None else output + bias[first:stop].repeat_interleave(counts_P, dim=0, output_size=x.shape[0])

    return project(_activate(project(x_ND, "gate_up" if descriptor.gated else "up"), descriptor), "down")


def _expanded(blob: StoredBlob, descriptor: ExpertDescriptor) -> StoredBlob:
    """The expert that a shadow stands for, as its bits come back. Every device and library gives the same."""
    if blob.codec is None:
        message = f"blob {blob.digest[:12]} is a shadow without a codec; import the model again"
        raise CheckpointError(message)
    tensors = decode(PackedExpert(descriptor, blob.codec, blob.tensors))
    return StoredBlob(blob.digest, "expert", descriptor, tensors, descriptor.num_bytes)


def _map_weights(blob: StoredBlob, descriptor: ExpertDescriptor) -> ExpertWeights:
    tensors: dict[str, Tensor] = {}
    private_bytes = 0
    for name, array in blob.tensors.items():
        flat = _writable(array)
        private_bytes += 0 if np.shares_memory(flat, array) else array.nbytes
        tensors[name] = torch.from_numpy(flat).view(TORCH_DTYPES[descriptor.dtype]).view(array.shape)
    return ExpertWeights(descriptor, tensors, sum(array.nbytes for array in blob.tensors.values()), private_bytes)


def _copy_weights(blob: StoredBlob, descriptor: ExpertDescriptor, device: torch.device) -> ExpertWeights:
    dtype = TORCH_DTYPES[descriptor.dtype]
    place = _SLABS.take(descriptor, dtype, device)
    weights = ExpertWeights(descriptor, place.tensors(), descriptor.num_bytes, descriptor.num_bytes, place)
    weakref.finalize(weights, _SLABS.giver(place)).atexit = False
    try:
        for name, array in blob.tensors.items():
            pinned = torch.from_numpy(_writable(array)).pin_memory()
            weights.tensors[name].copy_(pinned.view(dtype).view(array.shape), non_blocking=True)
    finally:  # also when one fails: a place that is given back must not be written to any more
        torch.cuda.current_stream(device).synchronize()
    return weights


def _writable(array: Array) -> Array:
    """The array's bytes, flat, as memory that torch accepts without a warning: the private mapping itself, or a copy of memory that is read-only.

    Nobody writes to them: what a store maps is shared with every copy on the node until a write would make a page private.
    """
    flat: Array = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if not flat.flags.writeable:
        try:
            flat.flags.writeable = True
        except ValueError:
            flat = flat.copy()
    return flat
