"""Weights that a fault has spoilt: a private copy of one replica, in this process only. The mapped store is shared and never written."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from actors.core.faults import FlipWeights, NanWeights, name_of, pick_bit
from actors.expert_layouts import ExpertWeights
from cluster.core.errors import NotFound
from cluster.core.ids import CopyId

SpoilingFault = NanWeights | FlipWeights


class Replicas(Protocol):
    """Whose weights may be spoilt; `actors.expert_runtime.ExpertRuntime` is one."""

    def replicas(self) -> list[CopyId]:
        """Every replica that is held, in order."""
        ...

    def exchange(self, copy: CopyId, change: Callable[[ExpertWeights], ExpertWeights]) -> bool:
        """Answer with other weights from now on. False when the replica is not held."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Spoilt:
    """A replica's own weights, and those that answer in their place."""

    copy: CopyId
    original: ExpertWeights
    spoilt: ExpertWeights


class SpoiltWeights:
    """At most one replica for each kind of fault, and one kind for each replica. Commands come one at a time."""

    def __init__(self) -> None:
        self._replicas: Replicas | None = None
        self._spoilt: dict[str, _Spoilt] = {}

    def attach(self, replicas: Replicas) -> None:
        """Whose weights may be spoilt."""
        self._replicas = replicas

    def spoil(self, fault: SpoilingFault) -> CopyId:
        """Spoil the first held replica that fits, in place of the one that this kind of fault spoilt before. Raises NotFound."""
        self.restore(name_of(fault))
        held = [] if self._replicas is None else self._replicas.replicas()
        taken = {item.copy for item in self._spoilt.values()}
        for copy in held:
            if copy not in taken and _fits(fault, copy) and self._exchange(copy, fault):
                return copy
        message = f"no unspoilt replica that fits {name_of(fault)}'s model, layer and index is held here; ask the actor that holds it, or heal first"
        raise NotFound(message, resource="expert", name=str(fault.index))

    def restore(self, name: str) -> None:
        """Give a replica its own weights back, unless it was let go or loaded again meanwhile. Nothing for a fault that spoilt none."""
        item = self._spoilt.pop(name, None)
        if item is not None and self._replicas is not None:
            self._replicas.exchange(item.copy, lambda current: item.original if current is item.spoilt else current)

    def used_by(self, weights: Collection[ExpertWeights]) -> list[str]:
        """Names of the faults whose spoilt weights are among these."""
        # A copy of the items, made in one step: this is called while a command may be under way.
        return [name for name, item in tuple(self._spoilt.items()) if item.spoilt in weights]

    def _exchange(self, copy: CopyId, fault: SpoilingFault) -> bool:
        def spoil(original: ExpertWeights) -> ExpertWeights:
            tensors = {name: tensor.clone() for name, tensor in original.tensors.items()}
            if isinstance(fault, NanWeights):
                tensors["down"].view(-1)[0] = math.nan if fault.value == "nan" else math.inf
            else:
                _flip(tensors, fault)
            if (device := tensors["down"].device).type == "cuda":
                torch.cuda.synchronize(device)  # the compute thread's stream does not wait for this thread's
            # Checksums and digests stay those of the right weights.
            spoilt = replace(original, tensors=tensors, private_bytes=original.num_bytes, place=None, packed={})
            self._spoilt[name_of(fault)] = _Spoilt(copy, original, spoilt)
            return spoilt

        return self._replicas is not None and self._replicas.exchange(copy, spoil)


def _fits(fault: SpoilingFault, copy: CopyId) -> bool:
    wanted = (fault.model, fault.layer, fault.index)
    own = (copy.expert.model, copy.expert.layer, copy.expert.index)
    return all(asked is None or asked == found for asked, found in zip(wanted, own, strict=True))


def _flip(tensors: Mapping[str, torch.Tensor], fault: FlipWeights) -> None:
    rng = random.Random(fault.seed)  # noqa: S311  (replayable)
    names = sorted(tensors)
    for _ in range(fault.flips):
        (name,) = rng.choices(names, [tensors[name].numel() for name in names])
        byte, bit = pick_bit(rng, tensors[name].numel(), tensors[name].element_size(), fault.bits)
        tensors[name].view(-1).view(torch.uint8)[byte].bitwise_xor_(1 << bit)
