"""What routers told the controller, kept between two looks: load, health, and which experts are hot. Holds facts; `core` judges them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from cluster.core.health import Health, LinkReport, Wrong, has_news, taken_up, with_report
from cluster.core.ids import ExpertId, Incarnation
from cluster.core.load import Load, with_window
from cluster.core.reconcile import Told
from cluster.core.replication import Heat, Warmth, next_heat
from cluster.core.spec import ReplicationSpec
from cluster.core.table_draft import TableDraft


class RouterReports:
    """The newest words of every router."""

    def __init__(self) -> None:
        self._load, self._health, self._heat = Load(), Health(), Heat()
        self._hot: Mapping[ExpertId, Warmth] = {}
        self._decided_hot: Mapping[ExpertId, Warmth] = {}

    @property
    def told(self) -> Told:
        """All of it, for a decision."""
        return Told(self._load, self._health, self._hot)

    def fold(self, router_id: str, links: Iterable[LinkReport], tokens: Mapping[ExpertId, int], window_s: float, wrong: Sequence[Wrong], now_s: float) -> bool:
        """Take one report. Whether it says something new of who is out, or accuses somebody: then it is worth a look at once."""
        self._load = with_window(self._load, tokens, window_s, now_s)
        before = self._health
        self._health = with_report(before, router_id, links, wrong, now_s)
        return has_news(before, self._health, router_id)

    def out(self, now_s: float) -> frozenset[Incarnation]:
        """Lives that a router sends nothing: a look does not wait for them."""
        return frozenset(life for report in self._health.fresh(now_s) for life, link in report.links.items() if link.is_out)

    def judge_heat(self, spec: ReplicationSpec, table: TableDraft, now_s: float) -> None:
        """One window more for the replication policy, when it is time."""
        if now_s - self._heat.at_s >= spec.window_s:
            self._heat = next_heat(self._heat, spec, table, self._load, self._health, now_s)
            self._hot = self._heat.wanted()

    def is_calm(self, now_s: float) -> bool:
        """Whether nothing here asks for another decision than the last."""
        return self._health.is_calm(now_s) and {expert: warmth.num_further for expert, warmth in self._hot.items()} == {
            expert: warmth.num_further for expert, warmth in self._decided_hot.items()
        }

    def note_decided(self, told: Told, now_s: float) -> None:
        """A decision was made and recorded from these words: accusations are taken up, silent routers forgotten."""
        self._decided_hot = told.hot
        if self._health is told.health:
            self._health = taken_up(self._health, now_s)
