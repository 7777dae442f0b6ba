"""Whose fault numbers that are not finite are: told from which rows they are in, never from an answer that tells nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest

from cluster.core.routing_table import TableCopy
from kit.lanes import copy_on
from router_service.core.doubt import MAX_WITNESSES, Doubt, Question, Verdict

ACCUSED = copy_on("a0", f"{1:064x}")
WITNESSES = [copy_on(f"a{number}", f"{1:064x}") for number in range(1, 2 * MAX_WITNESSES)]


def doubt(bad: Iterable[int], witnesses: int = 1) -> tuple[Doubt, Question]:
    """A doubt about rows of the accused copy, and the first question."""

    def next_full(asked: Sequence[TableCopy]) -> TableCopy | None:
        return next((copy for copy in WITNESSES[:witnesses] if copy not in asked), None)

    made = Doubt(ACCUSED, bad, next_full)
    return made, made.begin()


@pytest.mark.parametrize(
    ("accused", "witness", "verdict"),
    [
        ({0, 1}, set(), Verdict.BLAMED),
        ({0, 1}, {0, 1}, Verdict.OVERFLOW),
        ({0, 1}, {1}, Verdict.BLAMED),  # row 1 overflows, row 0 is the copy's fault
        ({0}, {1}, Verdict.BLAMED),
        ({0, 1}, {1, 2}, Verdict.BLAMED),
    ],
)
def test_a_row_that_only_the_accused_copy_cannot_do_blames_it(accused: set[int], witness: set[int], verdict: Verdict) -> None:
    made, question = doubt(accused)
    assert question == Question(WITNESSES[0], is_golden=False)
    assert made.answered(witness) is verdict


def test_a_witness_that_fails_on_further_rows_tells_nothing() -> None:
    made, _ = doubt({0}, witnesses=2)
    assert made.answered({0, 1}) == Question(WITNESSES[1], is_golden=False)
    assert made.answered({0}) is Verdict.OVERFLOW
    alone, _ = doubt({0})
    assert alone.answered({0, 1}) == Question(ACCUSED, is_golden=True)


@pytest.mark.parametrize(("again", "verdict"), [({0}, Verdict.OVERFLOW), ({0, 1}, Verdict.OVERFLOW), (set(), Verdict.OPEN), ({1}, Verdict.OPEN)])
def test_without_a_witness_only_rows_that_healthy_weights_cannot_do_twice_overflow(again: set[int], verdict: Verdict) -> None:
    made, _ = doubt({0}, witnesses=0)
    assert made.answered([]) == Question(ACCUSED, is_golden=False)
    assert made.answered(again) is verdict


def test_nobody_can_tell_when_the_rows_are_not_answered_a_second_time() -> None:
    made, _ = doubt({0}, witnesses=0)
    made.answered([])
    assert made.unanswered() is Verdict.OPEN


def test_witnesses_are_bounded_and_a_golden_row_decides_after_them() -> None:
    made, step = doubt({0}, witnesses=len(WITNESSES))
    asked = 0
    while not step.is_golden:
        asked += 1
        found = made.unanswered() if asked % 2 else made.answered({0, 1})
        assert isinstance(found, Question)
        step = found
    assert asked == MAX_WITNESSES
    assert made.answered({0}) is Verdict.BLAMED


def test_nobody_can_tell_when_the_golden_row_is_not_answered_either() -> None:
    made, question = doubt({0}, witnesses=0)
    assert question == Question(ACCUSED, is_golden=True)
    assert made.unanswered() is Verdict.OPEN
