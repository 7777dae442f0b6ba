"""Which expert lives where. The default layout: actor j holds expert j of every layer of every model; replicas go to other actors on other nodes.

Shadows come after all replicas: each on an actor, and if possible on a node, that holds no replica of its expert, those of one actor spread over the others.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.core.descriptors import Manifest
from cluster.core.errors import ConfigError
from cluster.core.ids import CopyId, ExpertId, Role
from cluster.core.memory import Memory
from cluster.core.spec import ClusterSpec, ModelSpec
from cluster.core.status import NodeObservation

EPSILON_GPUS = 1e-6


@dataclass(frozen=True, slots=True)
class Shape:
    """How many actors there are and how large.

    `home_slots` are meant for homes of replicas; up to `shadow_limit` shadows may have theirs, too; the rest of `num_slots` stays free for repair.
    """

    actor_ids: tuple[str, ...]
    standby_ids: tuple[str, ...]
    home_slots: int
    num_slots: int
    shadow_limit: int = 0

    @property
    def all_ids(self) -> tuple[str, ...]:
        """Actors with homes, then standby actors."""
        return self.actor_ids + self.standby_ids


@dataclass(frozen=True, slots=True)
class Layout:
    """The goal: for each wanted copy, the actors it belongs on, one for each replica. `homeless` shadows fit nowhere beside their replicas.

    `further`: of hot experts, actors that should hold a replica, too, for now.
    """

    shape: Shape
    homes: Mapping[CopyId, tuple[str, ...]] = field(default_factory=dict)
    homeless: tuple[CopyId, ...] = ()
    further: Mapping[CopyId, tuple[str, ...]] = field(default_factory=dict)

    def wanted(self) -> Iterator[tuple[CopyId, tuple[str, ...]]]:
        """Each copy with all the actors that should hold it."""
        if not self.further:
            yield from self.homes.items()
            return
        for copy, homes in self.homes.items():
            yield copy, homes + self.further.get(copy, ())


def wanted_copies(manifest: Manifest) -> list[CopyId]:
    """Every expert of a model in its recorded version, by layer and index; after them the shadows that are recorded, likewise."""
    replicas, shadows = [], []
    for layer in manifest.model.layers:
        for index in range(layer.num_experts):
            key, expert = f"{layer.layer}/{index}", ExpertId(manifest.model.name, layer.layer, index)
            replicas.append(CopyId(expert, manifest.experts[key]))
            if key in manifest.shadows:
                shadows.append(CopyId(expert, manifest.shadows[key].version, Role.SHADOW))
    return replicas + shadows


def is_listed(manifest: Manifest, shadow: CopyId) -> bool:
    """Whether a manifest still lists a shadow: another plan may have replaced it."""
    record = manifest.shadows.get(f"{shadow.expert.layer}/{shadow.expert.index}")
    return record is not None and record.version == shadow.version


def copy_bytes(manifest: Manifest) -> dict[CopyId, int]:
    """Bytes of the weights of every wanted copy; a shadow's count as packed."""
    by_layer = {layer.layer: layer.expert.num_bytes for layer in manifest.model.layers}

    def size(copy: CopyId) -> int:
        expert = copy.expert
        return manifest.shadows[f"{expert.layer}/{expert.index}"].num_bytes if copy.role is Role.SHADOW else by_layer[expert.layer]

    return {copy: size(copy) for copy in wanted_copies(manifest)}


