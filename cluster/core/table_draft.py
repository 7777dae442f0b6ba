"""A routing table before it has a number: what the controller wants published. It gets the next epoch when it differs from the last one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from cluster.core.ids import CopyId, ExpertId, Incarnation
from cluster.core.routing_table import ActorEndpoint, RoutingTable, TableCopy, TableModel


@dataclass(frozen=True, slots=True)
class Held:
    """One copy in one life of an actor."""

    incarnation: Incarnation
    copy: CopyId


@dataclass(frozen=True, slots=True)
class TableDraft:
    """Endpoints, copies and models, without an epoch."""

    actors: Mapping[str, ActorEndpoint] = field(default_factory=dict)
    copies: Mapping[ExpertId, tuple[TableCopy, ...]] = field(default_factory=dict)
    models: Mapping[str, TableModel] = field(default_factory=dict)

    def at_epoch(self, epoch: int) -> RoutingTable:
        """The table under its number."""
        return RoutingTable(epoch, self.actors, self.copies, self.models)

    def held(self) -> Iterator[Held]:
        """Every published copy."""
        for expert, copies in self.copies.items():
            for copy in copies:
                yield Held(copy.incarnation, CopyId(expert, copy.version, copy.role))


def draft_of(table: RoutingTable) -> TableDraft:
    """The table without its number."""
    return TableDraft(dict(table.actors), dict(table.copies), dict(table.models))
