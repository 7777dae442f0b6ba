"""Single values of a header that nobody vouches for: each function gives the value back as its type, or raises TypeError or ValueError without naming it.

Types are compared, not asked for with isinstance: to that a bool is an int. Each check is one call, since a frame has dozens.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

MAX_TEXT_CHARS = 1024
MAX_WORDS = 256
_T = TypeVar("_T")


def typed(value: Any, kind: type[_T]) -> _T:  # noqa: ANN401  (untrusted)
    """A value of exactly this type."""
    if type(value) is not kind:
        raise TypeError(kind.__name__)
    return value


def count_of(value: Any) -> int:  # noqa: ANN401
    """An int of at least 0."""
    if type(value) is not int or value < 0:
        message = "count"
        raise ValueError(message)
    return value


def check_counts(*values: Any) -> None:  # noqa: ANN401
    """Each must be an int of at least 0."""
    for value in values:
        if type(value) is not int or value < 0:
            message = "count"
            raise ValueError(message)


def size_of(value: Any) -> int:  # noqa: ANN401
    """An int of at least 1: zero would let the other factors of a length be anything."""
    if type(value) is not int or value < 1:
        message = "size"
        raise ValueError(message)
    return value


def seconds_of(value: Any) -> float:  # noqa: ANN401
    """A finite float of at least 0."""
    if type(value) is not float or not 0.0 <= value < math.inf:
        message = "seconds"
        raise ValueError(message)
    return value


def text_of(value: Any) -> str:  # noqa: ANN401
    """A str of at most MAX_TEXT_CHARS."""
    if type(value) is not str or len(value) > MAX_TEXT_CHARS:
        message = "text"
        raise ValueError(message)
    return value


def printable(text: str) -> str:
    """A peer's words, fit for a log line or an error message: one line, no control characters, not long."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:MAX_WORDS])


def bytes_of(value: Any) -> bytes:  # noqa: ANN401
    """A bytes value; the header's own limit bounds it."""
    return typed(value, bytes)


def flag_of(value: Any) -> bool:  # noqa: ANN401
    """True or False."""
    return typed(value, bool)
