"""The controller's durable records: one SQLite file, synced to disk on every commit. What is in here was decided; whether it was done, the fleet knows.

Every write is fenced: it succeeds only for the controller that opened the store last, so that one which lost its place cannot overwrite.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cluster.audit_log import GENESIS, DecisionEntry, chained_hash, first_break
from cluster.core.errors import StaleTable
from cluster.core.memory import Accusal, ActorRecord, Memory, ModelRecord, RouterRecord
from cluster.core.table_codec import from_proto, to_proto
from cluster.core.table_draft import Held, draft_of
from protos.moelastic.control.v1 import control_pb2 as pb

MAX_DECISIONS = 10_000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS decisions (
    sequence INTEGER PRIMARY KEY, unix_time_s REAL NOT NULL, action TEXT NOT NULL, target TEXT NOT NULL, reason TEXT NOT NULL,
    epoch INTEGER NOT NULL, hash TEXT NOT NULL
);
"""
_ACTORS = TypeAdapter(dict[str, ActorRecord])
_ROUTERS = TypeAdapter(dict[str, RouterRecord])
_MODELS = TypeAdapter(dict[str, ModelRecord])
_DEVICES = TypeAdapter(dict[str, str])
_TIMES = TypeAdapter(dict[str, float])
_BLOBS = TypeAdapter(tuple[tuple[str, str], ...])
_ACCUSED = TypeAdapter(list[tuple[Held, Accusal]])


def _text_dump(value: object) -> bytes:
    return str(value).encode()


_DURABLE: dict[str, Callable[[Any], bytes]] = {
    "generation": _text_dump,
    "epoch": _text_dump,
    "spec_revision": _text_dump,
    "reached_revision": _text_dump,
    "replace": lambda value: b"1" if value else b"0",
    "replacing": _text_dump,
    "models": lambda models: _MODELS.dump_json(dict(models)),
    "actors": lambda actors: _ACTORS.dump_json(dict(actors)),
    "routers": lambda routers: _ROUTERS.dump_json(dict(routers)),
    "quarantined": lambda devices: _DEVICES.dump_json(dict(devices)),
    "released": lambda times: _TIMES.dump_json(dict(times)),
    "accused": lambda accused: _ACCUSED.dump_json(list(accused.items())),
    "distrusted": _BLOBS.dump_json,
    "published": lambda draft: to_proto(draft.at_epoch(0)).SerializeToString(deterministic=True),
}


@dataclass(frozen=True, slots=True)
class NewDecision:
    """A decision about to be recorded; the store numbers and chains it."""

    action: str
    target: str
    reason: str
    epoch: int


