"""Capacity and overflow: how many choices of one request an expert serves, and what becomes of the rest.

A pure function of one request's choices, so that no caller can change another's answer. An expert keeps its heaviest scores (Capacity-Aware
Inference, arXiv 2503.05066, section 3); equal scores keep the lower row. Shape legend: T tokens, E experts, K choices of a token, O choices over capacity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_service.core.layer_call import Overflow

UNUSED = -1


@dataclass(frozen=True, slots=True)
class Kept:
    """int32 ids [T, K] after the policy, -1 where nobody serves the choice; `dropped_TK` marks those that the policy dropped."""

    ids_TK: NDArray[np.int32]
    dropped_TK: NDArray[np.bool_]


def expert_capacity(num_tokens: int, top_k: int, num_experts: int, capacity_factor: float) -> int:
    """Choices that one expert serves in a request: ceil(factor * T * K / E), at most T."""
    return min(num_tokens, math.ceil(capacity_factor * num_tokens * top_k / num_experts))


def apply_overflow(ids_TK: NDArray[np.int32], scores_TE: NDArray[np.float32], overflow: Overflow, capacity_factor: float) -> Kept:
    """Keep each expert within its capacity; choices over it are dropped, or moved to the token's next-best expert with room.

    A moved choice keeps its weight, so a token's weights still sum to what the gate gave; a dropped one takes its weight along.
    """
    nothing_TK = np.zeros(ids_TK.shape, np.bool_)
    if overflow is Overflow.NONE:
        return Kept(ids_TK, nothing_TK)
    num_tokens, num_experts = scores_TE.shape
    capacity = expert_capacity(num_tokens, ids_TK.shape[1], num_experts, capacity_factor)
    over_TK = _over_capacity(ids_TK, scores_TE, capacity)
    kept_TK = np.where(over_TK, np.int32(UNUSED), ids_TK)
    if overflow is Overflow.NEXT_BEST:
        kept_TK = _move(kept_TK, over_TK, ids_TK, scores_TE, capacity)
    return Kept(kept_TK, over_TK & (kept_TK == UNUSED))


def _over_capacity(ids_TK: NDArray[np.int32], scores_TE: NDArray[np.float32], capacity: int) -> NDArray[np.bool_]:
    used = ids_TK.ravel() != UNUSED
    scores = np.take_along_axis(scores_TE, np.maximum(ids_TK, 0), axis=1).ravel()
    over = np.zeros(ids_TK.size, np.bool_)
    over[used] = _rank_in_expert(ids_TK.ravel()[used], scores[used]) >= capacity
    return over.reshape(ids_TK.shape)


def _rank_in_expert(experts: NDArray[np.int32], scores: NDArray[np.float32]) -> NDArray[np.intp]:
    """Place of each choice among those of its expert, best score first, then in the order given."""
    order = np.lexsort((-scores, experts))
    starts = np.searchsorted(experts[order], experts[order], side="left")
    ranks = np.empty(experts.size, np.intp)
    ranks[order] = np.arange(experts.size) - starts
    return ranks


def _move(
    kept_TK: NDArray[np.int32], over_TK: NDArray[np.bool_], ids_TK: NDArray[np.int32], scores_TE: NDArray[np.float32], capacity: int
) -> NDArray[np.int32]:
    """Offer every choice over capacity to its token's best expert with room, in rounds; best scores are served first.

    A round moves one choice of each waiting token or fills an expert, so there are at most E + K rounds.
    """
    num_experts = scores_TE.shape[1]
    moved_TK = kept_TK.copy()
    wanted_TE = scores_TE.copy()
    np.put_along_axis(wanted_TE, np.maximum(ids_TK, 0), -np.inf, axis=1)
    room_E = capacity - np.bincount(kept_TK[kept_TK != UNUSED], minlength=num_experts)
    waiting_TK = over_TK.copy()
    for _ in range(num_experts + ids_TK.shape[1]):
        wanted_TE[:, room_E <= 0] = -np.inf
        rows_O = np.flatnonzero(waiting_TK.any(axis=1) & (wanted_TE.max(axis=1) > -np.inf))
        if not rows_O.size:
            break
        columns_O = waiting_TK[rows_O].argmax(axis=1)
        experts_O = wanted_TE[rows_O].argmax(axis=1).astype(np.int32)
        fits_O = _rank_in_expert(experts_O, wanted_TE[rows_O, experts_O]) < room_E[experts_O]
        rows, columns, experts = rows_O[fits_O], columns_O[fits_O], experts_O[fits_O]
        moved_TK[rows, columns] = experts
        waiting_TK[rows, columns] = False
        wanted_TE[rows, experts] = -np.inf
        room_E -= np.bincount(experts, minlength=num_experts)
    return moved_TK
