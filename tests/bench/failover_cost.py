"""What readiness for failures costs while nothing fails: one layer, served with liveness, hedging, ladder, non-finite check and checksums on and off.

All variants run at once and take turns, each called by a process of its own, in another order in each round; every ratio is one of neighbours in a round.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from bench.bare_router import BARE_ROUTER
from bench.layer import save_layer
from bench.processes import ACTOR, ROUTER, pids_on
from bench.rig import with_bench
from bench.rows import CallerProcess, Row, Sample, settle
from bench.settings import MODEL, OURS, Case, Settings
from bench.tables import Section, Table
from cluster.core.spec import AbftSpec, ActorsSpec, ClusterSpec, HedgingSpec, ModelSpec, RouterSpec, ShadowSpec
from cluster.local.cluster import LocalCluster
from kit.deployments import deployed

OFF = "everything off"
# Times the rounds of the other sections: a hundredth is looked for here.
ROUNDS_FACTOR = 3
NEVER_S = 1e9


@dataclass(frozen=True, slots=True)
class Variant:
    """One deployment. `fraction` of frames is checked by sums; `goal`: the least throughput, beside everything off."""

    name: str
    fraction: float
    goal: float | None = None


VARIANTS = (
    Variant(OFF, 0.0),
    Variant("defaults, no checksums", 0.0, 0.98),
    Variant("defaults", AbftSpec().fraction, 0.97),
    Variant("every frame checked", 1.0, 0.75),
)


def run(cluster: LocalCluster, settings: Settings, folder: Path) -> Section:
    """Deploy every variant, then let them take turns."""
    path = save_layer(folder / "cost-model", settings.sizes, settings.sizes.intermediate_size)
    with ExitStack() as ending:
        rows = {variant.name: _served(cluster, settings, folder, path, variant, ending) for variant in VARIANTS}
        settle()
        num_rounds = ROUNDS_FACTOR * settings.rounds if settings.rounds > 1 else 1
        for number in range(num_rounds):
            for case in settings.cost_cases:
                for place in range(len(VARIANTS)):
                    rows[VARIANTS[(place + number) % len(VARIANTS)].name].take(case, settings)
    return section_of({name: row.samples for name, row in rows.items()}, settings.cost_cases)


def spec_of(variant: Variant, settings: Settings, path: Path) -> ClusterSpec:
    """The spec of one variant; all of them fit on one logical GPU for each actor."""
    is_on = variant.name != OFF
    shadow, ladder = (ShadowSpec(), ("shadow", "fewer_experts")) if is_on else (None, ())
    num_gpus = 1 / (settings.num_actors * len(VARIANTS))
    return ClusterSpec(
        name=f"bench-cost-{VARIANTS.index(variant)}",
        models=(ModelSpec(name=MODEL, path=path, shadow=shadow, ladder=ladder),),
        actors=ActorsSpec(count=settings.num_actors, num_gpus=num_gpus, free_slots=0, start_parallelism=2, layout=settings.layout),
        router=RouterSpec(port=0),
        hedging=HedgingSpec(enabled=is_on),
        abft=AbftSpec(fraction=variant.fraction) if is_on else AbftSpec(fraction=0.0, redigest_s=NEVER_S),
    )


def _served(cluster: LocalCluster, settings: Settings, folder: Path, path: Path, variant: Variant, ending: ExitStack) -> Row:
    """One variant's caller, ready."""
    spec = spec_of(variant, settings, path)
    place = folder / spec.name
    place.mkdir()
    deployer = "bench.bare_router" if variant.name == OFF else "cluster.deploy"
    before = {*pids_on(cluster, ROUTER), *pids_on(cluster, ACTOR)}
    deployment = ending.enter_context(deployed(cluster, spec, place, deployer))
    servers = tuple(pid for name in (ROUTER, ACTOR) for pid in pids_on(cluster, name) if pid not in before)
    is_bare = any(pid in servers for pid in pids_on(cluster, BARE_ROUTER))
    if is_bare != (variant.name == OFF) or len(servers) != 1 + settings.num_actors:
        message = f"{variant.name}: one router and {settings.num_actors} actors of its own were expected, found processes {servers}, bare: {is_bare}"
        raise RuntimeError(message)
    connection = deployment.connection
    options = {"address": connection.router_address, "token_file": str(connection.token_path)}
    caller = CallerProcess(OURS, {}, settings, options, with_bench(dict(os.environ)))
    ending.callback(caller.close)
    caller.wait_until_ready()
    return Row(variant.name, caller, servers=servers)


