"""One call of one MoE layer and its answer, as plain values: what the servicer hands to the pipeline, and what the twin computes alike.

Shape legend: T tokens of the request, D model width, E experts of the layer, K choices of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from cluster.core.descriptors import DType
from router_service.core.outcomes import Report

THREAD_BYTES = 256 << 10  # hidden states above this are worth a thread
TORCH_DTYPES = {DType.BF16: torch.bfloat16, DType.FP16: torch.float16, DType.FP32: torch.float32}


class Overflow(IntEnum):
    """What happens to choices above an expert's capacity; the numbers are those of the proto."""

    NONE = 0
    DROP = 1
    NEXT_BEST = 2


@dataclass(frozen=True, slots=True)
class GateChoice:
    """The layer's own gate chooses. `positions_T` (integers) only for position-aware gates; `capacity_factor` only with an overflow policy."""

    positions_T: torch.Tensor | None = None
    overflow: Overflow = Overflow.NONE
    capacity_factor: float = 1.25


@dataclass(frozen=True, slots=True)
class TopK:
    """The caller has chosen: int32 ids [T, K], -1 where unused, and fp32 weights [T, K]."""

    expert_ids_TK: torch.Tensor
    weights_TK: torch.Tensor


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One request. `hidden_states` is [T, D] on the CPU in the model's dtype or in fp32; `deadline_s` is a time of the running loop's clock.

    `traceparent` is the parent of the call's spans; None: the current span.
    """

    request_id: str
    model: str
    layer: int
    hidden_states: torch.Tensor
    routing: GateChoice | TopK
    deadline_s: float
    fidelity_exact: bool = False
    want_plan: bool = False
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class LayerReply:
    """The combined output [T, D] in the dtype of the request's hidden states, and who answered."""

    hidden_states: torch.Tensor
    report: Report
