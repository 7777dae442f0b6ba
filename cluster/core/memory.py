"""What the controller remembers between two looks.

The first part is durable: recorded before anything of it is applied. The rest is lost with the process and may be, because every command is
idempotent and every observation whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cluster.core.actions import Action, Assume, ImportExperts, ImportModel, StartActor, StartRouter
from cluster.core.descriptors import Manifest
from cluster.core.ids import CopyId, Incarnation, Role
from cluster.core.spec import ShadowSpec
from cluster.core.table_draft import Held, TableDraft

BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 30.0
MAX_DISTRUSTED = 1024


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model as first imported: what every later import under this name must equal, but for its shadows, which follow from `shadow`."""

    manifest: Manifest
    path: str
    dtype: str
    shadow: ShadowSpec | None = None


@dataclass(frozen=True, slots=True)
class ActorRecord:
    """The life that was decided for an actor. `was_ready` outlives its lives: losing an actor that has served calls for repair."""

    incarnation: Incarnation
    node_id: str
    num_gpus: float
    num_slots: int
    was_ready: bool = False


@dataclass(frozen=True, slots=True)
class RouterRecord:
    """A router that was decided. `digest` says whether two routers would behave alike; `control_address` is where it looks for the controller.

    `shares_address`: others may listen where it does.
    """

    router_id: str
    node_id: str
    digest: str
    control_address: str = ""
    shares_address: bool = False


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """When a copy left the table: the first epoch without it, and the time."""

    epoch: int
    since_s: float


@dataclass(frozen=True, slots=True)
class Backoff:
    """Why an action failed and when it may be tried again; `final` failures wait for a new `apply`."""

    failures: int
    until_s: float
    message: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class Doubt:
    """Routers send an actor nothing. `stalled_since_s`: since when it has done no frame; `silent_since_s`: since when it does not answer the controller.

    `ended_s`: since when they trust it again. `is_majority`: most of the routers that know it agree.
    """

    since_s: float
    why: str
    is_majority: bool = True
    is_connected: bool = True
    frames_done: int = 0
    stalled_since_s: float = 0.0
    silent_since_s: float | None = None
    ended_s: float | None = None


@dataclass(frozen=True, slots=True)
class Accusal:
    """A copy that answered with wrong numbers; it must leave its slot. `since_s` is of the process that was told."""

    since_s: float
    kind: str


@dataclass(frozen=True, slots=True)
class Following:
    """Routers that still look for the controller where it was: how many, and since when there are so many."""

    num_routers: int
    since_s: float


@dataclass(frozen=True, slots=True)
class Memory:
    """All of it. `generation` and `epoch` are the highest given so far; `replacing` names the actor that `replace` is at.

    `quarantined`: devices (NODE/DEVICE) that get no copies and no actors, each with its reason, until somebody releases them. `released`: when
    (Unix seconds) that was, by device: no error from before is held against one again, whichever process tells of it. `accused`: copies with wrong
    numbers that are still in their slots. Routers forget those that a table has dropped, so that nobody else would know what not to publish again.
    `distrusted`: (node, version) of blobs that must be digested again before they are loaded there, oldest first; at most MAX_DISTRUSTED, the oldest leave.
    """

    generation: int = 0
    epoch: int = 0
    spec_revision: int = 0
    reached_revision: int = 0
    replace: bool = False
    replacing: str = ""
    models: Mapping[str, ModelRecord] = field(default_factory=dict)
    actors: Mapping[str, ActorRecord] = field(default_factory=dict)
    routers: Mapping[str, RouterRecord] = field(default_factory=dict)
    published: TableDraft = field(default_factory=TableDraft)
    quarantined: Mapping[str, str] = field(default_factory=dict)
    released: Mapping[str, float] = field(default_factory=dict)
    accused: Mapping[Held, Accusal] = field(default_factory=dict)
    distrusted: tuple[tuple[str, str], ...] = ()

    issued: frozenset[Incarnation] = frozenset()
    returned: frozenset[Incarnation] = frozenset()
    stored: Mapping[tuple[str, str], frozenset[tuple[int, int]]] = field(default_factory=dict)
    stored_shadows: Mapping[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    backoff: Mapping[str, Backoff] = field(default_factory=dict)
    withdrawn: Mapping[Held, Withdrawal] = field(default_factory=dict)
    first_seen_s: Mapping[Incarnation, float] = field(default_factory=dict)
    unreachable_since_s: Mapping[Incarnation, float] = field(default_factory=dict)
    router_epochs: Mapping[str, int] = field(default_factory=dict)
    following: Following | None = None
    doubts: Mapping[Incarnation, Doubt] = field(default_factory=dict)
    condemned: Mapping[Incarnation, str] = field(default_factory=dict)
    killed_s: tuple[float, ...] = ()
    accused_s: tuple[float, ...] = ()
    devices: Mapping[Incarnation, str] = field(default_factory=dict)
    strikes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    further: Mapping[CopyId, tuple[str, ...]] = field(default_factory=dict)
    inexact_since_s: float | None = None
    calm_since_s: float | None = None

    def has_stored(self, node_id: str, copy: CopyId) -> bool:
        """Whether a copy's blob is known to lie in a node's store."""
        place = (node_id, copy.expert.model)
        if copy.role is Role.SHADOW:
            return copy.version in self.stored_shadows.get(place, ())
        return (copy.expert.layer, copy.expert.index) in self.stored.get(place, ())

    def may_try(self, key: str, now_s: float) -> bool:
        """Whether an action of this key is not held back by its last failure."""
        held = self.backoff.get(key)
        return held is None or (not held.final and held.until_s <= now_s)


def load_key(incarnation: Incarnation, copy: CopyId) -> str:
    """The name under which failures to load one copy in one life are remembered."""
    return f"load {copy} on {incarnation}"


def with_failure(memory: Memory, key: str, message: str, now_s: float, *, final: bool = False) -> Memory:
    """Hold an action back: twice as long after each failure in a row, or for good."""
    failures = (memory.backoff[key].failures if key in memory.backoff else 0) + 1
    delay_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 10))
    entry = Backoff(failures, now_s + delay_s, message, final)
    return replace(memory, backoff={**memory.backoff, key: entry})


