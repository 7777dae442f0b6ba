"""The chain over recorded decisions: each entry's hash covers the one before it, so that an entry changed or taken out later shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

GENESIS = "0" * 64


@dataclass(frozen=True, slots=True)
class DecisionEntry:
    """One action decided, or one table published (`publish`), with why. `epoch` is the table's at that time."""

    sequence: int
    unix_time_s: float
    action: str
    target: str
    reason: str
    epoch: int


def chained_hash(previous: str, entry: DecisionEntry) -> str:
    """SHA-256 over the previous hash and the entry, in hex."""
    text = json.dumps([previous, asdict(entry)], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def first_break(entries: Iterable[tuple[DecisionEntry, str]], start: str = GENESIS) -> int | None:
    """The sequence number of the first entry that does not follow from the one before it; None when the chain is whole."""
    previous = start
    expected: int | None = None
    for entry, recorded in entries:
        if recorded != chained_hash(previous, entry) or entry.sequence != (entry.sequence if expected is None else expected):
            return entry.sequence
        previous, expected = recorded, entry.sequence + 1
    return None
