"""Who is struck: chosen by a seed among what the cluster itself says it consists of, and checked against the blast radius before anything happens."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from chaos.core.experiment import Limits, Selector
from cluster.core.errors import ConfigError
from cluster.core.ids import ExpertId, Incarnation

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Process:
    """A process by its id and start time (seconds since 1970), and what it is."""

    what: str
    pid: int
    start_s: float


@dataclass(frozen=True, slots=True)
class ActorView:
    """An expert actor that serves: where it is, its process, what it holds."""

    incarnation: Incarnation
    node_id: str
    device: str
    address: str
    process: Process
    replicas: frozenset[ExpertId] = frozenset()
    shadows: frozenset[ExpertId] = frozenset()


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node that is alive; `can_be_lost` is false of the head and of nodes that a router or the controller runs on."""

    node_id: str
    name: str
    can_be_lost: bool


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the cluster said it consists of, at one moment. `rates` is how busy each expert is, where that is known."""

    actors: tuple[ActorView, ...]
    nodes: tuple[NodeView, ...]
    routers: tuple[Process, ...]
    controller: Process | None
    rates: Mapping[ExpertId, float] = field(default_factory=dict)

    @property
    def processes(self) -> frozenset[Process]:
        """Every process that may be touched."""
        named = {actor.process for actor in self.actors} | set(self.routers)
        return frozenset(named | ({self.controller} if self.controller is not None else set()))


@dataclass(frozen=True, slots=True)
class Target:
    """What a selector chose: whole actors, single processes, a node with all that it hosts."""

    kind: str
    name: str
    actors: tuple[ActorView, ...] = ()
    processes: tuple[Process, ...] = ()
    node: NodeView | None = None

    @property
    def incarnations(self) -> frozenset[Incarnation]:
        """The lives that are struck."""
        return frozenset(actor.incarnation for actor in self.actors)


def first_layer(inventory: Inventory, model: str) -> int | None:
    """The first MoE layer of a model, which is the load's unless it says otherwise; None where nobody holds any."""
    return min((expert.layer for actor in inventory.actors for expert in actor.replicas | actor.shadows if expert.model == model), default=None)


def select(
    inventory: Inventory, selector: Selector, *, model: str, rng: random.Random, layer: int | None = None, turn: int = 0, avoid: Sequence[Target] = ()
) -> Target:
    """Choose whom to strike; `turn` is the repetition, for `rotate`; nobody in `avoid` is chosen again. Raises ConfigError when nobody fits.

    With `layer`, only who holds something of that layer: after repairs an actor may hold none of what the load asks for, and its loss would prove nothing.
    """
    inventory = inventory if layer is None else _of_layer(inventory, layer)
    taken = {incarnation for target in avoid for incarnation in target.incarnations}
    match selector.kind:
        case "actor":
            return _actors(inventory, selector, model, rng, turn, taken)
        case "gpu":
            return _gpu(inventory, selector, model, rng, turn)
        case "node":
            return _node(inventory, selector, model, rng, turn)
        case "router":
            return Target("router", "router", processes=(_picked(sorted(inventory.routers, key=lambda found: found.pid), selector, rng, turn, "a router"),))
        case "controller":
            if inventory.controller is None:
                message = "target: the controller's process was not found; `moelastic status` says whether it runs"
                raise ConfigError(message)
            return Target("controller", "controller", processes=(inventory.controller,))


def shadow_holder(inventory: Inventory, primary: Target, *, model: str) -> Target:
    """The actor that holds the shadow of an expert of the struck primary. Raises ConfigError when no other actor holds one."""
    lost = sorted(expert for actor in primary.actors for expert in actor.replicas if expert.model == model)
    for expert in lost:
        for actor in inventory.actors:
            if expert in actor.shadows and actor.incarnation not in primary.incarnations:
                return Target("actor", f"{actor.incarnation} (shadow of {expert})", (actor,), (actor.process,))
    message = f"target: no other actor holds a shadow of an expert of {primary.name}; deploy with models[].shadow"
    raise ConfigError(message)


