"""The gate: scores tokens and chooses their experts, from a GateDescriptor and tensors; families differ in data only.

Shape legend: T tokens, D model width, E experts, K choices of a token, H inner width of an MLP gate, P positions of a position-aware gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from cluster.core.descriptors import DType, GateDescriptor
from cluster.core.errors import CheckpointError, InvariantBroken
from router_service.core import gate_scores
from router_service.core.layer_call import TORCH_DTYPES
from router_service.core.tensors import as_dtype

SPARSEMIXER_TOP_K = 2


@dataclass(frozen=True, slots=True)
class Choices:
    """int32 ids [T, K], best first; fp32 weights [T, K]; and the scores [T, E] that the choice was made on, -inf where an expert could not be chosen."""

    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    scores_TE: torch.Tensor


class Gate:
    """One layer's gate. Raises CheckpointError when its tensors do not fit its descriptor."""

    def __init__(self, descriptor: GateDescriptor, tensors: Mapping[str, torch.Tensor], dtype: DType) -> None:
        _check_descriptor(descriptor)
        _check_tensors(descriptor, tensors)
        self.descriptor = descriptor
        self._model_dtype = TORCH_DTYPES[dtype]
        self._linear_dtype = self._dtype(descriptor.linear_dtype)
        self._score_dtype = self._dtype(descriptor.score_dtype)
        self._weight_dtype = self._dtype(descriptor.weight_dtype)
        # Rounded to the model's dtype first, as transformers loads them; only the correction bias keeps its fp32.
        plain = {name: tensor for name, tensor in tensors.items() if name != "correction_bias"}
        self._tensors = {name: tensor.to(self._model_dtype).to(self._linear_dtype) for name, tensor in plain.items()}
        self._correction_bias_E = tensors["correction_bias"] if descriptor.correction_bias else None

    @property
    def num_positions(self) -> int:
        """Positions that a position-aware gate knows; 0 for any other."""
        return self._tensors["position_embedding"].shape[0] if self.descriptor.kind == "position" else 0

    def __call__(self, x_TD: torch.Tensor, positions_T: torch.Tensor | None = None) -> Choices:
        """Choose K experts for each row of x [T, D]; `positions_T` (integers in [0, P)) where the gate is position-aware."""
        gate = self.descriptor
        # Detached, so that nothing below records a gradient: entering `no_grad` for each call costs more.
        logits_TE = as_dtype(self._logits(as_dtype(x_TD.detach(), self._linear_dtype), positions_T), self._score_dtype)
        scores_TE = gate_scores.score(logits_TE, gate)
        choice_TE = gate_scores.choosable(scores_TE, self._correction_bias_E, gate)
        if gate.score == "sparsemixer":
            ids_TK, weights_TK = gate_scores.sparsemixer(logits_TE, gate.jitter_eps)
        else:
            ids_TK = gate_scores.top_k(choice_TE, gate.top_k)
            weights_TK = gate_scores.weigh(scores_TE, ids_TK, gate)
        return Choices(ids_TK.to(torch.int32), as_dtype(as_dtype(weights_TK, self._weight_dtype), torch.float32), choice_TE)

    def _dtype(self, choice: str) -> torch.dtype:
        return torch.float32 if choice == "fp32" else self._model_dtype

    def _logits(self, x_TD: torch.Tensor, positions_T: torch.Tensor | None) -> torch.Tensor:
        tensors = self._tensors
        match self.descriptor.kind:
            case "linear":
                return functional.linear(x_TD, tensors["weight"], tensors.get("bias"))
            case "mlp_tanh":
                inner_TH = torch.tanh(functional.linear(x_TD, tensors["fc1_weight"], tensors["fc1_bias"]))
                return functional.linear(inner_TH, tensors["fc2_weight"], tensors["fc2_bias"])
            case "position":
                if positions_T is None:
                    message = "a position-aware gate was called without positions"
                    raise InvariantBroken(message)
                return functional.linear(x_TD + tensors["position_embedding"][positions_T.long()], tensors["weight"], tensors.get("bias"))


def _check_descriptor(gate: GateDescriptor) -> None:
    experts_per_group, remainder = divmod(gate.num_experts, gate.num_groups)
    if gate.top_k > gate.num_experts:
        _refuse(f"top_k {gate.top_k} is more than its {gate.num_experts} experts")
    if gate.score == "sparsemixer" and gate.top_k != SPARSEMIXER_TOP_K:
        _refuse(f"sparsemixer chooses {SPARSEMIXER_TOP_K} experts, top_k is {gate.top_k}")
    if remainder:
        _refuse(f"{gate.num_experts} experts cannot be split into {gate.num_groups} equal groups")
    if gate.top_groups < gate.num_groups:
        if gate.top_k > gate.top_groups * experts_per_group:
            _refuse(f"top_k {gate.top_k} is more than the {gate.top_groups * experts_per_group} experts of its top_groups")
        if gate.group_score == "top2_sum" and experts_per_group < SPARSEMIXER_TOP_K:
            _refuse("group score top2_sum needs two experts in each group")


def _check_tensors(gate: GateDescriptor, tensors: Mapping[str, torch.Tensor]) -> None:
    ranks = {"mlp_tanh": {"fc1_weight": 2, "fc1_bias": 1, "fc2_weight": 2, "fc2_bias": 1}}.get(gate.kind, {"weight": 2})
    ranks |= {"position_embedding": 2} if gate.kind == "position" else {}
    ranks |= {"bias": 1} if gate.bias and gate.kind != "mlp_tanh" else {}
    ranks |= {"correction_bias": 1} if gate.correction_bias else {}
    if set(ranks) != set(tensors):
        _refuse(f"it has the tensors {', '.join(sorted(tensors)) or 'none'} where {', '.join(sorted(ranks))} are expected")
    for name, rank in ranks.items():
        shape = tuple(tensors[name].shape)
        by_expert = name in {"weight", "bias", "correction_bias", "fc2_weight", "fc2_bias"}
        if len(shape) != rank or (by_expert and shape[0] != gate.num_experts):
            _refuse(f"tensor {name} has shape {list(shape)}, which does not fit {gate.num_experts} experts")


def _refuse(what: str) -> None:
    message = f"gate: {what}; check the checkpoint's config"
    raise CheckpointError(message)
