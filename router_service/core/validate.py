"""What a request must be, given the layer it is for. Every refusal is InvalidRequest with the field's path in the request, before anything is computed.

Messages name the field, the limit and the remedy, and may name a row; never a value of the caller's.
Shape legend: T tokens, D model width, E experts of the layer, K choices of a token, P positions.
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch

from cluster.core.descriptors import DType, LayerDescriptor
from cluster.core.errors import InvalidRequest
from router_service.core.combine import is_finite
from router_service.core.layer_call import TORCH_DTYPES, GateChoice, LayerCall, Overflow, TopK
from router_service.core.tensors import as_dtype

INTEGERS = frozenset({torch.int32, torch.int64, torch.uint32})


def check_call(call: LayerCall, layer: LayerDescriptor, dtype: DType, *, max_tokens: int, num_positions: int = 0) -> torch.Tensor:
    """Check a whole call against its layer; returns the hidden states [T, D] in the model's dtype, which experts and gate alike compute with.

    `num_positions` is P of a position-aware gate, else 0.
    """
    x_TD = _hidden_states(call.hidden_states, layer.expert.hidden_size, dtype, max_tokens)
    match call.routing:
        case TopK() as chosen:
            _top_k(chosen, x_TD.shape[0], layer.num_experts)
        case GateChoice() as gate:
            _positions(gate.positions_T, x_TD.shape[0], num_positions)
            _capacity_factor(gate)
    return x_TD


def check_choices(call: LayerCall, layer: LayerDescriptor, max_choices: int) -> int:
    """T x K of a call, unused choices among them: what dispatch must make room for. Raises InvalidRequest above the limit, before a row is copied."""
    if isinstance(call.routing, TopK):
        field, num_choices = "top_k.expert_ids.shape", call.routing.expert_ids_TK.numel()
    else:
        field, num_choices = "hidden_states.shape", call.hidden_states.shape[0] * layer.gate.top_k if call.hidden_states.ndim else 0
    if num_choices > max_choices:
        limit = f"{max_choices} in one request (max_choices_per_request in GetModel)"
        _refuse(field, f"tokens times choices per token are {num_choices}, over the limit of {limit}; send fewer tokens at once")
    return num_choices


def _hidden_states(given: torch.Tensor, width: int, dtype: DType, max_tokens: int) -> torch.Tensor:
    model_dtype = TORCH_DTYPES[dtype]
    if given.ndim != 2:  # noqa: PLR2004  (a matrix)
        _refuse("hidden_states.shape", f"hidden_states must have rank 2, [tokens, {width}]; it has rank {given.ndim}; flatten batch and sequence into one axis")
    if given.dtype not in {model_dtype, torch.float32}:
        _refuse("hidden_states.dtype", f"hidden_states must be {dtype} (the model's dtype) or fp32; convert it")
    if given.shape[1] != width:
        _refuse(
            "hidden_states.shape", f"hidden_states must have width {width} in this layer, it has {given.shape[1]}; see GetModel for each layer's hidden_size"
        )
    if not 1 <= given.shape[0] <= max_tokens:
        remedy = "send at least one token" if given.shape[0] == 0 else "send smaller batches"
        _refuse("hidden_states.shape", f"hidden_states must have 1 to {max_tokens} rows, it has {given.shape[0]}; {remedy}")
    x_TD = as_dtype(given.detach(), model_dtype)
    if not is_finite(x_TD):
        row = _first(~torch.isfinite(x_TD).all(dim=1))
        _refuse("hidden_states", f"hidden_states has an element in row {row} that is NaN, infinite or beyond the range of {dtype}; send finite values")
    return x_TD


def _top_k(chosen: TopK, num_tokens: int, num_experts: int) -> None:
    ids_TK, weights_TK = chosen.expert_ids_TK, chosen.weights_TK
    if ids_TK.dtype is not torch.int32:
        _refuse("top_k.expert_ids.dtype", "top_k.expert_ids must be int32; convert it")
    if weights_TK.dtype is not torch.float32:
        _refuse("top_k.weights.dtype", "top_k.weights must be fp32; convert it")
    if ids_TK.ndim != 2 or ids_TK.shape[0] != num_tokens:  # noqa: PLR2004  (a matrix)
        _refuse("top_k.expert_ids.shape", f"top_k.expert_ids must be [{num_tokens}, K], one row for each row of hidden_states; it is {list(ids_TK.shape)}")
    if weights_TK.shape != ids_TK.shape:
        _refuse("top_k.weights.shape", f"top_k.weights must have the shape of top_k.expert_ids, {list(ids_TK.shape)}; it has {list(weights_TK.shape)}")
    if not 1 <= ids_TK.shape[1] <= num_experts:
        _refuse("top_k.expert_ids.shape", f"top_k.expert_ids must have 1 to {num_experts} columns (the layer's experts), it has {ids_TK.shape[1]}")
    _ids(ids_TK, num_experts)
    bad_T = ((ids_TK >= 0) & ~torch.isfinite(weights_TK)).any(dim=1)
    if bool(bad_T.any()):
        _refuse("top_k.weights", f"top_k.weights has a NaN or infinite weight in row {_first(bad_T)}; weights of used choices must be finite")


def _ids(ids_TK: torch.Tensor, num_experts: int) -> None:
    outside_T = ((ids_TK < -1) | (ids_TK >= num_experts)).any(dim=1)
    if bool(outside_T.any()):
        limits = f"ids must be 0 to {num_experts - 1}, or -1 for unused"
        _refuse("top_k.expert_ids", f"top_k.expert_ids has an id in row {_first(outside_T)} that this layer does not have; {limits}")
    sorted_TK = ids_TK.sort(dim=1).values
    twice_T = ((sorted_TK[:, 1:] == sorted_TK[:, :-1]) & (sorted_TK[:, 1:] >= 0)).any(dim=1)
    if bool(twice_T.any()):
        _refuse("top_k.expert_ids", f"top_k.expert_ids names an expert twice in row {_first(twice_T)}; name it once and add up its weights")


def _positions(positions_T: torch.Tensor | None, num_tokens: int, num_positions: int) -> None:
    if num_positions == 0:
        if positions_T is not None:
            _refuse("gate.positions", "gate.positions is given, but this layer's gate does not use positions; leave it out")
        return
    if positions_T is None:
        _refuse("gate.positions", "gate.positions is missing: this layer's gate is position-aware and needs one position per token")
    if positions_T.dtype not in INTEGERS:
        _refuse("gate.positions.dtype", "gate.positions must be uint32; convert it")
    if tuple(positions_T.shape) != (num_tokens,):
        _refuse("gate.positions.shape", f"gate.positions must be [{num_tokens}], one for each row of hidden_states; it is {list(positions_T.shape)}")
    wide_T = positions_T.long()
    outside_T = (wide_T < 0) | (wide_T >= num_positions)
    if bool(outside_T.any()):
        _refuse("gate.positions", f"gate.positions has a position in row {_first(outside_T)} that the gate does not know; it knows 0 to {num_positions - 1}")


def _capacity_factor(gate: GateChoice) -> None:
    if gate.overflow is not Overflow.NONE and not (math.isfinite(gate.capacity_factor) and gate.capacity_factor > 0):
        _refuse("gate.capacity_factor", "gate.capacity_factor must be a finite number above 0 with an overflow policy; 1.25 is usual")


def _first(flags_T: torch.Tensor) -> int:
    return int(torch.nonzero(flags_T)[0])


def _refuse(field: str, message: str) -> NoReturn:
    raise InvalidRequest(message, field=field)
