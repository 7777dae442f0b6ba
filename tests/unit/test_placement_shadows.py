"""Where shadows live: beside no replica of their expert, on another node where there is one, spread, and only in room that replicas leave."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path

import pytest

from cluster.core.descriptors import Manifest, ShadowRecord
from cluster.core.ids import CopyId, Role
from cluster.core.memory import Memory
from cluster.core.placement import Layout, Shape, copy_bytes, lay_out, shape_of, stock_missing, wanted_copies
from cluster.core.spec import ActorsSpec, ClusterSpec, ModelSpec, ShadowSpec
from kit.fleet import make_manifest


def shadowed(manifest: Manifest, share: float = 1.0, seed: int = 0) -> Manifest:
    """The manifest with made-up shadows for a share of its experts."""
    rng = random.Random(seed)

    def record(key: str) -> ShadowRecord:
        version = hashlib.sha256(f"shadow {manifest.model.name} {key}".encode()).hexdigest()
        return ShadowRecord(version=version, codec="int2", num_bytes=7, relative_error=0.4, cosine=0.9)

    return manifest.model_copy(update={"shadows": {key: record(key) for key in manifest.experts if rng.random() < share}})


def spec_of(replicas: int = 1, **actors: object) -> ClusterSpec:
    model = ModelSpec(name="m", path=Path("/m"), replicas=replicas, shadow=ShadowSpec())
    return ClusterSpec(models=(model,), actors=ActorsSpec.model_validate(actors))


def laid_out(spec: ClusterSpec, manifest: Manifest, num_nodes: int) -> tuple[Shape, Layout, dict[str, str]]:
    manifests = {"m": manifest}
    shape = shape_of(spec, manifests)
    nodes = {name: f"node-{index % num_nodes}" for index, name in enumerate(shape.actor_ids)}
    return shape, lay_out(spec, manifests, shape, nodes), nodes


def shadow_homes(layout: Layout) -> dict[CopyId, str]:
    return {copy: homes[0] for copy, homes in layout.homes.items() if copy.role is Role.SHADOW}


def replica_homes(layout: Layout, copy: CopyId) -> tuple[str, ...]:
    return next(homes for other, homes in layout.homes.items() if other.expert == copy.expert and other.role is Role.REPLICA)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("num_nodes", [3, 4, 8])
def test_a_shadow_is_on_another_node_than_every_replica_of_its_expert(num_nodes: int, replicas: int) -> None:
    _, layout, nodes = laid_out(spec_of(replicas), shadowed(make_manifest(layers=5, experts=8)), num_nodes)
    homes = shadow_homes(layout)
    assert len(homes) == 40
    assert layout.homeless == ()
    for copy, home in homes.items():
        assert nodes[home] not in {nodes[name] for name in replica_homes(layout, copy)}


def test_on_one_node_a_shadow_is_on_another_actor_at_least() -> None:
    _, layout, _ = laid_out(spec_of(), shadowed(make_manifest(layers=3, experts=4)), 1)
    homes = shadow_homes(layout)
    assert len(homes) == 12
    assert all(home not in replica_homes(layout, copy) for copy, home in homes.items())


def test_one_actor_alone_holds_no_shadows() -> None:
    shape, layout, _ = laid_out(spec_of(count=1), shadowed(make_manifest()), 1)
    assert shadow_homes(layout) == {}
    assert len(layout.homeless) == 8
    assert shape.num_slots == 8 + 2


def test_the_shadows_of_one_actor_are_spread_over_the_others() -> None:
    _, layout, _ = laid_out(spec_of(), shadowed(make_manifest(layers=12, experts=8)), 8)
    homes = shadow_homes(layout)
    assert max(Counter(homes.values()).values()) == 12
    for index in range(8):
        assert len({home for copy, home in homes.items() if copy.expert.index == index}) == 7


def test_default_slots_grow_so_that_repair_keeps_its_free_slots() -> None:
    manifest = make_manifest(layers=6, experts=8)
    before = shape_of(spec_of(), {"m": manifest})
    shape, layout, _ = laid_out(spec_of(), shadowed(manifest), 4)
    assert before.num_slots == 6 + 2
    assert (shape.home_slots, shape.num_slots) == (before.home_slots, before.num_slots + 12)
    load = Counter(name for homes in layout.homes.values() for name in homes)
    assert max(load.values()) <= shape.num_slots - 2


def test_explicit_slots_stay_a_limit_and_replicas_come_first() -> None:
    shape, layout, _ = laid_out(spec_of(slots_per_actor=7, free_slots=2), shadowed(make_manifest(layers=4, experts=8)), 4)
    assert shape.num_slots == 7
    assert len(shadow_homes(layout)) == 8 * (7 - 2 - 4)
    assert len(layout.homeless) == 32 - 8
    _, full, _ = laid_out(spec_of(slots_per_actor=4, free_slots=0), shadowed(make_manifest(layers=4, experts=8)), 4)
    assert shadow_homes(full) == {}
    assert sum(len(homes) for homes in full.homes.values()) == 32


def test_without_the_section_recorded_shadows_are_not_wanted() -> None:
    spec = spec_of().model_copy(update={"models": (ModelSpec(name="m", path=Path("/m")),)})
    manifest = make_manifest()
    assert lay_out(spec, {"m": shadowed(manifest)}, shape_of(spec, {"m": shadowed(manifest)}), {}) == lay_out(
        spec, {"m": manifest}, shape_of(spec, {"m": manifest}), {}
    )


def test_shadows_move_no_replica() -> None:
    manifest = make_manifest(layers=3, experts=8)
    for num_nodes in (1, 2, 4):
        _, with_shadows, _ = laid_out(spec_of(2), shadowed(manifest, 0.6), num_nodes)
        _, without, _ = laid_out(spec_of(2), manifest, num_nodes)
        assert {copy: homes for copy, homes in with_shadows.homes.items() if copy.role is Role.REPLICA} == dict(without.homes)


def test_random_layouts_keep_shadows_apart_within_the_limit() -> None:
    rng = random.Random(11)
    for seed in range(200):
        manifest = shadowed(make_manifest(layers=rng.randint(1, 6), experts=rng.randint(2, 9)), rng.random(), seed)
        spec = spec_of(rng.randint(1, 2), count=rng.randint(2, 12), free_slots=rng.randint(0, 3))
        shape, layout, _ = laid_out(spec, manifest, rng.randint(1, 5))
        load = Counter(name for homes in layout.homes.values() for name in homes)
        assert max(load.values()) <= shape.num_slots
        homes = shadow_homes(layout)
        assert len(homes) + len(layout.homeless) == len(manifest.shadows)
        for copy, home in homes.items():
            assert home not in replica_homes(layout, copy)


def test_stock_lies_beside_neither_the_replicas_nor_the_shadow_where_nodes_are_left() -> None:
    rng = random.Random(23)
    num_beside = 0
    for seed in range(200):
        manifest = shadowed(make_manifest(layers=rng.randint(1, 6), experts=rng.randint(2, 9)), rng.random(), seed)
        num_nodes = rng.randint(1, 6)
        _, layout, node_of = laid_out(spec_of(rng.randint(1, 2), count=rng.randint(2, 12)), manifest, num_nodes)
        stock = {copy: node_id for (node_id, _), copies in stock_missing(layout, node_of, Memory()).items() for copy in copies}
        nodes, shadows = set(node_of.values()), {copy.expert: node_of[home] for copy, home in shadow_homes(layout).items()}
        for copy, homes in layout.homes.items():
            if copy.role is Role.SHADOW:
                continue
            taken = {node_of[home] for home in homes}
            assert (copy in stock) == bool(nodes - taken)
            if copy in stock:
                assert stock[copy] not in taken
                assert stock[copy] != shadows.get(copy.expert) or nodes == taken | {stock[copy]}
                num_beside += stock[copy] == shadows.get(copy.expert)
    assert num_beside  # with two nodes there is no third


def test_sizes_count_shadows_packed() -> None:
    manifest = shadowed(make_manifest())
    sizes = copy_bytes(manifest)
    assert list(sizes) == wanted_copies(manifest)
    assert {size for copy, size in sizes.items() if copy.role is Role.SHADOW} == {7}
    assert {size for copy, size in sizes.items() if copy.role is Role.REPLICA} == {manifest.model.layers[0].expert.num_bytes}
