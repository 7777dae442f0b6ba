"""Which experts are hot, and where their further replicas go. A policy that suggests: reconciling decides, and takes back what repair needs.

An expert is hot when its copies get many times an even share of its layer's rows *and* rows wait at every actor that holds it, for some windows in
a row; one is added at a time. Two thresholds and two counts keep it from flapping (dask's active memory manager drops after N rounds; EPLB's next
copy goes to the largest load per copy).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.core.health import Health
from cluster.core.ids import CopyId, ExpertId, Role
from cluster.core.lifecycle import ActorView
from cluster.core.load import Load, faded
from cluster.core.placement import Layout
from cluster.core.spec import ReplicationSpec
from cluster.core.table_draft import TableDraft


@dataclass(frozen=True, slots=True)
class Warmth:
    """One expert's recent past: windows in a row in which it was hot or cold, how many further replicas it should have, and why."""

    num_hot: int = 0
    num_cold: int = 0
    num_further: int = 0
    why: str = ""


@dataclass(frozen=True, slots=True)
class Heat:
    """All experts that were hot lately, as of the window that ended at `at_s`."""

    at_s: float = 0.0
    experts: Mapping[ExpertId, Warmth] = field(default_factory=dict)

    def wanted(self) -> dict[ExpertId, Warmth]:
        """Experts that should have further replicas."""
        return {expert: warmth for expert, warmth in self.experts.items() if warmth.num_further}


def next_heat(heat: Heat, spec: ReplicationSpec, table: TableDraft, load: Load, health: Health, now_s: float) -> Heat:
    """Judge one more window. Cheap where nothing is hot: only experts above their layer's threshold are looked at closely."""
    if not spec.enabled:
        return Heat(now_s)
    load = faded(load, now_s)
    shares = _shares(load, table)
    experts: dict[ExpertId, Warmth] = {}
    for expert in {*heat.experts, *(expert for expert, share in shares.items() if share >= spec.hot_share)}:
        if expert not in table.copies:
            continue
        warmth = _judged(heat.experts.get(expert, Warmth()), expert, spec, table, shares.get(expert, 0.0), load, health, now_s)
        if warmth.num_hot or warmth.num_further:
            experts[expert] = warmth
    due = [expert for expert, warmth in experts.items() if warmth.num_hot >= spec.hot_windows]
    for expert in sorted(due, key=lambda expert: (-shares[expert] / _num_replicas(table, expert), expert))[:1]:
        experts[expert] = _one_more(experts[expert], expert, spec, table, load, health, now_s)
    return Heat(now_s, experts)


def _shares(load: Load, table: TableDraft) -> dict[ExpertId, float]:
    """Each expert's rows as a multiple of an even share of its layer's."""
    totals: dict[tuple[str, int], float] = defaultdict(float)
    for expert, rate in load.tokens_per_s.items():
        totals[expert.model, expert.layer] += rate
    widths = Counter((expert.model, expert.layer) for expert in table.copies) if totals else Counter[tuple[str, int]]()
    return {
        expert: rate * widths[expert.model, expert.layer] / totals[expert.model, expert.layer]
        for expert, rate in load.tokens_per_s.items()
        if totals[expert.model, expert.layer] > 0
    }


def _num_replicas(table: TableDraft, expert: ExpertId) -> int:
    return max(1, sum(1 for copy in table.copies.get(expert, ()) if copy.role is Role.REPLICA))


def _queue_s(table: TableDraft, expert: ExpertId, health: Health, now_s: float) -> float:
    """How long rows wait at the holder where they wait least: while one is free, another copy would not help."""
    holders = [copy.incarnation for copy in table.copies.get(expert, ()) if copy.role is Role.REPLICA]
    return min((health.queue_age_s(life, now_s) for life in holders), default=0.0)


def _judged(warmth: Warmth, expert: ExpertId, spec: ReplicationSpec, table: TableDraft, share: float, load: Load, health: Health, now_s: float) -> Warmth:
    num_replicas = _num_replicas(table, expert)
    is_busy = load.of(expert) >= spec.min_tokens_per_s
    waits = _queue_s(table, expert, health, now_s) >= spec.hot_queue_s
    is_hot = is_busy and waits and share / num_replicas >= spec.hot_share and num_replicas < spec.max_replicas
    is_cold = not is_busy or share / max(1, num_replicas - 1) < spec.cold_share
    num_hot = min(warmth.num_hot + 1, spec.hot_windows) if is_hot else 0
    num_cold = warmth.num_cold + 1 if is_cold else 0
    if warmth.num_further and num_cold >= spec.cold_windows:
        return Warmth(num_hot, 0, warmth.num_further - 1, warmth.why if warmth.num_further > 1 else "")
    return replace(warmth, num_hot=num_hot, num_cold=num_cold)