def check_blast_radius(targets: Iterable[Target], limits: Limits) -> None:
    """Raise ConfigError when a method strikes more than its scenario allows, naming the limit."""
    found = list(targets)
    counts = {
        "actors": len({incarnation for target in found for incarnation in target.incarnations}),
        "nodes": len({target.node.node_id for target in found if target.node is not None}),
        "routers": sum(target.kind == "router" for target in found),
        "controllers": sum(target.kind == "controller" for target in found),
    }
    for name, count in counts.items():
        allowed = getattr(limits, name)
        if count > allowed:
            message = f"limits.{name}: {count} would be struck and {allowed} are allowed; raise limits.{name}, or strike fewer"
            raise ConfigError(message)


def _actors(inventory: Inventory, selector: Selector, model: str, rng: random.Random, turn: int, taken: set[Incarnation]) -> Target:
    fitting = [actor for actor in _holders(inventory, selector, model) if actor.incarnation not in taken]
    chosen: list[ActorView] = []
    for number in range(selector.count):
        left = [actor for actor in fitting if actor not in chosen]
        if selector.pick == "hottest" and left:
            chosen.append(max(left, key=lambda actor: (sum(inventory.rates.get(expert, 0.0) for expert in actor.replicas), actor.incarnation)))
        else:
            chosen.append(_picked(sorted(left, key=lambda actor: actor.incarnation), selector, rng, turn + number, f"an actor ({selector.role})"))
    name = ", ".join(str(actor.incarnation) for actor in chosen)
    return Target("actor", name, tuple(chosen), tuple(actor.process for actor in chosen))


def _gpu(inventory: Inventory, selector: Selector, model: str, rng: random.Random, turn: int) -> Target:
    """All actors of one device of one node that holds at least one replica of the model."""
    places = sorted({(actor.node_id, actor.device) for actor in _holders(inventory, selector, model)})
    node_id, device = _picked(places, selector, rng, turn, "a GPU that holds a replica")
    actors = tuple(actor for actor in inventory.actors if (actor.node_id, actor.device) == (node_id, device))
    return Target("gpu", f"{_node_name(inventory, node_id)}/{device}", actors, tuple(actor.process for actor in actors))


def _node(inventory: Inventory, selector: Selector, model: str, rng: random.Random, turn: int) -> Target:
    hosting = {actor.node_id for actor in inventory.actors if _has_role(actor, selector, model)}
    fitting = sorted(
        (node for node in inventory.nodes if node.can_be_lost and node.node_id in hosting and selector.node in {None, node.name}), key=lambda node: node.name
    )
    node = _picked(fitting, selector, rng, turn, "a node that hosts a replica and neither a router nor the controller")
    actors = tuple(actor for actor in inventory.actors if actor.node_id == node.node_id)
    return Target("node", node.name, actors, tuple(actor.process for actor in actors), node)


def _of_layer(inventory: Inventory, layer: int) -> Inventory:
    """As if nobody held anything of another layer."""

    def of_layer(held: frozenset[ExpertId]) -> frozenset[ExpertId]:
        return frozenset(expert for expert in held if expert.layer == layer)

    return replace(inventory, actors=tuple(replace(actor, replicas=of_layer(actor.replicas), shadows=of_layer(actor.shadows)) for actor in inventory.actors))


def _has_role(actor: ActorView, selector: Selector, model: str) -> bool:
    held = {"primary": actor.replicas, "shadow": actor.shadows, "any": actor.replicas | actor.shadows}[selector.role]
    return any(expert.model == model for expert in held)


def _holders(inventory: Inventory, selector: Selector, model: str) -> list[ActorView]:
    """Actors of the selector's role, on its node."""
    return [actor for actor in inventory.actors if _has_role(actor, selector, model) and selector.node in {None, _node_name(inventory, actor.node_id)}]


def _node_name(inventory: Inventory, node_id: str) -> str:
    return next((node.name for node in inventory.nodes if node.node_id == node_id), node_id[:8])


def _picked(fitting: Sequence[_T], selector: Selector, rng: random.Random, turn: int, what: str) -> _T:
    if not fitting:
        message = f"target: {what} was not found; `moelastic status` shows what runs"
        raise ConfigError(message)
    return fitting[turn % len(fitting)] if selector.pick == "rotate" else rng.choice(fitting)
