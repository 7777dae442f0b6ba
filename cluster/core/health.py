"""What routers last said of actors: who is sent nothing and why, whose queue is old, whose numbers were wrong. Facts only; `doubts` and `accusations` judge.

A router that has said nothing for REPORT_LIMIT_S is not believed any more: what it said may have long passed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.core.ids import CopyId, Incarnation

REPORT_LIMIT_S = 5.0
MAX_WRONG = 256


@dataclass(frozen=True, slots=True)
class LinkReport:
    """One router's view of one life of an actor. `oldest_age_s` and `queued_tokens` are of the rows that wait for it."""

    incarnation: Incarnation
    is_connected: bool = True
    is_ejected: bool = False
    is_suspected: bool = False
    evidence: str = ""
    oldest_age_s: float = 0.0
    queued_tokens: int = 0

    @property
    def is_out(self) -> bool:
        """Whether the router sends it nothing."""
        return self.is_ejected or not self.is_connected

    @property
    def why(self) -> str:
        """For people."""
        if self.is_connected:
            return f"ejected: {self.evidence or 'no progress'}"
        return f"link lost: {self.evidence or 'closed'}"


@dataclass(frozen=True, slots=True)
class Wrong:
    """A copy that answered with wrong numbers, as a router saw it. `kind`: non_finite or checksum."""

    incarnation: Incarnation
    copy: CopyId
    kind: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class RouterReport:
    """What one router said last, and when that came."""

    at_s: float
    links: Mapping[Incarnation, LinkReport] = field(default_factory=dict)

    def trouble(self) -> dict[Incarnation, tuple[bool, bool, bool]]:
        """The links that are not as they should be: what must change for the controller to look anew."""
        return {life: (link.is_connected, link.is_ejected, link.is_suspected) for life, link in self.links.items() if link.is_out or link.is_suspected}


@dataclass(frozen=True, slots=True)
class Health:
    """The newest report of each router, and accusations that no look has taken up yet."""

    routers: Mapping[str, RouterReport] = field(default_factory=dict)
    wrong: tuple[Wrong, ...] = ()

    def fresh(self, now_s: float) -> list[RouterReport]:
        """Reports that may still be believed."""
        return [report for report in self.routers.values() if now_s - report.at_s <= REPORT_LIMIT_S]

    def of(self, incarnation: Incarnation, now_s: float) -> list[LinkReport]:
        """What each router that may be believed says of one life; routers that do not know it are left out."""
        return [report.links[incarnation] for report in self.fresh(now_s) if incarnation in report.links]

    def is_calm(self, now_s: float) -> bool:
        """Whether nobody is ejected, lost or accused: nothing in here asks for a decision."""
        return not self.wrong and not any(report.trouble() for report in self.fresh(now_s))

    def queue_age_s(self, incarnation: Incarnation, now_s: float) -> float:
        """The age of the oldest rows that wait for an actor, at any router."""
        return max((link.oldest_age_s for link in self.of(incarnation, now_s)), default=0.0)


def with_report(health: Health, router_id: str, links: Iterable[LinkReport], wrong: Sequence[Wrong], now_s: float) -> Health:
    """Take one router's report for its earlier one."""
    report = RouterReport(now_s, {link.incarnation: link for link in links})
    return Health({**health.routers, router_id: report}, (*health.wrong, *wrong)[-MAX_WRONG:])


def has_news(before: Health, after: Health, router_id: str) -> bool:
    """Whether a router's newest report says something else of who is out, or accuses somebody: a reason to look at once."""
    earlier = before.routers.get(router_id)
    return len(after.wrong) > 0 or (earlier.trouble() if earlier is not None else {}) != after.routers[router_id].trouble()


def taken_up(health: Health, now_s: float) -> Health:
    """Without the accusations, which a decision has recorded, and without routers that have long been silent."""
    routers = {name: report for name, report in health.routers.items() if now_s - report.at_s <= REPORT_LIMIT_S}
    if not health.wrong and len(routers) == len(health.routers):
        return health
    return Health(routers)