@dataclass(frozen=True, slots=True)
class Cost:
    """One variant in one case: medians over rounds, with the least and the most beside. Ratios are of each round, beside everything off.

    `cpu_s_per_call`: of caller, router and actors together; `cpu_ratio` beside everything off.
    """

    case: str
    variant: str
    tokens_per_s: float
    tokens_spread_per_s: tuple[float, float]
    ratio: float
    ratio_spread: tuple[float, float]
    ratio_quartiles: tuple[float, float]
    cpu_s_per_call: float
    cpu_ratio: float
    goal: float | None
    num_rounds: int
    num_calls: int

    @property
    def is_reached(self) -> bool | None:
        """None without a goal."""
        return None if self.goal is None else self.ratio >= self.goal


def cost_of(case: Case, variant: Variant, own: Sequence[Sample], off: Sequence[Sample]) -> Cost:
    """From the samples of a variant and of everything off, round by round."""
    rates = [sample.tokens_per_s for sample in own]
    ratios = sorted(sample.tokens_per_s / bare.tokens_per_s for sample, bare in zip(own, off, strict=True))
    quarter = len(ratios) // 4
    return Cost(
        case=case.name,
        variant=variant.name,
        tokens_per_s=median(rates),
        tokens_spread_per_s=(min(rates), max(rates)),
        ratio=median(ratios),
        ratio_spread=(ratios[0], ratios[-1]),
        ratio_quartiles=(ratios[quarter], ratios[-1 - quarter]),
        cpu_s_per_call=median(map(_cpu_s, own)),
        cpu_ratio=median(_cpu_s(sample) / _cpu_s(bare) for sample, bare in zip(own, off, strict=True)),
        goal=variant.goal,
        num_rounds=len(own),
        num_calls=sum(len(sample.latencies_s) for sample in own),
    )


def _cpu_s(sample: Sample) -> float:
    return sample.cpu_s_per_call + sample.server_cpu_s_per_call


def section_of(samples: dict[str, dict[Case, list[Sample]]], cases: Sequence[Case]) -> Section:
    """The table, and what is behind it."""
    costs = [cost_of(case, variant, samples[variant.name][case], samples[OFF][case]) for case in cases for variant in VARIANTS]
    shown = {True: "yes", False: "NO", None: ""}
    rows = [
        (
            cost.case,
            cost.variant,
            f"{cost.tokens_per_s:,.0f} ({cost.tokens_spread_per_s[0]:,.0f}-{cost.tokens_spread_per_s[1]:,.0f})",
            f"{cost.ratio:.3f} ({cost.ratio_quartiles[0]:.3f}-{cost.ratio_quartiles[1]:.3f}; {cost.ratio_spread[0]:.2f}-{cost.ratio_spread[1]:.2f})",
            f"{1e3 * cost.cpu_s_per_call:.2f}",
            f"{cost.cpu_ratio:.3f}",
            "" if cost.goal is None else f"at least {cost.goal}",
            shown[cost.is_reached],
        )
        for cost in costs
    ]
    columns = ("case", "variant", "tokens/s", "x everything off", "CPU ms/request", "CPU x everything off", "goal", "reached")
    note = (
        f"callers x tokens; medians of {costs[0].num_rounds} rounds in turns; in brackets smallest and largest round, of ratios the middle half before them."
        " Off: no liveness, hedging, ladder, shadows, non-finite check or checksums. CPU is that of caller, router and actors."
    )
    return Section([Table("what readiness for failures costs while nothing fails", columns, rows, note)], {"costs": [asdict(cost) for cost in costs]})
