"""What a ladder file says of itself: what stands in for a model's experts, what it was fitted to, and what each rung costs an answer."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeFloat, NonNegativeInt

from cluster.core.descriptors import CodecRecord, DType, ExpertDescriptor

WITHOUT = "none"
"""In a table of damages: while the expert has no shadow."""
SHIPPED = "shipped"
"""In a table of damages: the shadow that lies in the ladder file."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LadderShadow(_Record):
    """A shadow whose bytes the file holds, because calibration rows were needed to make it. Errors are those on rows that it was not fitted to."""

    codec: CodecRecord
    relative_error: NonNegativeFloat
    cosine: FiniteFloat


class RungRecord(_Record):
    """A rung as it was measured: `relative_error` of a lost expert's outputs, in the mean, where the rung computes some; `num_bytes` of its weights.

    `rises_percent`: how much more bits per byte of held-out text the model needs with one GPU of four lost and this rung alone below the copies, by GPU.
    """

    relative_error: NonNegativeFloat | None = None
    num_bytes: NonNegativeInt = 0
    rises_percent: tuple[FiniteFloat, ...] = ()

    @property
    def damage(self) -> float:
        """The mean rise; infinity where none was measured."""
        return sum(self.rises_percent) / len(self.rises_percent) if self.rises_percent else float("inf")


class LadderRecord(_Record):
    """The metadata of a ladder file. Keys are `LAYER` or `LAYER/INDEX`, as in a manifest.

    `experts`: the digests of the experts that everything was fitted to, in `dtype`. `usage`: share of its layer's choices that an expert gets.
    `damage`: by expert and codec, the squared error that a shadow adds to its layer's output, as a share of that output's power over all tokens.
    `order`: the rungs below the copies, least damage first. `sha256`: of the tensors' bytes.
    """

    format: Literal[1] = 1
    dtype: DType
    experts: dict[str, str]
    generalists: dict[str, ExpertDescriptor]
    dense: tuple[NonNegativeInt, ...] = ()
    shadows: dict[str, LadderShadow] = Field(default_factory=dict)
    usage: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    damage: dict[str, dict[str, NonNegativeFloat]] = Field(default_factory=dict)
    rungs: dict[str, RungRecord] = Field(default_factory=dict)
    order: tuple[str, ...] = ()
    bits_per_byte: NonNegativeFloat = 0.0
    num_rows: NonNegativeInt = 0
    sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$")
