"""The names of what a cluster is made of: experts, copies of experts, and incarnations of processes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

DIGEST_BYTES = 32


@dataclass(frozen=True, order=True, slots=True)
class ExpertId:
    """One feed-forward network of one model. `layer` is the decoder layer index, as the model counts it."""

    model: str
    layer: int
    index: int

    def __str__(self) -> str:
        return f"{self.model}:{self.layer}/{self.index}"

    @classmethod
    def parse(cls, text: str) -> ExpertId:
        """Read the form that `str()` writes; raises ValueError."""
        model, _, place = text.rpartition(":")
        layer, slash, index = place.partition("/")
        if not model or not slash:
            message = f"not an expert id: {text!r}; the form is MODEL:LAYER/INDEX"
            raise ValueError(message)
        return cls(model, int(layer), int(index))


class Role(IntEnum):
    """What a copy is: full precision, or smaller and compressed."""

    REPLICA = 1
    SHADOW = 2


@dataclass(frozen=True, order=True, slots=True)
class CopyId:
    """One version of one expert in one role: what a slot holds. `version` is the SHA-256 of its stored blob, in hex."""

    expert: ExpertId
    version: str
    role: Role = Role.REPLICA

    def __str__(self) -> str:
        return f"{self.expert}@{self.version[:12]}"


@dataclass(frozen=True, order=True, slots=True)
class Incarnation:
    """One life of an actor. Generations grow over the whole cluster, so no two lives are ever equal."""

    actor_id: str
    generation: int

    def __str__(self) -> str:
        return f"{self.actor_id}/g{self.generation}"
