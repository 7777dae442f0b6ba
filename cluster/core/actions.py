"""What a decision asks of the fleet, as data. Each action says why, and has a key: of two actions with one key only one may be under way."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.core.descriptors import DType
from cluster.core.ids import CopyId, Incarnation
from cluster.core.spec import ShadowSpec


@dataclass(frozen=True, slots=True)
class ImportModel:
    """Read a model's checkpoint on the head node and digest it; with `shadow`, plan and make shadows of its experts."""

    model: str
    node_id: str
    source: Path
    dtype: DType | Literal["checkpoint"]
    reason: str = ""
    shadow: ShadowSpec | None = None

    @property
    def key(self) -> str:
        """One import of a model from one folder at a time; a corrected path is another import, and what the first one finds no longer counts."""
        asked = "" if self.shadow is None else f" shadow-{hashlib.sha256(self.shadow.model_dump_json().encode()).hexdigest()[:8]}"
        return f"import_model {self.model} {self.source} {self.dtype}{asked}"


@dataclass(frozen=True, slots=True)
class ImportExperts:
    """Lay verified experts ((layer, index)), shadows and all gates of a model into a node's store.

    `distrusted` are versions among them whose blobs are read and digested again, also if that was done before.
    """

    node_id: str
    model: str
    experts: frozenset[tuple[int, int]]
    reason: str = ""
    shadows: frozenset[CopyId] = frozenset()
    distrusted: frozenset[str] = frozenset()

    @property
    def key(self) -> str:
        """One import per node and model at a time."""
        return f"import_experts {self.model} {self.node_id}"


@dataclass(frozen=True, slots=True)
class StartActor:
    """Start a recorded incarnation; repeating it for one that runs is harmless."""

    incarnation: Incarnation
    node_id: str
    num_slots: int
    reason: str = ""

    @property
    def key(self) -> str:
        """Of an actor, not of its life: failures of earlier lives delay the next."""
        return f"start {self.incarnation.actor_id}"


@dataclass(frozen=True, slots=True)
class StopActor:
    """Stop one incarnation: in order when it answers, else by force; `at_once`: by force, without asking."""

    incarnation: Incarnation
    reason: str = ""
    at_once: bool = False

    @property
    def key(self) -> str:
        """One stop per life."""
        return f"stop {self.incarnation}"


@dataclass(frozen=True, slots=True)
class Assume:
    """Load copies into free slots."""

    incarnation: Incarnation
    copies: tuple[CopyId, ...]
    reason: str = ""

    @property
    def key(self) -> str:
        """One assume per life at a time: the next look must see the last one's slots."""
        return f"assume {self.incarnation}"


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no new segments for copies that are no longer published."""

    incarnation: Incarnation
    copies: tuple[CopyId, ...]
    reason: str = ""

    @property
    def key(self) -> str:
        """One drain per life at a time."""
        return f"drain {self.incarnation}"


@dataclass(frozen=True, slots=True)
class Release:
    """Free the slots of drained or failed copies."""

    incarnation: Incarnation
    copies: tuple[CopyId, ...]
    reason: str = ""

    @property
    def key(self) -> str:
        """One release per life at a time."""
        return f"release {self.incarnation}"


@dataclass(frozen=True, slots=True)
class StartRouter:
    """Start a router; repeating it for one that runs is harmless."""

    router_id: str
    node_id: str
    reason: str = ""

    @property
    def key(self) -> str:
        """One start per router."""
        return f"start {self.router_id}"


@dataclass(frozen=True, slots=True)
class StopRouter:
    """Stop a router after its requests."""

    router_id: str
    reason: str = ""

    @property
    def key(self) -> str:
        """One stop per router."""
        return f"stop {self.router_id}"


CopyAction = Assume | Drain | Release
Action = ImportModel | ImportExperts | StartActor | StopActor | Assume | Drain | Release | StartRouter | StopRouter


def target_of(action: Action) -> str:
    """Whom an action is about, for the decision log; long lists are counted, not printed."""
    match action:
        case ImportModel():
            return action.model
        case ImportExperts():
            shadows = f" and {len(action.shadows)} shadows" if action.shadows else ""
            return f"{action.model} x{len(action.experts)}{shadows} on {action.node_id[:12]}"
        case StartActor() | StopActor():
            return str(action.incarnation)
        case Assume() | Drain() | Release():
            shown = ", ".join(str(copy.expert) for copy in action.copies[:4])
            more = f" and {len(action.copies) - 4} more" if len(action.copies) > 4 else ""  # noqa: PLR2004 - as many as are shown
            return f"{shown}{more} on {action.incarnation}"
        case StartRouter() | StopRouter():
            return action.router_id


def verb_of(action: Action) -> str:
    """The first word of the key: import_model, import_experts, start, stop, assume, drain, release."""
    return action.key.split(" ", 1)[0]
