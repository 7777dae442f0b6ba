"""The routing table: an immutable map from experts to the copies that may answer for them, and its number, the epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from cluster.core.errors import InvariantBroken, StaleTable
from cluster.core.ids import ExpertId, Incarnation, Role


@dataclass(frozen=True, slots=True)
class ActorEndpoint:
    """Where one incarnation of an expert actor listens for links."""

    incarnation: Incarnation
    host: str
    port: int
    node_id: str
    device: str = "cpu"


class TableCopy(NamedTuple):
    """One copy of an expert that is loaded, verified and published."""

    incarnation: Incarnation
    version: str
    role: Role = Role.REPLICA


@dataclass(frozen=True, slots=True)
class TableModel:
    """A model as routers see it. `manifest` is the digest of its manifest in every node's store; `num_missing` counts experts without a copy.

    `ladder` says what may answer for an expert without a full-precision copy, in this order (`models[].ladder`).
    """

    name: str
    manifest: str
    num_experts: int
    num_missing: int
    ladder: tuple[str, ...] = ("shadow",)


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """One epoch of the map. Copies of an expert are ordered: replicas first, then the shadow; ties by incarnation."""

    epoch: int
    actors: Mapping[str, ActorEndpoint] = field(default_factory=dict)
    copies: Mapping[ExpertId, tuple[TableCopy, ...]] = field(default_factory=dict)
    models: Mapping[str, TableModel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("actors", "copies", "models"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        for expert, copies in self.copies.items():
            for copy in copies:
                endpoint = self.actors.get(copy.incarnation.actor_id)
                if endpoint is None or endpoint.incarnation != copy.incarnation:
                    message = f"table {self.epoch}: {expert} is published on {copy.incarnation}, which has no endpoint"
                    raise InvariantBroken(message)

    def copies_of(self, expert: ExpertId) -> tuple[TableCopy, ...]:
        """Every published copy of an expert, replicas first; empty when it is lost."""
        return self.copies.get(expert, ())

    def is_complete(self, model: str) -> bool:
        """Whether every expert of the model has a copy."""
        entry = self.models.get(model)
        return entry is not None and entry.num_missing == 0


def newer(current: RoutingTable | None, offered: RoutingTable) -> RoutingTable:
    """The offered table, unless it is older than the current one: then StaleTable. The same epoch again is accepted."""
    if current is not None and offered.epoch < current.epoch:
        message = f"table epoch {offered.epoch} is older than {current.epoch}, which is in use; the sender must re-read the store"
        raise StaleTable(message)
    return offered
