"""Which expert gets a shadow, and at what precision: the most damage avoided within a share of the primaries' bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.core.errors import ConfigError
from cluster.core.ids import ExpertId
from cluster.core.knapsack import MAX_STATES, Option, select

Cover = Literal["all", "useful"]


@dataclass(frozen=True, slots=True)
class ShadowOption:
    """A codec for one expert: packed bytes, and the damage to an answer while this shadow stands in."""

    codec: str
    num_bytes: int
    damage: float


@dataclass(frozen=True, slots=True)
class ShadowCandidate:
    """An expert that may get a shadow.

    `usage`: its share of choices, or any number in proportion to it. `damage_without`: what is lost while it is gone and has no shadow, in the unit of
    the options' damage (held-out bits per byte, squared output error, ...).
    """

    expert: ExpertId
    primary_bytes: int
    usage: float
    damage_without: float
    options: tuple[ShadowOption, ...]


@dataclass(frozen=True, slots=True)
class ShadowPlan:
    """The codec of each expert; None: no shadow. `damage` is what is left of `damage_without`, both weighted by usage.

    No plan within the budget, and with the same coverage, leaves less than `damage_bound`; it is `damage` where the plan is proven best.
    """

    codecs: Mapping[ExpertId, str | None]
    num_bytes: int
    budget_bytes: int
    damage: float
    damage_without: float
    damage_bound: float
    is_covered: bool


def plan_shadows(candidates: Sequence[ShadowCandidate], memory_fraction: float, cover: Cover = "all", *, max_states: int = MAX_STATES) -> ShadowPlan:
    """Pick none or a codec for each expert, within `memory_fraction` of the primaries' bytes.

    With `cover` "all" every expert gets a shadow when the budget allows it, even one that avoids nothing, so that no expert is lost to one failure;
    when it does not, and with "useful", bytes go where they avoid most. Raises ConfigError for numbers that cannot be planned with.
    """
    _check(candidates, memory_fraction)
    budget_bytes = math.floor(memory_fraction * sum(candidate.primary_bytes for candidate in candidates))
    is_covered = cover == "all" and _least_bytes(candidates) <= budget_bytes
    groups = [_options(candidate, may_skip=not is_covered) for candidate in candidates]
    selection = select(groups, budget_bytes, max_states=max_states)
    codecs = {candidate.expert: _codec(candidate, pick) for candidate, pick in zip(candidates, selection.picks, strict=True)}
    without = math.fsum(candidate.usage * candidate.damage_without for candidate in candidates)
    return ShadowPlan(
        codecs,
        selection.num_bytes,
        budget_bytes,
        without - selection.value,
        without,
        without - selection.bound,
        is_covered=None not in codecs.values(),
    )


def _options(candidate: ShadowCandidate, *, may_skip: bool) -> list[Option]:
    """The candidate's codecs in their order, and after them none."""
    shadows = [Option(option.num_bytes, candidate.usage * (candidate.damage_without - option.damage)) for option in candidate.options]
    return [*shadows, Option(0, 0.0)] if may_skip else shadows


def _codec(candidate: ShadowCandidate, pick: int) -> str | None:
    return candidate.options[pick].codec if pick < len(candidate.options) else None


def _least_bytes(candidates: Sequence[ShadowCandidate]) -> float:
    return sum(min((option.num_bytes for option in candidate.options), default=math.inf) for candidate in candidates)


def _check(candidates: Sequence[ShadowCandidate], memory_fraction: float) -> None:
    if not (math.isfinite(memory_fraction) and memory_fraction >= 0.0):
        message = "shadow.memory_fraction must be 0 or more; 0.15 is the default"
        raise ConfigError(message)
    if len({candidate.expert for candidate in candidates}) != len(candidates):
        message = "shadow plan: an expert is listed twice; list each once"
        raise ConfigError(message)
    for candidate in candidates:
        measured = [candidate.usage, candidate.damage_without, *(option.damage for option in candidate.options)]
        sizes = [candidate.primary_bytes, *(option.num_bytes for option in candidate.options)]
        if not all(math.isfinite(value) and value >= 0.0 for value in measured) or min(sizes) <= 0:
            message = f"shadow plan: expert {candidate.expert} needs finite usage and damage of 0 or more and sizes above 0; measure it again"
            raise ConfigError(message)