def _one_more(warmth: Warmth, expert: ExpertId, spec: ReplicationSpec, table: TableDraft, load: Load, health: Health, now_s: float) -> Warmth:
    """One replica more than it should have by now; it then must prove hot anew before the next."""
    total = sum(rate for other, rate in load.tokens_per_s.items() if (other.model, other.layer) == (expert.model, expert.layer))
    why = (
        f"hot: {100 * load.of(expert) / max(total, 1e-9):.0f} % of layer {expert.layer}'s rows,"
        f" queue age {1000 * _queue_s(table, expert, health, now_s):.0f} ms for {spec.hot_windows} windows"
    )
    return Warmth(0, 0, min(warmth.num_further + 1, spec.max_replicas - 1), why)


def place_further(
    layout: Layout, wanted: Mapping[ExpertId, Warmth], before: Mapping[CopyId, Sequence[str]], actors: Mapping[str, ActorView], reserve_actors: int
) -> Layout:
    """Give further replicas actors of their own, where free slots are left beside what repair may need; what has its place keeps it.

    Args:
        layout: the goal without them.
        wanted: how many each expert should have, and why.
        before: where they are now.
        actors: every recorded actor.
        reserve_actors: slots are left free for the copies of so many lost actors.
    """
    if not wanted and not before:
        return layout
    takers = {name: view for name, view in actors.items() if view.stays and view.report is not None}
    kept = _kept(layout, wanted, before, takers)
    free = _free(layout, kept, takers)
    num_free = sum(free.values())
    num_lost = sum(1 for homes in layout.homes.values() for name in homes if name not in takers) if len(takers) < len(layout.shape.all_ids) else 0
    if num_lost:
        return replace(layout, further=_shrunk(kept, wanted, num_lost - num_free))
    slots = sorted((view.record.num_slots for view in takers.values()), reverse=True)
    spare = num_free - sum(slots[:reserve_actors])
    experts = {copy: homes for copy, homes in layout.homes.items() if copy.expert in wanted}
    for copy in sorted(copy for copy in experts if copy.role is Role.REPLICA):
        avoided = {name for other, homes in experts.items() if other.expert == copy.expert for name in homes}
        while len(kept.get(copy, ())) < wanted[copy.expert].num_further and spare > 0:
            name = _place(copy, (*experts[copy], *kept.get(copy, ())), avoided, free, actors)
            if name is None:
                break
            kept[copy] = (*kept.get(copy, ()), name)
            free[name] -= 1
            spare -= 1
    return replace(layout, further={copy: names for copy, names in kept.items() if names})


def _kept(
    layout: Layout, wanted: Mapping[ExpertId, Warmth], before: Mapping[CopyId, Sequence[str]], takers: Mapping[str, ActorView]
) -> dict[CopyId, tuple[str, ...]]:
    """What is placed already and may stay: still wanted, in the version wanted, on an actor that answers and is not one of its homes."""
    kept = {}
    for copy, names in before.items():
        if copy in layout.homes and copy.expert in wanted:
            staying = [name for name in names if name in takers and name not in layout.homes[copy]]
            kept[copy] = tuple(staying[: wanted[copy.expert].num_further])
    return kept


def _free(layout: Layout, kept: Mapping[CopyId, Sequence[str]], takers: Mapping[str, ActorView]) -> dict[str, int]:
    """Slots left in each actor once it holds what belongs there."""
    free = {name: view.report.num_free_slots for name, view in takers.items() if view.report is not None}
    for copy, homes in (*layout.homes.items(), *kept.items()):
        for name in homes:
            if name in free and copy not in takers[name].by_copy:
                free[name] -= 1
    return {name: max(0, slots) for name, slots in free.items()}


def _shrunk(kept: Mapping[CopyId, tuple[str, ...]], wanted: Mapping[ExpertId, Warmth], num_needed: int) -> dict[CopyId, tuple[str, ...]]:
    """Without as many as lost copies need room, the coldest first."""
    result = dict(kept)
    for copy in sorted(kept, key=lambda copy: (-wanted[copy.expert].num_cold, copy)):
        while result[copy] and num_needed > 0:
            result[copy] = result[copy][:-1]
            num_needed -= 1
    return {copy: names for copy, names in result.items() if names}


def _place(copy: CopyId, taken: Sequence[str], avoided: set[str], free: Mapping[str, int], actors: Mapping[str, ActorView]) -> str | None:
    """The actor with most room that has no copy of this expert: on a node of its own where there is one, and away from the expert's shadow."""
    nodes = {actors[name].record.node_id for name in taken if name in actors}
    fitting = [name for name, slots in free.items() if slots > 0 and name not in taken and name not in avoided and actors[name].slot(copy) is None]
    return min(fitting, key=lambda name: (actors[name].record.node_id in nodes, -free[name], name), default=None)
