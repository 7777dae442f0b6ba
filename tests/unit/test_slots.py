"""The slot table: a golden transcript of its lifecycle, and what must hold after any sequence of events."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.core.slots import (
    AssumeReceived,
    CancelLoad,
    CopyFailed,
    CopyLoaded,
    DrainReceived,
    DropWeights,
    Event,
    Holding,
    Instruction,
    KeepWeights,
    LoadCopy,
    ReleaseReceived,
    SegmentsEnded,
    SizedCopy,
    SlotTable,
)
from cluster.core.errors import InvariantBroken, MoeError, SlotsExhausted, StaleTable
from cluster.core.ids import CopyId, ExpertId, Role
from cluster.core.status import SlotState
from kit.transcript import replay

TRANSCRIPT = Path(__file__).parent / "transcripts" / "slots.txt"


def copy_named(name: str) -> CopyId:
    return CopyId(ExpertId("m", 0, ord(name)), name * 4)


def name_of(copy: CopyId) -> str:
    return copy.version[0]


class Player:
    """Plays a transcript's commands on a slot table."""

    def __init__(self) -> None:
        self.table = SlotTable(num_slots=0, capacity_bytes=0)

    def __call__(self, command: str) -> list[str]:
        verb, *words = command.split()
        if verb == "table":
            values = dict(word.split("=") for word in words)
            self.table = SlotTable(num_slots=int(values["slots"]), capacity_bytes=int(values["bytes"]))
            return []
        if verb == "lease":
            return [f"{word}: {holding}" for word, holding in zip(words, self.table.lease([copy_named(word) for word in words]), strict=True)]
        try:
            instructions = self.table.handle(self.event(verb, words))
        except MoeError as error:
            return [f"{error.reason}: {error}", self.state()]
        finally:
            self.table.validate()
        return [*(self.told(instruction) for instruction in instructions), self.state()]

    @staticmethod
    def event(verb: str, words: list[str]) -> Event:
        match verb:
            case "assume":
                sized = (word.split(":") for word in words[1:])
                return AssumeReceived(int(words[0]), tuple(SizedCopy(copy_named(name), int(size)) for name, size in sized))
            case "drain":
                return DrainReceived(int(words[0]), tuple(map(copy_named, words[1:])))
            case "release":
                return ReleaseReceived(int(words[0]), tuple(map(copy_named, words[1:])))
            case "loaded":
                return CopyLoaded(int(words[0][1:]), copy_named(words[1]), int(words[2]))
            case "failed":
                return CopyFailed(int(words[0][1:]), copy_named(words[1]), " ".join(words[2:]))
            case "ended":
                return SegmentsEnded(tuple(map(copy_named, words)))
        message = f"unknown verb {verb}"
        raise ValueError(message)

    @staticmethod
    def told(instruction: Instruction) -> str:
        match instruction:
            case LoadCopy(ticket, copy):
                return f"-> load #{ticket} {name_of(copy)}"
            case CancelLoad(ticket):
                return f"-> cancel #{ticket}"
            case KeepWeights(ticket, copy):
                return f"-> keep #{ticket} {name_of(copy)}"
            case DropWeights(copy):
                return f"-> drop {name_of(copy)}"

    def state(self) -> str:
        table = self.table
        slots = [f"{name_of(slot.copy)} {slot.state} {slot.num_bytes}{f' ({slot.reason})' if slot.reason else ''}" for slot in table.reports()]
        return (
            f"= epoch {table.max_epoch}, {len(slots)}/{table.num_slots} slots, {table.used_bytes}/{table.capacity_bytes} bytes: {', '.join(slots) or 'empty'}"
        )


def test_slot_lifecycle_reads_as_its_transcript() -> None:
    recorded, replayed = replay(TRANSCRIPT, Player())
    assert replayed == recorded


def loaded_table(*names: str, num_slots: int = 4, capacity_bytes: int = 1000) -> SlotTable:
    table = SlotTable(num_slots=num_slots, capacity_bytes=capacity_bytes)
    for instruction in table.handle(AssumeReceived(1, tuple(SizedCopy(copy_named(name), 100) for name in names))):
        assert isinstance(instruction, LoadCopy)
        table.handle(CopyLoaded(instruction.ticket, instruction.copy, 100))
    return table


