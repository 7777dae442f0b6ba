"""What a measured value may be, as a typed value; the verdict is computed and says why (Chaos Toolkit's tolerances, typed)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

Value = float | str | None
_COMPARISON = re.compile(r"^(<=|>=|==|<|>)\s*(-?\d+(?:\.\d+)?)$")
_KEYS = {"<=": "at_most", ">=": "at_least", "<": "below", ">": "above", "==": "equals"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a value is tolerated, and the sentence that says why or why not."""

    ok: bool
    reason: str


class Tolerance(BaseModel):
    """All that is given must hold. In YAML also a number (equals), `[low, high]` (within), or a text such as `<= 50`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    equals: float | str | None = None
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    one_of: tuple[float | str, ...] | None = None
    none_of: tuple[float | str, ...] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Tolerance:
        if not self.model_dump(exclude_none=True):
            message = 'a tolerance needs a limit: a number, [low, high], "<= 50", or one of equals, at_least, at_most, above, below, one_of, none_of'
            raise ValueError(message)
        return self

    def judge(self, value: Value) -> Verdict:
        """The verdict on a value; a value that could not be measured is never tolerated."""
        if value is None:
            return Verdict(ok=False, reason=f"not measured; wanted {self}")
        broken = [words for words, holds in self._checks(value) if not holds]
        return Verdict(ok=not broken, reason=f"{_shown(value)} is {'not ' if broken else ''}{' and '.join(broken) or self}")

    def __str__(self) -> str:
        return " and ".join(words for words, _ in self._checks(0.0))

    def _checks(self, value: float | str) -> list[tuple[str, bool]]:
        checks: list[tuple[str, bool]] = []
        if self.equals is not None:
            checks.append((f"equal to {_shown(self.equals)}", value == self.equals))
        number = value if isinstance(value, int | float) else float("nan")
        for limit, words, holds in (
            (self.at_least, "at least", self.at_least is not None and number >= self.at_least),
            (self.at_most, "at most", self.at_most is not None and number <= self.at_most),
            (self.above, "above", self.above is not None and number > self.above),
            (self.below, "below", self.below is not None and number < self.below),
        ):
            if limit is not None:
                checks.append((f"{words} {_shown(limit)}", holds))
        if self.one_of is not None:
            checks.append((f"one of {', '.join(map(_shown, self.one_of))}", value in self.one_of))
        if self.none_of is not None:
            checks.append((f"none of {', '.join(map(_shown, self.none_of))}", value not in self.none_of))
        return checks


def parse(given: Any) -> Any:  # noqa: ANN401  # whatever stands in the file; pydantic refuses the rest
    """The long form of a tolerance's short ones."""
    if isinstance(given, bool):
        return {"equals": float(given)}
    if isinstance(given, int | float):
        return {"equals": given}
    if isinstance(given, str) and (found := _COMPARISON.match(given.strip())):
        return {_KEYS[found.group(1)]: float(found.group(2))}
    if isinstance(given, str):
        return {"equals": given}
    pair = 2
    if isinstance(given, list) and len(given) == pair:
        return {"at_least": given[0], "at_most": given[1]}
    return given


GivenTolerance = Annotated[Tolerance, BeforeValidator(parse)]


def _shown(value: Value) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
