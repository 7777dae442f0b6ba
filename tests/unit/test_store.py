"""The controller's durable records: what was saved is read back, writes are fenced, damage is set aside, the decision chain shows tampering."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

import cluster.store as store_module
from cluster.core.errors import StaleTable
from cluster.core.ids import Incarnation
from cluster.core.memory import Accusal, ActorRecord, Memory, ModelRecord, RouterRecord
from cluster.core.placement import wanted_copies
from cluster.core.routing_table import ActorEndpoint, TableCopy, TableModel
from cluster.core.table_draft import Held, TableDraft
from cluster.store import ControlStore, NewDecision
from kit.fleet import make_manifest


def full_memory() -> Memory:
    manifest = make_manifest()
    life = Incarnation("actor-0", 7)
    copies = {copy.expert: (TableCopy(life, copy.version),) for copy in wanted_copies(manifest)}
    draft = TableDraft({"actor-0": ActorEndpoint(life, "10.0.0.1", 7001, "node-1")}, copies, {"m": TableModel("m", manifest.digest, 8, 0)})
    return Memory(
        generation=7,
        epoch=12,
        spec_revision=3,
        reached_revision=2,
        replace=True,
        replacing="actor-0",
        models={"m": ModelRecord(manifest, "/models/m", "checkpoint")},
        actors={"actor-0": ActorRecord(life, "node-1", 0.5, 6, was_ready=True)},
        routers={"router-0": RouterRecord("router-0", "head", "d" * 64, "127.0.0.1:7")},
        accused={Held(life, min(wanted_copies(manifest))): Accusal(4.5, "checksum")},
        distrusted=(("node-1", "a" * 64), ("node-0", "b" * 64)),
        published=draft,
    )


def opened(path: Path) -> ControlStore:
    store = ControlStore(path)
    store.take_over()
    return store


def test_saved_memory_is_read_back_whole(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.save(full_memory())
    store.put_goal('{"a": 1}')
    store.put_port(4711)
    store.close()
    again = ControlStore(tmp_path)
    assert again.memory() == full_memory()
    assert (again.goal(), again.port()) == ('{"a": 1}', 4711)


def test_new_store_is_empty_and_has_no_goal(tmp_path: Path) -> None:
    store = opened(tmp_path)
    assert (store.memory(), store.goal(), store.port(), store.decisions()) == (Memory(), None, 0, [])


def test_memory_that_lives_with_the_process_is_not_kept(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.save(replace(full_memory(), issued=frozenset({Incarnation("actor-0", 7)}), router_epochs={"router-0": 4}))
    assert store.memory() == full_memory()


def test_generations_grow_with_every_take_over_and_the_older_holder_cannot_write(tmp_path: Path) -> None:
    first = opened(tmp_path)
    second = ControlStore(tmp_path)
    assert second.take_over() == first.controller_generation + 1
    with pytest.raises(StaleTable, match="superseded by 2"):
        first.save(full_memory())
    second.save(full_memory())
    assert second.memory() == full_memory()
    assert second.take_over(above=100) == 101


def test_refused_write_leaves_nothing_behind(tmp_path: Path) -> None:
    first = opened(tmp_path)
    ControlStore(tmp_path).take_over()
    with pytest.raises(StaleTable):
        first.save(full_memory(), [NewDecision("start", "actor-0", "wanted", 1)])
    assert ControlStore(tmp_path).memory() == Memory()
    assert ControlStore(tmp_path).decisions() == []


@pytest.mark.parametrize("damage", [b"", b"not a database, surely not" * 100])
def test_damaged_file_is_set_aside_and_the_store_starts_empty(tmp_path: Path, damage: bytes) -> None:
    store = opened(tmp_path)
    store.save(full_memory())
    store.close()
    content = store.path.read_bytes()
    store.path.write_bytes(damage or content[: len(content) // 2] + b"\xff" * 100)
    again = ControlStore(tmp_path)
    assert again.was_damaged
    assert again.memory() == Memory()
    assert [path.name for path in tmp_path.glob("*.damaged-*")] == ["control.sqlite.damaged-1"]


def test_decisions_are_numbered_chained_and_the_last_are_given(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for number in range(5):
        store.save(full_memory(), [NewDecision("assume", f"expert {number}", "belongs here", number)], unix_time_s=float(number))
    assert [entry.target for entry in store.decisions(2)] == ["expert 3", "expert 4"]
    assert [entry.sequence for entry in store.decisions()] == [1, 2, 3, 4, 5]
    assert store.first_broken_decision() is None


@pytest.mark.parametrize("tampering", ["UPDATE decisions SET reason = 'other' WHERE sequence = 3", "DELETE FROM decisions WHERE sequence = 3"])
def test_changed_or_removed_decision_breaks_the_chain(tmp_path: Path, tampering: str) -> None:
    store = opened(tmp_path)
    store.save(full_memory(), [NewDecision("assume", str(number), "why", 1) for number in range(5)])
    store.close()
    with sqlite3.connect(store.path) as database:
        database.execute(tampering)
    assert ControlStore(tmp_path).first_broken_decision() in (3, 4)


def test_old_decisions_go_and_the_chain_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_DECISIONS", 10)
    store = opened(tmp_path)
    for number in range(35):
        store.save(full_memory(), [NewDecision("assume", str(number), "why", 1)])
    store.close()
    again = ControlStore(tmp_path)
    assert [entry.target for entry in again.decisions(50)] == [str(number) for number in range(25, 35)]
    assert again.first_broken_decision() is None


@pytest.mark.parametrize("code", [sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_READONLY])
def test_healthy_file_that_cannot_be_opened_now_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    store = opened(tmp_path)
    store.save(full_memory())
    store.close()

    def refuse(_: sqlite3.Connection) -> None:
        error = sqlite3.OperationalError(f"code {code}")
        error.sqlite_errorcode = code
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_require_whole", refuse)
        with pytest.raises(sqlite3.OperationalError):
            ControlStore(tmp_path)
    assert list(tmp_path.glob("*.damaged-*")) == []
    assert ControlStore(tmp_path).memory() == full_memory()


def test_file_that_cannot_be_opened_at_all_is_not_set_aside(tmp_path: Path) -> None:
    (tmp_path / "control.sqlite").mkdir()
    with pytest.raises(sqlite3.OperationalError):
        ControlStore(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["control.sqlite"]