def test_a_single_slot_holds_one_copy_and_refuses_a_second_with_both_numbers() -> None:
    table = loaded_table("a", num_slots=1)
    with pytest.raises(SlotsExhausted, match="needs 1 slots and 0 of 1 are free"):
        table.handle(AssumeReceived(1, (SizedCopy(copy_named("b"), 100),)))
    assert [slot.copy for slot in table.reports()] == [copy_named("a")]
    table.handle(ReleaseReceived(1, (copy_named("a"),)))
    assert table.handle(AssumeReceived(1, (SizedCopy(copy_named("b"), 100),))) == (LoadCopy(2, copy_named("b")),)


def test_an_assume_beyond_the_bytes_names_both_numbers_and_changes_nothing() -> None:
    table = loaded_table("a", capacity_bytes=150)
    before = table.reports()
    with pytest.raises(SlotsExhausted, match="needs 51 bytes and 50 of 150 are free"):
        table.handle(AssumeReceived(2, (SizedCopy(copy_named("b"), 51),)))
    assert table.reports() == before


@pytest.mark.parametrize("event_type", [DrainReceived, ReleaseReceived, AssumeReceived])
def test_a_command_of_an_older_epoch_is_refused_and_one_of_the_same_epoch_is_not(event_type: type[DrainReceived | ReleaseReceived | AssumeReceived]) -> None:
    table = SlotTable(num_slots=1, capacity_bytes=1)
    table.handle(event_type(7, ()))
    table.handle(event_type(7, ()))
    with pytest.raises(StaleTable, match="epoch 6 is older than epoch 7"):
        table.handle(event_type(6, ()))
    assert table.max_epoch == 7


def test_the_roles_of_one_expert_are_different_copies() -> None:
    table = loaded_table("a")
    shadow = CopyId(copy_named("a").expert, copy_named("a").version, Role.SHADOW)
    assert table.lease([shadow]) == (Holding.NOT_HELD,)


def test_a_lease_that_was_never_given_cannot_end() -> None:
    table = loaded_table("a")
    with pytest.raises(InvariantBroken):
        table.handle(SegmentsEnded((copy_named("a"),)))


def test_a_copy_with_segments_under_way_keeps_its_weights_until_the_last_one_ends() -> None:
    table = loaded_table("a")
    copy = copy_named("a")
    assert table.lease([copy, copy]) == (Holding.HELD, Holding.HELD)
    assert table.handle(ReleaseReceived(2, (copy,))) == ()
    assert table.handle(SegmentsEnded((copy,))) == ()
    assert table.handle(SegmentsEnded((copy,))) == (DropWeights(copy),)
    assert table.reports() == ()


class Oracle:
    """A naive shell: holds what it was told to keep, and checks that every lease is of weights that are there."""

    def __init__(self, table: SlotTable) -> None:
        self.table = table
        self.loading: dict[int, CopyId] = {}
        self.weights: set[CopyId] = set()
        self.leases: list[CopyId] = []

    def tell(self, event: Event) -> None:
        before = self.table.reports()
        try:
            instructions = self.table.handle(event)
        except (SlotsExhausted, StaleTable):
            assert self.table.reports() == before
            return
        for instruction in instructions:
            self.follow(instruction)

    def follow(self, instruction: Instruction) -> None:
        match instruction:
            case LoadCopy(ticket, copy):
                assert ticket not in self.loading
                self.loading[ticket] = copy
            case CancelLoad(ticket):
                assert ticket in self.loading
            case KeepWeights(_, copy):
                assert copy not in self.weights
                self.weights.add(copy)
            case DropWeights(copy):
                assert copy not in self.leases
                self.weights.remove(copy)

    def check(self) -> None:
        self.table.validate()
        states = {slot.copy: slot.state for slot in self.table.reports()}
        assert {copy for copy, state in states.items() if state is SlotState.READY} <= self.weights <= set(states)