def with_success(memory: Memory, key: str) -> Memory:
    """Forget an action's failures."""
    if key not in memory.backoff:
        return memory
    return replace(memory, backoff={name: entry for name, entry in memory.backoff.items() if name != key})


def with_outcome(memory: Memory, action: Action, error: str | None, now_s: float, *, final: bool = False) -> Memory:
    """Fold in how an action ended: `error` is None when it was accepted. A start's success is known only when the actor is ready."""
    if isinstance(action, StartActor | StartRouter):
        life = action.incarnation if isinstance(action, StartActor) else Incarnation(action.router_id, 0)
        memory = replace(memory, returned=memory.returned | {life})
        return memory if error is None else with_failure(memory, action.key, error, now_s, final=final)
    if error is not None:
        memory = with_failure(memory, action.key, error, now_s, final=final)
        record = memory.actors.get(action.incarnation.actor_id) if isinstance(action, Assume) else None
        return memory if record is None else without_stored(memory, record.node_id)
    if isinstance(action, ImportExperts):
        place = (action.node_id, action.model)
        stored = {**memory.stored, place: memory.stored.get(place, frozenset()) | action.experts}
        versions = memory.stored_shadows.get(place, frozenset()) | {copy.version for copy in action.shadows}
        distrusted = tuple(blob for blob in memory.distrusted if blob[0] != action.node_id or blob[1] not in action.distrusted)
        memory = replace(memory, stored=stored, stored_shadows={**memory.stored_shadows, place: versions}, distrusted=distrusted)
    return with_success(memory, action.key)


def read_model(known: ModelRecord | None, action: ImportModel, manifest: Manifest) -> ModelRecord | None:
    """The record of a model that an import read: new, or what is known with other shadows. None when it holds other weights than those known."""
    kept = manifest
    if known is not None:
        if manifest.model_copy(update={"source": known.manifest.source, "shadows": known.manifest.shadows}) != known.manifest:
            return None
        kept = known.manifest if known.shadow == action.shadow else known.manifest.model_copy(update={"shadows": manifest.shadows})
    return ModelRecord(kept, str(action.source), str(action.dtype), action.shadow)


def with_model(memory: Memory, name: str, record: ModelRecord) -> Memory:
    """Record what a model is, for good. Where its shadows are others now, every node gets the new manifest."""
    known = memory.models.get(name)
    if known is not None and known.manifest != record.manifest:
        memory = replace(memory, stored={place: experts for place, experts in memory.stored.items() if place[1] != name})
    return replace(memory, models={**memory.models, name: record})


def with_goal(memory: Memory, revision: int, *, replace_differing: bool) -> Memory:
    """A new goal: failures that waited for it may be tried again."""
    return replace(memory, spec_revision=revision, replace=replace_differing, backoff={})


def without_stored_copy(memory: Memory, node_id: str, copy: CopyId) -> Memory:
    """Distrust one copy's blob in a node's store: it is read and digested again before the copy is loaded there, also by a later controller."""
    blob = (node_id, copy.version)
    memory = replace(memory, distrusted=(*(other for other in memory.distrusted if other != blob), blob)[-MAX_DISTRUSTED:])
    place, expert = (node_id, copy.expert.model), (copy.expert.layer, copy.expert.index)
    if copy.role is Role.SHADOW:
        versions = memory.stored_shadows.get(place, frozenset()) - {copy.version}
        return replace(memory, stored_shadows={**memory.stored_shadows, place: versions})
    return replace(memory, stored={**memory.stored, place: memory.stored.get(place, frozenset()) - {expert}})


def without_stored(memory: Memory, node_id: str) -> Memory:
    """Distrust a node's store: what is needed there is imported, and so verified, again."""
    stored = {place: experts for place, experts in memory.stored.items() if place[0] != node_id}
    shadows = {place: versions for place, versions in memory.stored_shadows.items() if place[0] != node_id}
    return replace(memory, stored=stored, stored_shadows=shadows)
