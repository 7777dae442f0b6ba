"""How busy each expert is, from the windows that routers report. Rates fade with a half-life, so an expert that falls silent is forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.core.ids import ExpertId

HALF_LIFE_S = 10.0
MIN_TOKENS_PER_S = 1e-3
MAX_WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    """Tokens per second of each expert, over all routers, as of `at_s`."""

    at_s: float = 0.0
    tokens_per_s: Mapping[ExpertId, float] = field(default_factory=dict)

    def of(self, expert: ExpertId) -> float:
        """The rate of one expert; 0 when nothing was reported."""
        return self.tokens_per_s.get(expert, 0.0)


def faded(load: Load, now_s: float) -> Load:
    """The rates as of now, when nothing was reported since: routers that are gone report nothing more."""
    fade = 0.5 ** (max(0.0, now_s - load.at_s) / HALF_LIFE_S)
    return Load(now_s, {expert: rate * fade for expert, rate in load.tokens_per_s.items() if rate * fade >= MIN_TOKENS_PER_S})


def with_window(load: Load, tokens: Mapping[ExpertId, int], window_s: float, now_s: float) -> Load:
    """Fold in one router's counts over `window_s` seconds. Windows of zero or negative length are ignored."""
    if window_s <= 0:
        return load
    fade = 0.5 ** (max(0.0, now_s - load.at_s) / HALF_LIFE_S)
    weight = 1.0 - 0.5 ** (min(window_s, MAX_WINDOW_S) / HALF_LIFE_S)
    rates = {expert: rate * fade for expert, rate in load.tokens_per_s.items()}
    for expert, count in tokens.items():
        rates[expert] = rates.get(expert, 0.0) + weight * count / window_s
    return Load(now_s, {expert: rate for expert, rate in rates.items() if rate >= MIN_TOKENS_PER_S})
