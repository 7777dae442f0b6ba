"""Where experts live: the default layout, replicas apart, actors spread over nodes with room."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from cluster.core.errors import ConfigError
from cluster.core.placement import lack_of_room, lay_out, pick_node, rooms, shape_of
from cluster.core.spec import ActorsSpec, ClusterSpec, ModelSpec
from cluster.core.status import NodeObservation
from kit.control import make_spec
from kit.fleet import make_manifest


def node(name: str, gpus: float, *, alive: bool = True, free: float | None = None) -> NodeObservation:
    return NodeObservation(name, name, "10.0.0.1", alive, gpus, 2.0, free_gpus=free)


def test_actor_j_holds_expert_j_of_all_layers_of_all_models() -> None:
    spec = make_spec("a", "b")
    manifests = {"a": make_manifest("a", layers=3, experts=8), "b": make_manifest("b", layers=2, experts=4)}
    shape = shape_of(spec, manifests)
    layout = lay_out(spec, manifests, shape, {})
    assert shape.actor_ids == tuple(f"actor-{index}" for index in range(8))
    assert (shape.home_slots, shape.num_slots) == (5, 7)
    assert len(layout.homes) == 3 * 8 + 2 * 4
    for copy, homes in layout.homes.items():
        assert homes == (f"actor-{copy.expert.index}",)


def test_standby_actors_hold_no_homes() -> None:
    spec = make_spec("a", actors=ActorsSpec(standby=2))
    manifests = {"a": make_manifest("a")}
    layout = lay_out(spec, manifests, shape_of(spec, manifests), {})
    assert layout.shape.all_ids[-2:] == ("standby-0", "standby-1")
    assert not {home for homes in layout.homes.values() for home in homes} & set(layout.shape.standby_ids)


def test_random_specs_place_every_replica_on_an_actor_of_its_own_within_its_slots() -> None:
    rng = random.Random(7)
    for _ in range(300):
        names = ("a", "b")[: rng.randint(1, 2)]
        manifests = {name: make_manifest(name, layers=rng.randint(1, 4), experts=rng.randint(1, 9)) for name in names}
        models = tuple(ModelSpec(name=name, path=Path("/m"), replicas=rng.randint(1, 3)) for name in names)
        count = rng.choice((None, rng.randint(3, 12)))
        spec = ClusterSpec(models=models, actors=ActorsSpec(count=count, free_slots=rng.randint(0, 3)))
        shape = shape_of(spec, manifests)
        nodes = {name: f"node-{index % rng.randint(1, 4)}" for index, name in enumerate(shape.actor_ids)}
        layout = lay_out(spec, manifests, shape, nodes)
        load = Counter(home for homes in layout.homes.values() for home in homes)
        assert max(load.values()) <= shape.num_slots
        for copy, homes in layout.homes.items():
            wanted = next(model.replicas for model in models if model.name == copy.expert.model)
            assert len(set(homes)) == len(homes) == wanted


def test_replicas_are_on_different_nodes_where_there_are_enough() -> None:
    spec = make_spec("a", replicas=3)
    manifests = {"a": make_manifest("a", experts=8)}
    shape = shape_of(spec, manifests)
    nodes = {name: f"node-{index % 4}" for index, name in enumerate(shape.actor_ids)}
    for homes in lay_out(spec, manifests, shape, nodes).homes.values():
        assert len({nodes[home] for home in homes}) == 3


def test_first_copies_stay_where_they_are_when_actors_change_nodes() -> None:
    spec = make_spec("a", replicas=2)
    manifests = {"a": make_manifest("a", experts=8)}
    shape = shape_of(spec, manifests)
    before = lay_out(spec, manifests, shape, {name: f"node-{index % 4}" for index, name in enumerate(shape.actor_ids)})
    after = lay_out(spec, manifests, shape, {name: f"node-{index % 3}" for index, name in enumerate(shape.actor_ids)})
    assert [homes[0] for homes in before.homes.values()] == [homes[0] for homes in after.homes.values()]


def test_more_replicas_than_actors_are_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"raise actors\.count to 3"):
        shape_of(make_spec("a", replicas=3, actors=ActorsSpec(count=2)), {"a": make_manifest("a")})


def test_slots_too_few_for_the_copies_are_refused_with_both_remedies() -> None:
    with pytest.raises(ConfigError, match=r"12 slots cannot hold 16 copies; raise actors\.count to 6 or actors\.slots_per_actor to 4"):
        shape_of(make_spec("a", actors=ActorsSpec(count=4, slots_per_actor=3)), {"a": make_manifest("a", layers=4)})


def test_one_slot_per_actor_raises_the_count_to_the_number_of_copies() -> None:
    spec = make_spec("a", actors=ActorsSpec(slots_per_actor=1))
    manifests = {"a": make_manifest("a", layers=2, experts=4)}
    layout = lay_out(spec, manifests, shape_of(spec, manifests), {})
    assert len(set(layout.homes.values())) == 8


def test_actors_go_round_the_nodes_with_room_and_never_over_it() -> None:
    room = rooms([node("n1", 1.0), node("n2", 1.0), node("head", 0.0), node("dead", 4.0, alive=False)], {}, {})
    assert [pick_node(room, 0.5) for _ in range(5)] == ["n1", "n2", "n1", "n2", None]
    assert lack_of_room(room, 0.5) == "needs 0.5 GPU, but the freest of 3 alive nodes, head, has 0 of 0 left"


def test_gpus_that_others_hold_are_not_given_out() -> None:
    nodes = [node("n1", 2.0, free=0.5), node("n2", 1.0, free=1.0)]
    room = rooms(nodes, {"n1": [0.5]}, {"n1": 0.5})
    assert room["n1"].free_gpus == pytest.approx(0.5)
    assert room["n2"].free_gpus == pytest.approx(1.0)


def test_actor_decided_but_not_yet_running_keeps_its_room() -> None:
    room = rooms([node("n1", 1.0, free=1.0)], {"n1": [0.5, 0.5]}, {})
    assert pick_node(room, 0.5) is None


def test_fractions_of_a_gpu_add_up_to_all_of_it() -> None:
    room = rooms([node("n1", 1.0)], {}, {})
    assert [pick_node(room, 0.1) for _ in range(11)] == ["n1"] * 10 + [None]


def test_actors_without_gpus_go_to_every_alive_node() -> None:
    room = rooms([node("n1", 0.0), node("n2", 0.0)], {}, {})
    assert Counter(pick_node(room, 0.0) for _ in range(6)) == {"n1": 3, "n2": 3}
