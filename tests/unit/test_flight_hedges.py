"""Hedges go to another actor, and only when they may be charged."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.core.ids import Role
from cluster.core.routing_table import TableCopy
from kit.lanes import copy_on
from kit.pipelines import version_of
from router_service.core.dispatch import ExpertRows
from router_service.core.flight import Flight

REPLICA = copy_on("a0", version_of(0))
SHADOW_BESIDE_IT = TableCopy(REPLICA.incarnation, version_of(1), Role.SHADOW)
ELSEWHERE = copy_on("a1", version_of(0))


def flight(*copies: TableCopy) -> Flight:
    def pick(index: int, tried: Sequence[TableCopy]) -> TableCopy | None:  # noqa: ARG001
        return next((copy for copy in copies if copy not in tried), None)

    flown = Flight([ExpertRows(0, 0, 5)], pick)
    flown.begin()
    return flown


def test_a_late_actor_is_not_hedged_with_its_own_shadow() -> None:
    charged: list[int] = []
    flown = flight(REPLICA, SHADOW_BESIDE_IT)
    assert flown.hedge(0, lambda rows, _: bool(charged.append(rows)) or True) is None
    assert charged == []
    assert flown.failed(0, 0, "faulted").copy == SHADOW_BESIDE_IT


def test_a_hedge_is_charged_by_its_rows_and_not_sent_when_refused() -> None:
    charged: list[int] = []
    flown = flight(REPLICA, ELSEWHERE)
    assert flown.hedge(0, lambda rows, _: bool(charged.append(rows))) is None
    assert charged == [5]
    assert flown.hedge(0, lambda _, __: True).copy == ELSEWHERE


def test_nothing_is_charged_where_nobody_else_could_be_asked() -> None:
    charged: list[int] = []
    assert flight(REPLICA).hedge(0, lambda rows, _: bool(charged.append(rows)) or True) is None
    assert charged == []