def shape_of(spec: ClusterSpec, manifests: Mapping[str, Manifest]) -> Shape:
    """How many actors of how many slots the goal needs. Raises ConfigError when the spec's own numbers do not fit it."""
    actors = spec.actors
    served = [(model, manifests[model.name]) for model in spec.models if model.name in manifests]
    widest = max((layer.num_experts for _, manifest in served for layer in manifest.model.layers), default=1)
    replicas = max((model.replicas for model, _ in served), default=1)
    total = sum(len(manifest.experts) * model.replicas for model, manifest in served)
    slots = actors.slots_per_actor
    count = actors.count or max(widest, replicas, 0 if slots is None else -(-total // slots))
    if replicas > count:
        message = f"actors.count is {count}, but models ask for {replicas} replicas, each on an actor of its own; raise actors.count to {replicas}"
        raise ConfigError(message)
    if slots is not None and slots * count < total:
        message = (
            f"actors.count {count} x actors.slots_per_actor {slots} = {slots * count} slots cannot hold {total} copies;"
            f" raise actors.count to {-(-total // slots)} or actors.slots_per_actor to {-(-total // count)}"
        )
        raise ConfigError(message)
    home_slots = slots or sum(model.replicas * _most_primaries(manifest, count) for model, manifest in served) or 1
    # Twice an even share: where replicas leave few nodes for a shadow, these take more than theirs. A slot by itself takes no memory.
    shadow_slots = 2 * -(-_num_shadows(served) // count) if count > 1 else 0
    num_slots = slots or home_slots + shadow_slots + actors.free_slots
    names = tuple(f"actor-{index}" for index in range(count))
    standby = tuple(f"standby-{index}" for index in range(actors.standby))
    return Shape(names, standby, home_slots, num_slots, max(0, num_slots - actors.free_slots))


def _num_shadows(served: Iterable[tuple[ModelSpec, Manifest]]) -> int:
    return sum(len(manifest.shadows) for model, manifest in served if model.shadow is not None)


def _most_primaries(manifest: Manifest, count: int) -> int:
    """First copies of one model on its fullest actor."""
    return sum(-(-layer.num_experts // count) for layer in manifest.model.layers)


def lay_out(spec: ClusterSpec, manifests: Mapping[str, Manifest], shape: Shape, node_of: Mapping[str, str]) -> Layout:
    """Homes for every copy. Nodes steer replicas apart but never move a first copy, so losing a node moves few bytes. Raises ConfigError."""
    try:
        homes = _greedy(spec, manifests, shape, node_of)
    except ConfigError:
        # Keeping replicas apart can leave room only where a copy already is; in plain order the default slots always suffice.
        homes = _greedy(spec, manifests, shape, {})
    return _with_shadows(spec, manifests, Layout(shape, homes), node_of)


def _greedy(spec: ClusterSpec, manifests: Mapping[str, Manifest], shape: Shape, node_of: Mapping[str, str]) -> dict[CopyId, tuple[str, ...]]:
    load: Counter[str] = Counter()
    homes: dict[CopyId, tuple[str, ...]] = {}
    for model in spec.models:
        manifest = manifests.get(model.name)
        if manifest is None:
            continue
        for copy in wanted_copies(manifest):
            if copy.role is Role.SHADOW:
                continue
            chosen: list[str] = []
            for replica in range(model.replicas):
                chosen.append(_home(copy, replica, chosen, shape, load, node_of))
                load[chosen[-1]] += 1
            homes[copy] = tuple(chosen)
    return homes


def _with_shadows(spec: ClusterSpec, manifests: Mapping[str, Manifest], layout: Layout, node_of: Mapping[str, str]) -> Layout:
    """The layout with homes for shadows, where there is room that no replica needs."""
    shadowed = [manifests[model.name] for model in spec.models if model.shadow is not None and model.name in manifests]
    shadows = [copy for manifest in shadowed for copy in wanted_copies(manifest) if copy.role is Role.SHADOW]
    if not shadows:
        return layout
    shape = layout.shape
    replicas = {copy.expert: names for copy, names in layout.homes.items()}
    load = Counter(name for names in layout.homes.values() for name in names)
    room = {name: shape.shadow_limit - load[name] for name in shape.actor_ids}
    share = dict.fromkeys(shape.actor_ids, -(-len(shadows) // len(shape.actor_ids)))
    homes, homeless = dict(layout.homes), []
    for copy in shadows:
        name = _shadow_home(copy, replicas[copy.expert], room, share, node_of)
        if name is None:
            homeless.append(copy)
            continue
        room[name] -= 1
        share[name] -= 1
        homes[copy] = (name,)
    return Layout(shape, homes, tuple(homeless))


def _shadow_home(copy: CopyId, replicas: Sequence[str], room: Mapping[str, int], share: Mapping[str, int], node_of: Mapping[str, str]) -> str | None:
    """The first actor after the replicas that has room: on another node and within its share, if not on another node, if not on one that they are on."""
    names = list(room)
    start = copy.expert.index + len(replicas) + copy.expert.layer
    turned = [names[(start + step) % len(names)] for step in range(len(names))]
    fitting = [name for name in turned if name not in replicas and room[name] > 0]
    taken_nodes = {node_of.get(name) for name in replicas}
    apart = [name for name in fitting if node_of.get(name) not in taken_nodes]
    even = [name for name in apart or fitting if share[name] > 0]
    return next(iter((*even, *apart, *fitting)), None)


def _home(copy: CopyId, replica: int, chosen: Sequence[str], shape: Shape, load: Mapping[str, int], node_of: Mapping[str, str]) -> str:
    """The actor for one replica of a copy: the first with room after its preferred place, on a node of its own where there is one."""
    names, start = shape.actor_ids, copy.expert.index + replica
    taken_nodes = {node_of.get(name) for name in chosen}
    for limit in (shape.home_slots, shape.num_slots):
        fallback = ""
        for step in range(len(names)):
            name = names[(start + step) % len(names)]
            if name in chosen or load.get(name, 0) >= limit:
                continue
            if not chosen or not node_of or node_of.get(name) not in taken_nodes:
                return name
            fallback = fallback or name
        if fallback:
            return fallback
    message = (
        f"replica {replica + 1} of expert {copy.expert} fits no actor: {len(names)} actors of {shape.num_slots} slots;"
        " raise actors.slots_per_actor or actors.count"
    )
    raise ConfigError(message)


def stock_missing(layout: Layout, node_of: Mapping[str, str], memory: Memory) -> dict[tuple[str, str], set[CopyId]]:
    """By (node, model), replicas whose blobs should lie in the store of one node more than they are served from: a free slot there can take them at once.

    Not on the shadow's node where there is another: a replica repaired there would share its next failure with the shadow. The node follows from the
    copy and the homes of its expert, so it changes only when these, or nodes, do.
    """
    missing: dict[tuple[str, str], set[CopyId]] = defaultdict(set)
    nodes = [node_of.get(name, "") for name in layout.shape.actor_ids]
    place = {name: index for index, name in enumerate(layout.shape.actor_ids)}
    shadows = {copy.expert: homes for copy, homes in layout.homes.items() if copy.role is Role.SHADOW}
    for copy, homes in layout.homes.items():
        if copy.role is Role.REPLICA and homes:
            taken = {node_of.get(home, "") for home in homes} | {""}
            shadow_nodes = {node_of.get(home, "") for home in shadows.get(copy.expert, ())}
            start = place[homes[-1]] + 1 + copy.expert.layer  # the layers of a lost actor go to different ones
            others = [node for step in range(len(nodes)) if (node := nodes[(start + step) % len(nodes)]) not in taken]
            node_id = next((node for node in others if node not in shadow_nodes), next(iter(others), ""))
            if node_id and not memory.has_stored(node_id, copy):
                missing[node_id, copy.expert.model].add(copy)
    return missing


@dataclass(slots=True)
class NodeRoom:
    """What is left on one node while actors are placed. `free_gpus` falls as they are."""

    node: NodeObservation
    free_gpus: float
    num_actors: int = 0


def rooms(nodes: Iterable[NodeObservation], placed: Mapping[str, Sequence[float]], running: Mapping[str, float]) -> dict[str, NodeRoom]:
    """Room on each alive node.

    Args:
        nodes: what was observed.
        placed: by node, the GPUs asked for by each of our actors that is or will be there.
        running: by node, the GPUs that observed actors of ours hold; what Ray reports as used beyond that belongs to others.
    """
    result = {}
    for node in sorted((node for node in nodes if node.alive), key=lambda node: (node.name, node.node_id)):
        asked = placed.get(node.node_id, ())
        others = 0.0
        if node.free_gpus is not None:
            others = max(0.0, node.num_gpus - node.free_gpus - running.get(node.node_id, 0.0))
        result[node.node_id] = NodeRoom(node, node.num_gpus - sum(asked) - others, len(asked))
    return result


def pick_node(room: Mapping[str, NodeRoom], num_gpus: float) -> str | None:
    """The alive node with room that has the fewest of our actors; None when none has room. Takes the room."""
    fitting = [entry for entry in room.values() if num_gpus <= entry.free_gpus + EPSILON_GPUS]
    if not fitting:
        return None
    best = min(fitting, key=lambda entry: entry.num_actors)
    best.free_gpus -= num_gpus
    best.num_actors += 1
    return best.node.node_id


def lack_of_room(room: Mapping[str, NodeRoom], num_gpus: float) -> str:
    """Why no node takes another actor, for people."""
    if not room:
        return "no node is alive"
    best = max(room.values(), key=lambda entry: entry.free_gpus)
    free = max(0.0, best.free_gpus)
    return f"needs {num_gpus:g} GPU, but the freest of {len(room)} alive nodes, {best.node.name}, has {free:g} of {best.node.num_gpus:g} left"
