"""What is measured: the experts, the cases, how often and for how long. Everything a figure depends on is here and in the report beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal, get_args

MODEL = "bench"
IDLE_MODEL = "idle"
# The same layer as `MODEL`, served in fp32: what hivemind computes in.
WIDE_MODEL = "bench-fp32"
LAYER = 0
ShadowCodec = Literal["int8", "int4", "int3", "int2", "lowrank", "int2-lowrank", "narrow4"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """One MoE layer of gated bf16 experts. `idle_size` is the inner width of experts that do next to nothing."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_experts: int = 8
    top_k: int = 2
    idle_size: int = 8


# The model that this project ships, as `generate()` is measured on it.
LANGUAGE_MODEL = "tiny-moe-lm"
SUFFIXES = {MODEL: "", IDLE_MODEL: ", idle experts", WIDE_MODEL: ", fp32"}


@dataclass(frozen=True, slots=True)
class Case:
    """`callers` requests of `tokens` rows at a time, each caller sending its next one when it has its answer."""

    callers: int
    tokens: int
    model: str = MODEL

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.callers} x {self.tokens}{SUFFIXES.get(self.model, f', {self.model}')}"


@dataclass(frozen=True, slots=True)
class Goal:
    """Ours against the process of its own: latency at most `latency_ratio` times, or throughput at least `throughput_ratio` times."""

    latency_ratio: float | None = None
    throughput_ratio: float | None = None
    better_serve: float = 1.0
    serve_per_expert: float | None = None


ONE_CALLER = (Case(1, 8), Case(1, 64), Case(1, 1024))
MANY_CALLERS = (Case(16, 8), Case(16, 64), Case(8, 512))
WIDE_CASES = (Case(1, 8, WIDE_MODEL), Case(1, 64, WIDE_MODEL))
CASES = (*ONE_CALLER, *MANY_CALLERS, Case(1, 1, IDLE_MODEL), *WIDE_CASES)
GOALS = {
    Case(1, 8): Goal(latency_ratio=1.3, better_serve=2.0),
    Case(1, 64): Goal(latency_ratio=1.25, better_serve=1.6),
    Case(1, 1024): Goal(latency_ratio=1.2, better_serve=1.1),
    Case(16, 8): Goal(throughput_ratio=0.5, better_serve=2.5, serve_per_expert=25.0),
    Case(16, 64): Goal(throughput_ratio=0.75, better_serve=1.7),
    Case(8, 512): Goal(throughput_ratio=0.85, better_serve=1.15),
}
IDLE_GOAL_S = 0.0004
HIVEMIND_GOAL = 8.0
OURS = "moelastic"
IN_PROCESS = "in_process"
PACKED = "in_process.packed"
ECHO = "grpc_echo"
HIVEMIND = "hivemind_peer"
# They need more packages than we do: `pip install -c constraints.txt -e .[bench]`, or `make bench`.
ALL_IN_ONE = "serve_actors.all_in_one"
PER_EXPERT = "serve_actors.per_expert"
SERVE_ROWS = (PER_EXPERT, ALL_IN_ONE)
ROWS = (IN_PROCESS, PACKED, OURS, "ray_actors", *SERVE_ROWS, HIVEMIND)
NEEDS = {**dict.fromkeys(SERVE_ROWS, "fastapi"), HIVEMIND: "hivemind"}


def missing(row: str) -> str:
    """Why a row cannot be measured here; empty when it can."""
    package = NEEDS.get(row)
    return "" if package is None or find_spec(package) else f"{package} is not installed; make bench, or: pip install -c constraints.txt -e .[bench]"


@dataclass(frozen=True, slots=True)
class Settings:
    """One run. Each row is measured `seconds` long in each of `rounds` rounds, the rows taking turns; warm-up is not counted."""

    sizes: Sizes = Sizes()
    cases: tuple[Case, ...] = CASES
    rounds: int = 8
    seconds: float = 0.35
    warm_up_calls: int = 3
    num_actors: int = field(default_factory=lambda: max(2, os.cpu_count() or 2))
    rows: tuple[str, ...] = ROWS
    profile_calls: int = 200
    leak_requests: int = 200_000
    overload_seconds: float = 6.0
    language_model: bool = True
    layout: Literal["mapped", "packed", "widened", "auto"] = "packed"
    cost_cases: tuple[Case, ...] = MANY_CALLERS
    shadow_codecs: tuple[ShadowCodec, ...] = get_args(ShadowCodec)
    gpus_per_node: int = 1
    abft_flips: int = 3000
    abft_frames: int = 2000


SMOKE = Settings(
    sizes=Sizes(hidden_size=32, intermediate_size=64),
    cases=(Case(1, 8), Case(4, 2), Case(1, 1, IDLE_MODEL), Case(1, 2, WIDE_MODEL)),
    rounds=1,
    seconds=0.05,
    warm_up_calls=1,
    num_actors=2,
    profile_calls=5,
    language_model=False,
    cost_cases=(Case(2, 4),),
    shadow_codecs=("int2", "narrow4"),
    abft_flips=8,
    abft_frames=4,
)