names = st.sampled_from("abcdef")
steps = st.one_of(
    st.tuples(st.just("assume"), st.lists(names, max_size=3), st.integers(0, 60), st.integers(0, 3)),
    st.tuples(st.just("drain"), st.lists(names, max_size=3), st.just(0), st.integers(0, 3)),
    st.tuples(st.just("release"), st.lists(names, max_size=3), st.just(0), st.integers(0, 3)),
    st.tuples(st.just("lease"), st.lists(names, max_size=3), st.just(0), st.just(0)),
    st.tuples(st.just("end"), st.just([]), st.integers(0, 9), st.just(0)),
    st.tuples(st.sampled_from(["loaded", "failed"]), st.just([]), st.integers(0, 60), st.just(0)),
)


def play_step(oracle: Oracle, step: tuple[str, list[str], int, int], epoch: int) -> None:
    verb, chosen, number, back = step
    copies = tuple(copy_named(name) for name in chosen)
    match verb:
        case "assume":
            oracle.tell(AssumeReceived(epoch - back, tuple(SizedCopy(copy, number) for copy in copies)))
        case "drain":
            oracle.tell(DrainReceived(epoch - back, copies))
        case "release":
            oracle.tell(ReleaseReceived(epoch - back, copies))
        case "lease":
            holdings = oracle.table.lease(copies)
            held = [copy for copy, holding in zip(copies, holdings, strict=True) if holding is Holding.HELD]
            assert set(held) <= oracle.weights
            oracle.leases.extend(held)
        case "end" if oracle.leases:
            oracle.tell(SegmentsEnded((oracle.leases.pop(number % len(oracle.leases)),)))
        case "loaded" | "failed" if oracle.loading:
            ticket = sorted(oracle.loading)[number % len(oracle.loading)]
            copy = oracle.loading.pop(ticket)
            oracle.tell(CopyLoaded(ticket, copy, number) if verb == "loaded" else CopyFailed(ticket, copy, "reason"))


@given(st.lists(steps, max_size=60))
def test_no_sequence_of_events_breaks_the_table_or_leases_what_is_not_there(script: list[tuple[str, list[str], int, int]]) -> None:
    oracle = Oracle(SlotTable(num_slots=4, capacity_bytes=120))
    for number, step in enumerate(script):
        play_step(oracle, step, epoch=3 + number // 4)
        oracle.check()
    for copy in (*oracle.leases,):
        oracle.leases.remove(copy)
        oracle.tell(SegmentsEnded((copy,)))
    oracle.tell(ReleaseReceived(99, tuple(copy_named(name) for name in "abcdef")))
    assert oracle.table.reports() == ()
    assert oracle.weights == set()
    assert oracle.table.used_bytes == 0


def test_room_is_set_aside_for_the_largest_expansions_of_what_is_held_or_on_its_way_and_for_nothing_else() -> None:
    table = SlotTable(num_slots=8, capacity_bytes=100, num_reserved=2)

    def shadow(name: str, expanded_bytes: int) -> SizedCopy:
        return SizedCopy(copy_named(name), 5, expanded_bytes)

    loads = table.handle(AssumeReceived(1, (shadow("a", 10), shadow("b", 20), shadow("c", 30))))
    assert (table.used_bytes, table.reserved_bytes) == (15, 50)
    with pytest.raises(SlotsExhausted, match="needs 36 bytes and 35 of 100 are free, 50 set aside for expanded shadows"):
        table.handle(AssumeReceived(1, (SizedCopy(copy_named("d"), 36),)))
    with pytest.raises(SlotsExhausted, match="needs 5 bytes and 0 of 100 are free, 100 set aside"):
        table.handle(AssumeReceived(1, (shadow("e", 70),)))
    table.handle(CopyLoaded(1, copy_named("a"), 5))
    table.handle(CopyFailed(2, copy_named("b"), "broken"))
    table.handle(DrainReceived(1, (copy_named("c"),)))
    assert isinstance(loads[2], LoadCopy)
    assert (table.reserved_bytes, table.largest_expanded_bytes(1)) == (10, 10)
    table.validate()
    table.handle(ReleaseReceived(1, (copy_named("a"),)))
    assert table.reserved_bytes == 0
