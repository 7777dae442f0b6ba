"""What a model's experts and gates compute, as data: families differ in records, never in code paths of their own.

Shape legend: T tokens, D model width, F expert inner width, E experts of a layer, K choices of a token.
"""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DType(StrEnum):
    """Element types that weights and activations are served in."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    __hash__ = str.__hash__  # enum's own is Python, and element types are in keys on the token path

    def __init__(self, name: str) -> None:
        """`itemsize` is the bytes of one element."""
        self.itemsize = 4 if name == "fp32" else 2


class ExpertDescriptor(_Record):
    """One expert in compute layout.

    Gated: `down(act(x @ gate.T) * (x @ up.T))`, stored as `gate_up` [2F, D] (gate rows first) and `down` [D, F].
    Not gated: `down(act(x @ up.T))`, stored as `up` [F, D] and `down` [D, F].
    With `bias`: `gate_up_bias` [2F] (or `up_bias` [F]) and `down_bias` [D].
    With `swiglu_limit` (GPT-OSS): gate <= limit, up in [-limit, limit], `(up + up_offset) * gate * sigmoid(alpha * gate)`; `activation` is unused.
    """

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "silu"
    gated: bool = True
    bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    swiglu_up_offset: float = 1.0
    dtype: DType = DType.BF16

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the compute layout, in storage order."""
        first = "gate_up" if self.gated else "up"
        width = self.intermediate_size * (2 if self.gated else 1)
        shapes: dict[str, tuple[int, ...]] = {
            first: (width, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
        }
        if self.bias:
            shapes[f"{first}_bias"] = (width,)
            shapes["down_bias"] = (self.hidden_size,)
        return shapes

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights alone, without the blob's header and padding."""
        total = 0
        for shape in self.tensor_shapes().values():
            size = self.dtype.itemsize
            for dim in shape:
                size *= dim
            total += size
        return total


class DenseDescriptor(_Record):
    """A matrix that stands for all experts of a layer: `x @ weight.T`, stored as `weight` [D, D]."""

    hidden_size: PositiveInt
    dtype: DType = DType.BF16

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of its tensor."""
        return {"weight": (self.hidden_size, self.hidden_size)}


class CodecRecord(_Record):
    """How a shadow's weight matrices are packed: a code of `bits` for each weight, a scale for each group of neighbours in a row; 0 bits: no codes.

    `group_size`: at most so many weights share a scale; None: a whole row.
    `levels`: what a code stands for, in scales: `integer` (zero-centred, 0 is one of them), `half` (zero-centred, 0 lies between two of them),
    `gaussian` (the same, spaced for normally distributed weights).
    `scales`: how a scale is stored, beside one power of two for each matrix.
    `rank_percent`: two thin factors of 8 bits with so many percent of a matrix's elements are added to what the codes give.
    `inner_percent`: the packed expert is a narrow one of so many percent of its primary's inner width, which was trained to imitate it.
    """

    name: str = Field(min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9._-]*$")
    bits: Literal[0, 2, 3, 4, 8]
    group_size: PositiveInt | None = None
    levels: Literal["integer", "half", "gaussian"] = "integer"
    scales: Literal["bf16", "e4m3"] = "bf16"
    rank_percent: int = Field(0, ge=0, le=100)
    inner_percent: int = Field(0, ge=0, le=100)

    @model_validator(mode="after")
    def _levels_exist(self) -> Self:
        if self.levels == "gaussian" and self.bits == 8:  # noqa: PLR2004  (the widest codec)
            message = "levels: gaussian levels are defined for 2, 3 and 4 bits; use integer or half for 8"
            raise ValueError(message)
        if self.bits == 0 and self.rank_percent == 0:
            message = "bits: without codes a matrix needs factors; set rank_percent"
            raise ValueError(message)
        return self

    @property
    def is_fitted(self) -> bool:
        """Whether its shadows can only be made where there are calibration rows."""
        return self.rank_percent > 0 or self.inner_percent > 0


class GateDescriptor(_Record):
    """How a layer scores tokens and picks K of E experts.

    kind: `linear` (weight [E, D], optional bias [E]); `mlp_tanh` (fc1 [H, D] + bias, tanh, fc2 [E, H] + bias);
    `position` (linear on the row plus a learned embedding of its position, [P, D]).
    score: `softmax` over all E, then top-k; `topk_softmax`: top-k on the logits, then softmax over the K; `sigmoid`; `sparsemixer` (PhiMoE, K = 2).
    The choice is made on `scores + correction_bias` where there is one; weights are always gathered from the unbiased scores.
    """

    kind: Literal["linear", "mlp_tanh", "position"] = "linear"
    num_experts: PositiveInt
    top_k: PositiveInt
    score: Literal["softmax", "topk_softmax", "sigmoid", "sparsemixer"] = "softmax"
    bias: bool = False
    correction_bias: bool = False
    num_groups: PositiveInt = 1
    top_groups: PositiveInt = 1
    group_score: Literal["max", "top2_sum"] = "max"
    normalize: bool = False
    normalize_eps: float = 0.0
    scale: float = 1.0
    jitter_eps: float = 0.01
    linear_dtype: Literal["model", "fp32"] = "model"
    score_dtype: Literal["model", "fp32"] = "fp32"
    weight_dtype: Literal["model", "fp32"] = "fp32"


class LayerDescriptor(_Record):
    """One MoE layer: E experts alike in shape, one gate."""

    layer: NonNegativeInt
    num_experts: PositiveInt
    expert: ExpertDescriptor
    gate: GateDescriptor


class ModelDescriptor(_Record):
    """A served model: what a stranger must know to send it tokens."""

    name: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    family: str
    dtype: DType
    layers: tuple[LayerDescriptor, ...] = Field(min_length=1)

    def layer(self, layer: int) -> LayerDescriptor | None:
        """The MoE layer of this decoder layer index, or None."""
        return next((entry for entry in self.layers if entry.layer == layer), None)


class ShadowRecord(_Record):
    """One expert's shadow: the SHA-256 of its blob, and how well it stands for its primary.

    `num_bytes` counts packed weights without the blob's header; `relative_error` and `cosine` compare outputs on random rows.
    """

    version: str = Field(pattern=r"^[0-9a-f]{64}$")
    codec: str
    num_bytes: PositiveInt
    relative_error: float
    cosine: float


def ladder_key(rung: str, layer: int) -> str:
    """Where a manifest lists the blob of a fallback of a layer."""
    return f"{rung}/{layer}"


class Manifest(_Record):
    """A model with the digest of each blob: what may be served under this model's name, byte by byte.

    Keys are `LAYER/INDEX` for experts and their shadows, `LAYER` for gates and `RUNG/LAYER` for the ladder's fallbacks; values are SHA-256 in hex of the
    blob in compute layout. A model without shadows or ladder is written without the field, so that it keeps the digest it had before there were any.
    """

    model: ModelDescriptor
    experts: dict[str, str]
    gates: dict[str, str]
    source: str = ""
    shadows: dict[str, ShadowRecord] = Field(default_factory=dict)
    ladder: dict[str, str] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _without_what_is_empty(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        for name in ("shadows", "ladder"):
            if not getattr(self, name):
                written.pop(name, None)
        return written

    @property
    def digest(self) -> str:
        """SHA-256 in hex of the canonical JSON (sorted keys, no spaces, UTF-8): the name that tables and stores know this manifest by."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()
