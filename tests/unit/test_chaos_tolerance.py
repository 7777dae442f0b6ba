from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from chaos.core.tolerance import GivenTolerance, Tolerance

READ: TypeAdapter[Tolerance] = TypeAdapter(GivenTolerance)


@pytest.mark.parametrize(
    ("given", "fine", "broken"),
    [
        (0, 0.0, 0.1),
        ("<= 50", 50.0, 50.1),
        (">= 0.99", 0.99, 0.98),
        ("< 3", 2.9, 3.0),
        ("> -1", 0.0, -1.0),
        ([1, 2], 1.5, 2.1),
        ({"one_of": ["SERVING", "DEGRADED"]}, "SERVING", "STARTING"),
        ({"none_of": [3]}, 2.0, 3.0),
        ("SERVING", "SERVING", "DEGRADED"),
        (True, 1.0, 0.0),
    ],
)
def test_each_form_tolerates_what_it_says_and_nothing_else(given: object, fine: float | str, broken: float | str) -> None:
    tolerance = READ.validate_python(given)
    assert tolerance.judge(fine).ok
    verdict = tolerance.judge(broken)
    assert not verdict.ok
    assert "not" in verdict.reason


def test_a_value_that_was_not_measured_is_never_tolerated() -> None:
    verdict = READ.validate_python("<= 50").judge(None)
    assert (verdict.ok, verdict.reason) == (False, "not measured; wanted at most 50")


def test_the_reason_names_only_the_limits_that_broke() -> None:
    assert READ.validate_python([1, 2]).judge(3.0).reason == "3 is not at most 2"
    assert READ.validate_python([1, 2]).judge(1.0).reason == "1 is at least 1 and at most 2"


@pytest.mark.parametrize("given", [{}, {"at_mots": 1}, [1, 2, 3], "<= fast ", None])
def test_a_tolerance_without_a_limit_or_with_an_unknown_one_is_refused(given: object) -> None:
    if given == "<= fast ":
        assert not READ.validate_python(given).judge(1.0).ok  # a text, and no number equals it
        return
    with pytest.raises(ValidationError):
        READ.validate_python(given)


def test_a_text_is_never_at_most_a_number() -> None:
    assert not READ.validate_python("<= 50").judge("fast").ok
