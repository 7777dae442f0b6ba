"""What became of every (token, choice): counted for every reply, told one by one in a PLAN.

Shape legend: T tokens, K choices of a token, V versions that answered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from cluster.core.errors import InvariantBroken
from cluster.core.ids import Role

NOBODY = -1
MAX_ATTEMPT = 255


class Outcome(IntEnum):
    """How a choice ended; the numbers are those of the proto."""

    EXACT = 1
    SHADOW = 2
    OMITTED = 3
    GENERALIST = 4
    DENSE = 5
    DROPPED = 6
    UNUSED = 7


OUTCOME_NAMES = {outcome: outcome.name.lower() for outcome in Outcome}
OUTCOME_OF_ROLE = {Role.REPLICA: Outcome.EXACT, Role.SHADOW: Outcome.SHADOW}


@dataclass(frozen=True, slots=True)
class Plan:
    """Who answered what, enough to recompute the reply (`router_service.replay`). All arrays are [T, K].

    `expert_ids` int32, -1 where unused or dropped; `weights` fp32 as used in the combine; `outcomes` uint8; `version_index` int32 into `versions`, -1 where
    nobody computed, the fallback's where one did; `generations` int32, -1 where no copy answered; `attempts` uint8, from 0. `versions` are SHA-256 digests,
    32 bytes each.
    """

    expert_ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    outcomes: NDArray[np.uint8]
    version_index: NDArray[np.int32]
    generations: NDArray[np.int32]
    attempts: NDArray[np.uint8]
    versions: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Choices by outcome; with `unused` they sum to T x K. `degraded_tokens` have a choice that is neither exact nor unused."""

    exact: int = 0
    shadow: int = 0
    omitted: int = 0
    generalist: int = 0
    dense: int = 0
    dropped: int = 0
    unused: int = 0
    epoch: int = 0
    degraded_tokens: int = 0
    plan: Plan | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Choices by outcome name."""
        return {name: getattr(self, name) for name in OUTCOME_NAMES.values()}

    @property
    def num_choices(self) -> int:
        """All choices, the unused ones among them: T x K."""
        return sum(self.counts.values())


@dataclass(frozen=True, slots=True)
class Answer:
    """Who answered for all choices of one expert in one request. `version` is a SHA-256 digest in hex."""

    version: str
    generation: int
    role: Role
    attempt: int


class Ledger:
    """The account of one request's choices; it starts with those that nobody shall compute and is closed when all others are answered."""

    def __init__(self, expert_ids_TK: NDArray[np.int32], weights_TK: NDArray[np.float32], dropped_TK: NDArray[np.bool_]) -> None:
        self._expert_ids = expert_ids_TK
        self._weights = weights_TK
        self._outcomes = np.where(dropped_TK, Outcome.DROPPED, np.where(expert_ids_TK < 0, Outcome.UNUSED, 0)).astype(np.uint8)
        self._answers: dict[int, Answer] = {}
        self._fallbacks: dict[Outcome, str] = {}

    def answered(self, index: int, answer: Answer) -> None:
        """Every choice of expert `index` was answered. Raises InvariantBroken when it was already: a choice counts once."""
        if index in self._answers:
            message = f"expert index {index} was answered twice in one request"
            raise InvariantBroken(message)
        self._answers[index] = answer
        self._outcomes[self._expert_ids == index] = OUTCOME_OF_ROLE[answer.role]

    def stood_in(self, outcomes_TK: NDArray[np.uint8], weights_TK: NDArray[np.float32], versions: Mapping[Outcome, str]) -> None:
        """What the ladder decided for lost choices: outcomes where they are not 0, the weights that the combine used, and the version of each fallback.

        Raises InvariantBroken when a choice was answered already: a choice counts once.
        """
        is_lost_TK = outcomes_TK != 0
        if self._outcomes[is_lost_TK].any():
            message = "the ladder decided for a choice that has an outcome"
            raise InvariantBroken(message)
        self._outcomes = np.where(is_lost_TK, outcomes_TK, self._outcomes)
        self._weights = weights_TK
        self._fallbacks = {outcome: version for outcome, version in versions.items() if (outcomes_TK == outcome).any()}

    def report(self, *, epoch: int, want_plan: bool) -> Report:
        """The account. Raises InvariantBroken when a choice has no outcome."""
        counts = np.bincount(self._outcomes.ravel(), minlength=Outcome.UNUSED + 1).tolist()
        if counts[0]:
            message = f"{counts[0]} choices ended without an outcome"
            raise InvariantBroken(message)
        named = {name: counts[outcome] for outcome, name in OUTCOME_NAMES.items()}
        degraded = 0
        if counts[Outcome.EXACT] + counts[Outcome.UNUSED] < self._outcomes.size:
            fine_TK = (self._outcomes == Outcome.EXACT) | (self._outcomes == Outcome.UNUSED)
            degraded = int((~fine_TK).any(axis=1).sum())
        return Report(**named, epoch=epoch, degraded_tokens=degraded, plan=self._plan() if want_plan else None)

    def _plan(self) -> Plan:
        versions = sorted({*(answer.version for answer in self._answers.values()), *self._fallbacks.values()})
        version_index = np.full(self._expert_ids.shape, NOBODY, np.int32)
        generations = np.full(self._expert_ids.shape, NOBODY, np.int32)
        attempts = np.zeros(self._expert_ids.shape, np.uint8)
        for index, answer in self._answers.items():
            mine_TK = self._expert_ids == index
            version_index[mine_TK] = versions.index(answer.version)
            generations[mine_TK] = answer.generation
            attempts[mine_TK] = min(answer.attempt, MAX_ATTEMPT)
        for outcome, version in self._fallbacks.items():
            version_index[self._outcomes == outcome] = versions.index(version)
        digests = tuple(bytes.fromhex(version) for version in versions)
        return Plan(self._expert_ids, self._weights, self._outcomes, version_index, generations, attempts, digests)
