"""How many bytes of expert weights an actor may hold: arithmetic on what was measured."""

from __future__ import annotations

from dataclasses import dataclass

CPU_SHARE = 0.8
WORKSPACE_BYTES_PER_TOKEN = 128 << 10
"""Rows in and out, and the inner activations of one token, at the widest expert of the supported families (width 4,096, inner width 14,336, gated, bf16)."""
LIBRARIES_BYTES = 256 << 20
"""Kept back on a device for what its matrix libraries load and keep when they are first used: kernels, and a workspace of some 32 MiB for each thread that
multiplies."""
IDLE_PLACES_BYTES = 64 << 20
"""Kept back on a device for places beside experts in one allocation that nobody lies in; an allocation has no more of them."""
CHECKS_SHARE = 1 / 24
"""Kept back for the checksums and digests of weights, which lie beside them: 1/32 for matrices whose rows fall into blocks of 64, and a little more."""
PASSING_EXPANSIONS = 2
"""Beyond the workspace: a shadow that is expanded once as it is loaded, and one expanded for a frame alone because the workspace is full."""


@dataclass(frozen=True, slots=True)
class MeasuredMemory:
    """A device's memory: `free_bytes` after this process's own context, of `total_bytes`."""

    free_bytes: int
    total_bytes: int
    is_device: bool


def capacity_bytes(memory: MeasuredMemory, *, limit_bytes: int | None, num_gpus: float, max_tokens_per_frame: int, has_checksums: bool = False) -> int:
    """Bytes for slots: the configured limit, or this actor's share of what is free beside the workspace of one frame, the libraries and idle places.

    `num_gpus` below 1 is the share of a GPU; other values mean the whole. A limit above what a GPU has free is cut; host memory holds mapped files,
    which the kernel can drop, so there a configured limit stands as it is. Without one a fifth of the host's memory is kept back.
    `has_checksums`: on a device, what is free must hold those, too.
    """
    if not memory.is_device:
        return int(memory.free_bytes * CPU_SHARE) if limit_bytes is None else limit_bytes
    share = num_gpus if 0.0 < num_gpus < 1.0 else 1.0
    kept_bytes = max_tokens_per_frame * WORKSPACE_BYTES_PER_TOKEN + LIBRARIES_BYTES + IDLE_PLACES_BYTES
    allowed = max(0, min(memory.free_bytes, int(memory.total_bytes * share)) - kept_bytes)
    allowed = int(allowed * (1 - CHECKS_SHARE)) if has_checksums else allowed
    return allowed if limit_bytes is None else min(limit_bytes, allowed)


def expansions_reserved(memory: MeasuredMemory, expanded_max: int) -> int:
    """For how many expanded shadows room is set aside. None in host memory, where the kernel can drop mapped files instead."""
    return expanded_max + PASSING_EXPANSIONS if memory.is_device else 0
