"""What a router holds against copies, and how long it says so: an accusation stands, and is told, until a table without the copy has come."""

from __future__ import annotations

from cluster.core.ids import ExpertId
from cluster.core.routing_table import TableCopy
from kit.lanes import copy_on, table_of
from router_service.core.trust import Rank, Trust

EXPERT = ExpertId("m", 0, 0)
SICK, WELL = copy_on("a0", f"{1:064x}"), copy_on("a1", f"{1:064x}")


def accuse(trust: Trust, copy: TableCopy, now_s: float = 1.0) -> bool:
    return trust.accuse(EXPERT, copy, "non_finite", by="tenant", now_s=now_s)


def test_an_accusation_is_told_again_until_a_table_without_the_copy_has_come() -> None:
    """A controller may end after it was told and before it recorded anything: nobody else would ever take out a copy that is asked no more."""
    trust = Trust()
    trust.adopt(table_of("m", {(0, 0): [SICK, WELL]}))
    assert accuse(trust, SICK)
    assert accuse(trust, SICK)
    assert trust.take_accusations() == {(EXPERT, SICK, "non_finite"): 2}
    assert list(trust.take_accusations().items()) == [((EXPERT, SICK, "non_finite"), 0)]
    trust.adopt(table_of("m", {(0, 0): [WELL]}, epoch=2))
    assert not trust.take_accusations()


def test_what_the_table_no_longer_has_is_not_held_against_the_copy_that_comes_back() -> None:
    """Two calls may find out about the same copy, the second after it was withdrawn: once it is loaded anew it must be asked."""
    trust = Trust()
    trust.adopt(table_of("m", {(0, 0): [SICK, WELL]}))
    accuse(trust, SICK)
    trust.adopt(table_of("m", {(0, 0): [WELL]}, epoch=2))
    assert not accuse(trust, SICK)
    trust.adopt(table_of("m", {(0, 0): [SICK, WELL]}, epoch=3))
    assert trust.rank(EXPERT, SICK) is Rank.GOOD
    assert not trust.take_accusations()
