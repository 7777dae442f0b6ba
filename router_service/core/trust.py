"""How far copies are trusted: by what liveness says of their actors, and by wrong numbers that they gave. Sans-io.

Lower ranks are asked first. A copy with wrong numbers is never asked again while a routing table still has it; the table drops it once the
controller has withdrawn it, and a copy that is published anew is trusted anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import IntEnum

from cluster.core.ids import ExpertId
from cluster.core.routing_table import RoutingTable, TableCopy

MAX_ACCUSED = 1024
MAX_PER_TENANT = 16
MINUTE_S = 60.0


class Rank(IntEnum):
    """In which order copies are asked: good ones, then doubtful ones (suspected), then those that are asked only where nobody else is left (ejected)."""

    GOOD = 0
    DOUBTFUL = 1
    LAST = 2
    NEVER = 3


Accusation = tuple[ExpertId, TableCopy, str]


class Trust:
    """Who is trusted. `rank_of_actor(incarnation)` is liveness's word; while `is_calm` every copy is good and need not be asked about."""

    def __init__(self) -> None:
        self.actors: dict[str, Rank] = {}
        self._accused: dict[tuple[ExpertId, TableCopy], str] = {}
        self._counts: Counter[Accusation] = Counter()
        self._table: RoutingTable | None = None
        self._by_tenant: dict[str, tuple[float, int]] = {}
        self.on_accused: Callable[[], None] = lambda: None

    @property
    def is_calm(self) -> bool:
        """Whether nobody is under suspicion."""
        return not self.actors and not self._accused

    def rank(self, expert: ExpertId, copy: TableCopy) -> Rank:
        """How far a copy is trusted."""
        if (expert, copy) in self._accused:
            return Rank.NEVER
        return self.actors.get(str(copy.incarnation), Rank.GOOD) if self.actors else Rank.GOOD

    def set_actor(self, actor: str, rank: Rank) -> None:
        """Liveness's newest word about an incarnation (`str(incarnation)`)."""
        if rank is Rank.GOOD:
            self.actors.pop(actor, None)
        else:
            self.actors[actor] = rank

    def accuse(self, expert: ExpertId, copy: TableCopy, kind: str, *, by: str, now_s: float) -> bool:
        """A copy gave wrong numbers (`kind`: non_finite, checksum) to a tenant's rows.

        False: this tenant has accused so many within a minute that one more is not believed; or the newest table has no such copy any more: nobody is
        sent to it, and where it comes back it was loaded anew. Beyond MAX_ACCUSED the oldest accusation is forgotten.
        """
        if (self._table is not None and copy not in self._table.copies_of(expert)) or not self._may_accuse(by, now_s):
            return False
        self._accused[expert, copy] = kind
        self._counts[expert, copy, kind] += 1
        if len(self._accused) > MAX_ACCUSED:
            del self._accused[next(iter(self._accused))]
        self.on_accused()
        return True

    def _may_accuse(self, tenant: str, now_s: float) -> bool:
        since_s, count = self._by_tenant.get(tenant, (now_s, 0))
        if now_s - since_s >= MINUTE_S:
            since_s, count = now_s, 0
        if count >= MAX_PER_TENANT or (tenant not in self._by_tenant and len(self._by_tenant) >= MAX_ACCUSED):
            return False
        self._by_tenant[tenant] = (since_s, count + 1)
        return True

    def take_accusations(self) -> Counter[Accusation]:
        """Every accusation that stands, with how often it was seen since the last call, for the controller.

        All of them each time: whoever was told before may have ended before it did anything, or believed only so many. Nobody else would ever take a
        copy out that is asked no more.
        """
        counts, self._counts = self._counts, Counter()
        return Counter({(*key, kind): counts[*key, kind] for key, kind in self._accused.items()})

    def adopt(self, table: RoutingTable) -> None:
        """Forget what the table no longer has."""
        self._table = table
        self._accused = {key: kind for key, kind in self._accused.items() if key[1] in table.copies_of(key[0])}
        names = {str(endpoint.incarnation) for endpoint in table.actors.values()}
        self.actors = {actor: rank for actor, rank in self.actors.items() if actor in names}
