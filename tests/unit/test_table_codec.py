"""The routing table on the wire: equal after a round trip, refused by field when it contradicts itself."""

from __future__ import annotations

import random

import pytest

from cluster.core.errors import InvalidRequest
from cluster.core.ids import ExpertId, Incarnation, Role
from cluster.core.routing_table import ActorEndpoint, RoutingTable, TableCopy, TableModel
from cluster.core.table_codec import from_proto, to_proto
from kit.fleet import digest
from protos.moelastic.control.v1 import control_pb2 as pb


def random_table(rng: random.Random) -> RoutingTable:
    lives = [Incarnation(f"actor-{index}", rng.randint(1, 2**40)) for index in range(rng.randint(1, 6))]
    actors = {life.actor_id: ActorEndpoint(life, "10.0.0.1", rng.randint(1, 65535), f"node-{life.actor_id}", "cuda:0") for life in lives}
    copies = {}
    for index in range(rng.randint(1, 20)):
        holders = rng.sample(lives, rng.randint(1, len(lives)))
        roles = [Role.REPLICA] * (len(holders) - 1) + [rng.choice((Role.REPLICA, Role.SHADOW))]
        version = digest(f"v{index}")
        copies[ExpertId("m/x:y", rng.randint(0, 60), index)] = tuple(TableCopy(life, version, role) for life, role in zip(holders, roles, strict=True))
    return RoutingTable(rng.randint(0, 2**50), actors, copies, {"m": TableModel("m", digest("manifest"), 20, rng.randint(0, 20))})


def test_table_survives_the_wire_unchanged() -> None:
    rng = random.Random(3)
    for _ in range(100):
        table = random_table(rng)
        message = pb.WatchTableResponse.FromString(to_proto(table, router_generation=4, controller_generation=9).SerializeToString())
        assert from_proto(message) == table
        assert (message.router_generation, message.controller_generation) == (4, 9)


def message() -> pb.WatchTableResponse:
    return to_proto(random_table(random.Random(5)))


@pytest.mark.parametrize(
    ("break_it", "field"),
    [
        (lambda m: m.actors.add().CopyFrom(m.actors[0]), "actors"),
        (lambda m: setattr(m.actors[0], "port", 0), "actors[0]"),
        (lambda m: setattr(m.actors[0], "port", 70000), "actors[0]"),
        (lambda m: setattr(m.actors[0], "actor_id", ""), "actors[0]"),
        (lambda m: m.experts.add().CopyFrom(m.experts[0]), "experts"),
        (lambda m: setattr(m.experts[0].copies[0], "actor", 99), "experts[0].copies[0].actor"),
        (lambda m: setattr(m.experts[0].copies[0], "version", b"short"), "experts[0].copies[0].version"),
        (lambda m: setattr(m.experts[0].copies[0], "role", 0), "experts[0].copies[0].role"),
        (lambda m: setattr(m.experts[0].copies[0], "role", 77), "experts[0].copies[0].role"),
    ],
)
def test_table_that_contradicts_itself_is_refused_by_field(break_it, field: str) -> None:  # noqa: ANN001 - any of the above
    broken = message()
    break_it(broken)
    with pytest.raises(InvalidRequest) as caught:
        from_proto(broken)
    assert caught.value.field.startswith(field)


def test_random_bytes_never_crash_the_reader() -> None:
    rng = random.Random(11)
    whole = message().SerializeToString()
    num_read = 0
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            parsed = pb.WatchTableResponse.FromString(bytes(data))
        except Exception:  # noqa: BLE001, S112 - protobuf's own refusal
            continue
        try:
            from_proto(parsed)
        except InvalidRequest:
            continue
        num_read += 1
    assert num_read > 0
