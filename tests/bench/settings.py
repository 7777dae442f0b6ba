"""What is measured: the experts, the cases, how often and for how long. Everything a figure depends on is here and in the report beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.util import find_spec

MODEL = "bench"
IDLE_MODEL = "idle"
LAYER = 0


@dataclass(frozen=True, slots=True)
class Sizes:
    """One MoE layer of gated bf16 experts. `idle_size` is the inner width of experts that do next to nothing."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_experts: int = 8
    top_k: int = 2
    idle_size: int = 8


@dataclass(frozen=True, slots=True)
class Case:
    """`callers` requests of `tokens` rows at a time, each caller sending its next one when it has its answer."""

    callers: int
    tokens: int
    model: str = MODEL

    @property
    def name(self) -> str:
        """How tables call it."""
        idle = ", idle experts" if self.model == IDLE_MODEL else ""
        return f"{self.callers} x {self.tokens}{idle}"


@dataclass(frozen=True, slots=True)
class Goal:
    """Ours against the process of its own: latency at most `latency_ratio` times, or throughput at least `throughput_ratio` times."""

    latency_ratio: float | None = None
    throughput_ratio: float | None = None


CASES = (Case(1, 8), Case(1, 64), Case(1, 1024), Case(16, 8), Case(16, 64), Case(8, 512), Case(1, 1, IDLE_MODEL))
GOALS = {
    Case(1, 8): Goal(latency_ratio=1.3),
    Case(1, 64): Goal(latency_ratio=1.25),
    Case(1, 1024): Goal(latency_ratio=1.2),
    Case(16, 8): Goal(throughput_ratio=0.5),
    Case(16, 64): Goal(throughput_ratio=0.75),
    Case(8, 512): Goal(throughput_ratio=0.85),
}
IDLE_GOAL_S = 0.0004
# Ray Serve needs more packages than Ray: `pip install "ray[serve]"`, best in an environment of its own.
SERVE_ROWS = ("serve_actors.per_expert", "serve_actors.all_in_one")


@dataclass(frozen=True, slots=True)
class Settings:
    """One run. Each row is measured `seconds` long in each of `rounds` rounds, the rows taking turns; warm-up is not counted."""

    sizes: Sizes = Sizes()
    cases: tuple[Case, ...] = CASES
    rounds: int = 5
    seconds: float = 1.0
    warm_up_calls: int = 3
    num_actors: int = field(default_factory=lambda: max(2, os.cpu_count() or 2))
    rows: tuple[str, ...] = ("in_process", "moelastic", "ray_actors", *(SERVE_ROWS if find_spec("fastapi") else ()))
    profile_calls: int = 200


SMOKE = Settings(
    sizes=Sizes(hidden_size=32, intermediate_size=64),
    cases=(Case(1, 8), Case(4, 2), Case(1, 1, IDLE_MODEL)),
    rounds=1,
    seconds=0.05,
    warm_up_calls=1,
    num_actors=2,
    profile_calls=5,
)
