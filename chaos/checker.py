"""Replays kept replies: each must be what its own plan gives, bit for bit, with the weights that the nodes' stores hold under the plan's digests.

Kernels may round a bf16 row otherwise when it is merged with rows of other callers: seldom, and of small experts. Such a reply counts as wrong here, since a
plan does not tell what its rows were merged with, and any tolerance would pass a flipped low bit, too. How far it is off is said beside it: one step of
bf16 in a few numbers is what rounding looks like.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cluster.core.errors import MoeError, NotFound
from router_service.core.outcomes import OUTCOME_NAMES, Outcome, Plan

if TYPE_CHECKING:
    from router_service.fallbacks import FallbackWeights

MAX_LOADED = 64


class Checker:
    """Checks kept replies, each once; what it found is remembered."""

    def __init__(self, stores: Sequence[Path], known_path: Path, kept_dir: Path) -> None:
        self._stores = stores
        self._kept_dir = kept_dir
        with np.load(known_path) as known:
            self._inputs = known["inputs"]
        self._found: dict[str, bool | None] = {}
        self.reasons: dict[str, str] = {}
        self._weights = lru_cache(MAX_LOADED)(self._load)

    def check(self, names: Iterable[str]) -> tuple[frozenset[str], frozenset[str]]:
        """Which of these replies are wrong, and which could not be replayed; `reasons` says why. The latter are tried again when asked again."""
        wanted = set(names)
        for name in wanted - set(self._found):
            self.reasons.pop(name, None)
            self._found[name] = self._is_right(name)
        wrong, unknown = (frozenset(name for name in wanted if self._found[name] is found) for found in (False, None))
        for name in unknown:  # it may not have been written yet
            del self._found[name]
        return wrong, unknown

    def _is_right(self, name: str) -> bool | None:
        import torch

        from router_service.replay import replay

        torch.set_num_threads(1)
        try:
            with np.load(self._kept_dir / f"{name}.npz") as kept:
                arrays: dict[str, Any] = {key: kept[key] for key in kept}
            plan = Plan(**{key: arrays[key] for key in Plan.__slots__ if key != "versions"}, versions=tuple(row.tobytes() for row in arrays["versions"]))
            rows_TD = torch.from_numpy(self._inputs[int(arrays["which"])]).view(torch.bfloat16)
            again_TD = replay(rows_TD, plan, self._weights)
        except (MoeError, OSError, KeyError, ValueError) as error:
            self.reasons[name] = f"{type(error).__name__}: {error}"
            return None
        right_TD, found_TD = again_TD.view(torch.uint16).numpy(), arrays["rows"]
        if np.array_equal(right_TD, found_TD):
            return True
        self.reasons[name] = _difference(plan, right_TD, found_TD)
        return False

    def _load(self, digest: str) -> FallbackWeights:
        from actors.expert_store import ExpertStore
        from router_service.replay import from_store

        for store in self._stores:
            if (store / "blobs" / digest[:2] / digest).is_file():
                return from_store(ExpertStore(store))(digest)
        message = f"no store of this machine holds {digest[:12]}; the reply cannot be replayed"
        raise NotFound(message, resource="expert version", name=digest[:12])


def _difference(plan: Plan, right_TD: NDArray[np.uint16], found_TD: NDArray[np.uint16]) -> str:
    """Which rows a reply has otherwise than its plan, how far off, and who answered for them: what a search for the cause begins with."""
    bad_TD = right_TD != found_TD
    bad_T = bad_TD.any(axis=1)
    most = np.abs(_steps(right_TD) - _steps(found_TD)).max()
    answered = {
        f"{expert} by {OUTCOME_NAMES[Outcome(outcome)]} of generation {generation}, attempt {attempt}"
        for expert, outcome, generation, attempt in zip(
            *(array[bad_T].ravel().tolist() for array in (plan.expert_ids, plan.outcomes, plan.generations, plan.attempts)), strict=True
        )
    }
    where = f"rows {np.flatnonzero(bad_T).tolist()} of {bad_T.size} differ from what the plan gives"
    return f"{where}, in {bad_TD.sum()} numbers by {most} steps of bf16 at most; experts there: {'; '.join(sorted(answered))}"


def _steps(bits: NDArray[np.uint16]) -> NDArray[np.int32]:
    """Where bf16 numbers stand in their order, 0 in the middle: neighbours are one step apart."""
    size = (bits & 0x7FFF).astype(np.int32)
    return np.where(bits & 0x8000, -size, size)
