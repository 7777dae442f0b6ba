"""Shadows without a store for tests of an expert actor: packed blobs of random numbers, and expansions that can be held, broken and counted."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from actors.blob_files import StoredBlob
from actors.core.codecs import CODECS, encode, packed_bytes
from actors.core.slots import SizedCopy
from actors.expert_layouts import ExpertWeights, load_weights
from cluster.core.ids import CopyId, Role
from kit.experts import TIMEOUT_S, RandomBlobs, expert_copy

INT4 = CODECS["int4"]


def shadow(index: int) -> CopyId:
    """The shadow of expert `index`; its version is made up."""
    return CopyId(expert_copy(index).expert, f"5ad0{index:04x}" * 8, Role.SHADOW)


S, T, U = shadow(4), shadow(5), shadow(6)


@dataclass
class ShadowBlobs(RandomBlobs):
    """Versions of shadows are packed, all others are experts."""

    def open(self, digest: str) -> Any:
        found = super().open(digest)
        if not digest.startswith("5ad0"):
            return found
        return StoredBlob(digest, "shadow", found.descriptor, dict(encode(found.descriptor, found.tensors, INT4).tensors), 0, INT4, "ab" * 32)

    @property
    def packed_bytes(self) -> int:
        return packed_bytes(self.descriptor, INT4)

    def sized(self, *copies: CopyId) -> list[SizedCopy]:
        return [self._sized(copy) for copy in copies]

    def _sized(self, copy: CopyId) -> SizedCopy:
        full_bytes = self.descriptor.num_bytes
        return SizedCopy(copy, self.packed_bytes, full_bytes) if copy.role is Role.SHADOW else SizedCopy(copy, full_bytes)


@dataclass
class Expansions:
    """`load_weights`, with a gate and a trap for expansions in the workspace's thread, and a record of them; `alone`: those for one frame."""

    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    done: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)

    @classmethod
    def opened(cls) -> Self:
        """With the gate open."""
        made = cls()
        made.gate.set()
        return made

    def __call__(self, blob: Any, device: torch.device) -> ExpertWeights:
        if threading.current_thread().name == "shadow-workspace":
            self.entered.release()
            assert self.gate.wait(TIMEOUT_S)
            if blob.digest in self.broken:
                raise torch.OutOfMemoryError
            self.done.append(blob.digest)
        elif threading.current_thread().name == "compute":
            self.alone.append(blob.digest)
            if blob.digest in self.broken:
                raise torch.OutOfMemoryError
        return load_weights(blob, device)