class ControlStore:
    """Opens, or makes, the store in a folder. A file that is not a whole database is set aside: the controller then rebuilds from what runs.

    Only that: a healthy file that cannot be opened now (locked, no space, no permission, a disk that fails) raises sqlite3.OperationalError.
    """

    def __init__(self, state_dir: Path) -> None:
        state_dir.mkdir(parents=True, exist_ok=True)
        self.path = state_dir / "control.sqlite"
        self.was_damaged = False
        try:
            self._db = _open(self.path)
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            self.was_damaged = True
            _set_aside(self.path)
            self._db = _open(self.path)
        self._written: dict[str, bytes] = dict(self._db.execute("SELECT key, value FROM facts").fetchall())
        self._saved: Memory | None = None
        self.controller_generation = 0

    def take_over(self, *, above: int = 0) -> int:
        """Become the one controller that may write; returns its generation, larger than any before and than `above`."""
        generation = max(self._number("controller_generation"), above) + 1
        self._put("controller_generation", str(generation).encode())
        self._written["controller_generation"] = str(generation).encode()
        self.controller_generation = generation
        return generation

    def memory(self) -> Memory:
        """The durable part of what was remembered; empty on first use."""
        return Memory(
            generation=self._number("generation"),
            epoch=self._number("epoch"),
            spec_revision=self._number("spec_revision"),
            reached_revision=self._number("reached_revision"),
            replace=self._text("replace") == "1",
            replacing=self._text("replacing"),
            models=_MODELS.validate_json(self._written.get("models", b"{}")),
            actors=_ACTORS.validate_json(self._written.get("actors", b"{}")),
            routers=_ROUTERS.validate_json(self._written.get("routers", b"{}")),
            quarantined=_DEVICES.validate_json(self._written.get("quarantined", b"{}")),
            released=_TIMES.validate_json(self._written.get("released", b"{}")),
            accused=dict(_ACCUSED.validate_json(self._written.get("accused", b"[]"))),
            distrusted=_BLOBS.validate_json(self._written.get("distrusted", b"[]")),
            published=draft_of(from_proto(pb.WatchTableResponse.FromString(self._written.get("published", b"")))),
        )

    def save(self, memory: Memory, decisions: Sequence[NewDecision] = (), *, unix_time_s: float = 0.0) -> list[DecisionEntry]:
        """Record memory and decisions in one durable commit. Raises StaleTable when another controller has taken over."""
        last = self._saved
        facts = {name: dump(getattr(memory, name)) for name, dump in _DURABLE.items() if last is None or getattr(memory, name) != getattr(last, name)}
        entries = self._commit(facts, decisions, unix_time_s)
        self._saved = memory
        return entries

    def put_goal(self, spec_json: str) -> None:
        """Record the spec to serve; empty: nothing is to run any more."""
        self._commit({"spec": spec_json.encode()}, (), 0.0)

    def goal(self) -> str | None:
        """The recorded spec as JSON; empty after a `down`, None when there never was one."""
        value = self._written.get("spec")
        return None if value is None else value.decode()

    def put_port(self, port: int) -> None:
        """Record where the control service listens: routers find a restarted controller there."""
        self._commit({"port": str(port).encode()}, (), 0.0)

    def port(self) -> int:
        """The recorded port; 0 when there is none."""
        return self._number("port")

    def decisions(self, limit: int = 50) -> list[DecisionEntry]:
        """The last decisions, oldest first."""
        rows = self._db.execute(
            "SELECT sequence, unix_time_s, action, target, reason, epoch FROM decisions ORDER BY sequence DESC LIMIT ?", (limit,)
        ).fetchall()
        return [DecisionEntry(*row) for row in reversed(rows)]

    def first_broken_decision(self) -> int | None:
        """The sequence of the first recorded decision that was tampered with; None when the chain is whole."""
        rows = self._db.execute("SELECT sequence, unix_time_s, action, target, reason, epoch, hash FROM decisions ORDER BY sequence").fetchall()
        return first_break(((DecisionEntry(*row[:6]), row[6]) for row in rows), self._text("chain_start") or GENESIS)

    def close(self) -> None:
        """Close the file; nothing is left to write."""
        self._db.close()

    def _number(self, key: str) -> int:
        return int(self._text(key) or 0)

    def _text(self, key: str) -> str:
        return self._written.get(key, b"").decode()

    def _commit(self, facts: dict[str, bytes], decisions: Iterable[NewDecision], unix_time_s: float) -> list[DecisionEntry]:
        changed = {key: value for key, value in facts.items() if self._written.get(key) != value}
        decisions = list(decisions)
        if not changed and not decisions:
            return []
        self._db.execute("BEGIN IMMEDIATE")
        with self._db:
            self._check_fence()
            for key, value in changed.items():
                self._put(key, value)
            entries = self._append(decisions, unix_time_s)
        self._written.update(changed)
        return entries

    def _check_fence(self) -> None:
        row = self._db.execute("SELECT value FROM facts WHERE key = 'controller_generation'").fetchone()
        newest = int(row[0]) if row is not None else 0
        if newest != self.controller_generation:
            message = f"controller generation {self.controller_generation} was superseded by {newest}; this one must stop"
            raise StaleTable(message)

    def _put(self, key: str, value: bytes) -> None:
        self._db.execute("INSERT INTO facts VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", (key, value))

    def _append(self, decisions: Iterable[NewDecision], unix_time_s: float) -> list[DecisionEntry]:
        row = self._db.execute("SELECT sequence, hash FROM decisions ORDER BY sequence DESC LIMIT 1").fetchone()
        sequence, previous = row if row is not None else (0, self._text("chain_start") or GENESIS)
        entries = []
        for new in decisions:
            sequence += 1
            entry = DecisionEntry(sequence, unix_time_s, new.action, new.target, new.reason, new.epoch)
            previous = chained_hash(previous, entry)
            self._db.execute(
                "INSERT INTO decisions VALUES (?, ?, ?, ?, ?, ?, ?)",
                (entry.sequence, entry.unix_time_s, entry.action, entry.target, entry.reason, entry.epoch, previous),
            )
            entries.append(entry)
        if entries:
            self._trim(sequence)
        return entries

    def _trim(self, newest: int) -> None:
        """Keep the last MAX_DECISIONS; the chain then starts at the hash of the last one that went."""
        row = self._db.execute("SELECT hash FROM decisions WHERE sequence = ?", (newest - MAX_DECISIONS,)).fetchone()
        if row is not None:
            self._put("chain_start", row[0].encode())
            self._written["chain_start"] = row[0].encode()
            self._db.execute("DELETE FROM decisions WHERE sequence <= ?", (newest - MAX_DECISIONS,))


def _open(path: Path) -> sqlite3.Connection:
    """Open and check. Autocommit outside explicit transactions; FULL: a commit that returned survives a power cut."""
    connection = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        _require_whole(connection)
        connection.executescript(_SCHEMA)
    except sqlite3.DatabaseError:
        connection.close()
        raise
    return connection


class _NotWhole(sqlite3.DatabaseError):
    """SQLite's own check found damage."""


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether the file itself is at fault, and not the moment."""
    primary_code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    return isinstance(error, _NotWhole) or primary_code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _require_whole(connection: sqlite3.Connection) -> None:
    with closing(connection.execute("PRAGMA quick_check")) as check:
        verdict = check.fetchone()[0]
    if verdict != "ok":
        raise _NotWhole(verdict)


def _set_aside(path: Path) -> None:
    """Keep a damaged file for a look later, under the first free name."""
    number = 1
    while (target := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(target)
    log = path.with_name(f"{path.name}-wal")
    if log.exists():
        log.rename(target.with_name(f"{target.name}-wal"))
    path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
