"""The names of what a cluster is made of: experts, copies of experts, and incarnations of processes.

Named tuples, because they are keys on the token path: their hash and their equality are C's own.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

DIGEST_BYTES = 32


class ExpertId(NamedTuple):
    """One feed-forward network of one model. `layer` is the decoder layer index, as the model counts it."""

    model: str
    layer: int
    index: int  # type: ignore[assignment]  # (in the place of tuple.index)

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

    __hash__ = int.__hash__  # enum's own is Python, and roles are in keys on the token path


class CopyId(NamedTuple):
    """One version of one expert in one role: what a slot holds. `version` is the SHA-256 of its stored blob, in hex."""

    expert: ExpertId
    version: str
    role: Role = Role.REPLICA

    def __str__(self) -> str:
        return f"{self.expert}@{self.version[:12]}"


class Incarnation(NamedTuple):
    """One life of an actor. Generations grow over the whole cluster, so no two lives are ever equal."""

    actor_id: str
    generation: int

    def __str__(self) -> str:
        return f"{self.actor_id}/g{self.generation}"
