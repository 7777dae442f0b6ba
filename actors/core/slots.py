"""What an expert actor holds: the lifecycle of its slots, the bytes they take, and the epoch fence. Events in, instructions out.

    absent --assume--> loading --loaded--> ready --drain--> draining --release--> absent
                          |                  ^                 |
                          +--failed--> failed|                 +--assume--> ready
                                         ^   |
    ready, draining --corrupted----------+   +---assume (again)

A lease is one segment under way: a copy is let go only when its last lease has ended. Results of a load that was cancelled carry an old ticket.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from cluster.core.errors import InvariantBroken, SlotsExhausted, StaleTable
from cluster.core.ids import CopyId
from cluster.core.status import SlotReport, SlotState


@dataclass(frozen=True, slots=True)
class SizedCopy:
    """A copy and the bytes of the device's memory that it will take; `expanded_bytes`: what a shadow takes more while it is expanded."""

    copy: CopyId
    num_bytes: int
    expanded_bytes: int = 0


@dataclass(frozen=True, slots=True)
class AssumeReceived:
    """The controller wants these copies held: all of them, or the command is refused and changes nothing."""

    epoch: int
    copies: tuple[SizedCopy, ...]


@dataclass(frozen=True, slots=True)
class DrainReceived:
    """The controller wants no new segments taken for these copies."""

    epoch: int
    copies: tuple[CopyId, ...]


@dataclass(frozen=True, slots=True)
class ReleaseReceived:
    """The controller wants the slots of these copies free."""

    epoch: int
    copies: tuple[CopyId, ...]


@dataclass(frozen=True, slots=True)
class CopyLoaded:
    """A load ended well; the copy takes `num_bytes`."""

    ticket: int
    copy: CopyId
    num_bytes: int


@dataclass(frozen=True, slots=True)
class CopyFailed:
    """A load ended badly; `reason` is for people."""

    ticket: int
    copy: CopyId
    reason: str


@dataclass(frozen=True, slots=True)
class CopyCorrupted:
    """A loaded copy's bytes are not those that were loaded; `reason` is for people. It takes no new segments and goes when its leases have ended."""

    copy: CopyId
    reason: str


@dataclass(frozen=True, slots=True)
class SegmentsEnded:
    """The leases of these copies ended, one for each mention."""

    copies: tuple[CopyId, ...]


Event = AssumeReceived | DrainReceived | ReleaseReceived | CopyLoaded | CopyFailed | CopyCorrupted | SegmentsEnded


@dataclass(frozen=True, slots=True)
class LoadCopy:
    """Map, verify and warm a copy, then say CopyLoaded or CopyFailed with the same ticket."""

    ticket: int
    copy: CopyId


@dataclass(frozen=True, slots=True)
class CancelLoad:
    """Nobody waits for this load any more."""

    ticket: int


@dataclass(frozen=True, slots=True)
class KeepWeights:
    """What was loaded under this ticket answers from now on."""

    ticket: int
    copy: CopyId


@dataclass(frozen=True, slots=True)
class DropWeights:
    """Let go of a copy's weights."""

    copy: CopyId


Instruction = LoadCopy | CancelLoad | KeepWeights | DropWeights


class Holding(StrEnum):
    """What an actor says when a segment asks for a copy."""

    HELD = "held"
    DRAINING = "draining"
    NOT_HELD = "not_held"


@dataclass(slots=True)
class _Slot:
    copy: CopyId
    state: SlotState
    num_bytes: int
    ticket: int
    is_loaded: bool = False
    is_released: bool = False
    leases: int = 0
    reason: str = ""
    expanded_bytes: int = 0


class SlotTable:
    """The slots of one actor. Not thread-safe: one owner mutates it, under its lock."""

    def __init__(self, *, num_slots: int, capacity_bytes: int, num_reserved: int = 0) -> None:
        """Of the capacity, room is set aside for `num_reserved` expansions of the shadows in slots, the largest ones."""
        self.num_slots = num_slots
        self.capacity_bytes = capacity_bytes
        self.max_epoch = 0
        self._num_reserved = num_reserved
        self._slots: dict[CopyId, _Slot] = {}
        self._next_ticket = 1

    @property
    def used_bytes(self) -> int:
        """Bytes of every copy that is held or on its way."""
        return sum(slot.num_bytes for slot in self._slots.values())

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the capacity that no slot may take: shadows in slots may be expanded there."""
        return self.largest_expanded_bytes(self._num_reserved)

    def largest_expanded_bytes(self, count: int) -> int:
        """Bytes that so many of the shadows in slots take at most when they are expanded."""
        return sum(heapq.nlargest(count, (slot.expanded_bytes for slot in self._slots.values())))

    @property
    def is_loading(self) -> bool:
        """Whether a copy is on its way."""
        return any(slot.state is SlotState.LOADING for slot in self._slots.values())

    def reports(self) -> tuple[SlotReport, ...]:
        """Every slot in use, ordered by copy."""
        slots = sorted(self._slots.values(), key=lambda slot: slot.copy)
        return tuple(SlotReport(slot.copy, slot.state, slot.num_bytes, slot.reason) for slot in slots)

    def handle(self, event: Event) -> tuple[Instruction, ...]:  # noqa: PLR0911  (one for each event)
        """The one mutator. Raises StaleTable for a command older than the newest seen, SlotsExhausted for an assume that does not fit."""
        match event:
            case SegmentsEnded():  # first: it comes with every frame
                return tuple(self._ended(event.copies))
            case AssumeReceived():
                self._fence(event.epoch)
                return tuple(self._assume(event.copies))
            case DrainReceived():
                self._fence(event.epoch)
                return tuple(self._drain(event.copies))
            case ReleaseReceived():
                self._fence(event.epoch)
                return tuple(self._release(event.copies))
            case CopyLoaded():
                return self._loaded(event)
            case CopyFailed():
                return self._failed(event)
            case CopyCorrupted():
                return tuple(self._corrupted(event))
            case _:
                assert_never(event)

    def lease(self, copies: Sequence[CopyId]) -> tuple[Holding, ...]:
        """Ask for each copy; every HELD takes a lease, to be given back with SegmentsEnded."""
        return tuple([self._lease(copy) for copy in copies])

    def _lease(self, copy: CopyId) -> Holding:
        slot = self._slots.get(copy)
        if slot is None or slot.is_released:
            return Holding.NOT_HELD
        if slot.state is SlotState.DRAINING:
            return Holding.DRAINING
        if slot.state is not SlotState.READY:
            return Holding.NOT_HELD
        slot.leases += 1
        return Holding.HELD

    def _fence(self, epoch: int) -> None:
        if epoch < self.max_epoch:
            message = f"command of epoch {epoch} is older than epoch {self.max_epoch}, which this actor has seen; re-read the store and command again"
            raise StaleTable(message)
        self.max_epoch = epoch

    def _assume(self, wanted: tuple[SizedCopy, ...]) -> Iterable[Instruction]:
        needed = {item.copy: item for item in wanted if self._needs_load(item.copy)}
        self._check_room(needed)
        instructions: list[Instruction] = []
        for copy in dict.fromkeys(item.copy for item in wanted):
            if copy in needed:
                instructions.append(self._begin_load(needed[copy]))
            elif (slot := self._slots[copy]).state is SlotState.DRAINING:
                slot.state, slot.is_released = SlotState.READY, False
        return instructions

    def _needs_load(self, copy: CopyId) -> bool:
        slot = self._slots.get(copy)
        return slot is None or not (slot.is_loaded or slot.state is SlotState.LOADING)

    def _check_room(self, needed: dict[CopyId, SizedCopy]) -> None:
        new_slots = sum(1 for copy in needed if copy not in self._slots)
        free_slots = self.num_slots - len(self._slots)
        if new_slots > free_slots:
            message = (
                f"assume needs {new_slots} slots and {free_slots} of {self.num_slots} are free; "
                "release copies, or raise actors.slots_per_actor or actors.free_slots"
            )
            raise SlotsExhausted(message)
        wanted_bytes = sum(item.num_bytes for item in needed.values())
        expanded = [*(item.expanded_bytes for item in needed.values()), *(slot.expanded_bytes for slot in self._slots.values())]
        reserved_bytes = sum(heapq.nlargest(self._num_reserved, expanded))
        free_bytes = max(0, self.capacity_bytes - self.used_bytes - reserved_bytes)
        if wanted_bytes > free_bytes:
            aside = f", {reserved_bytes} set aside for expanded shadows" if reserved_bytes else ""
            message = (
                f"assume needs {wanted_bytes} bytes and {free_bytes} of {self.capacity_bytes} are free{aside}; "
                "release copies, add actors, or raise actors.memory_bytes"
            )
            raise SlotsExhausted(message)

    def _begin_load(self, item: SizedCopy) -> LoadCopy:
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        self._slots[item.copy] = _Slot(item.copy, SlotState.LOADING, item.num_bytes, ticket, expanded_bytes=item.expanded_bytes)
        return LoadCopy(ticket, item.copy)

    def _drain(self, copies: tuple[CopyId, ...]) -> Iterable[Instruction]:
        for copy in copies:
            slot = self._slots.get(copy)
            if slot is None or slot.state is SlotState.FAILED:
                continue
            if slot.state is SlotState.LOADING:
                slot.num_bytes = slot.expanded_bytes = 0
                yield CancelLoad(slot.ticket)
            slot.state = SlotState.DRAINING

    def _release(self, copies: tuple[CopyId, ...]) -> Iterable[Instruction]:
        for copy in copies:
            slot = self._slots.get(copy)
            if slot is None:
                continue
            if slot.state is SlotState.LOADING:
                yield CancelLoad(slot.ticket)
            if slot.is_loaded:
                slot.state, slot.is_released = SlotState.DRAINING, True
            if slot.leases == 0:
                yield from self._free(slot)

    def _free(self, slot: _Slot) -> Iterable[Instruction]:
        del self._slots[slot.copy]
        if slot.is_loaded:
            yield DropWeights(slot.copy)

    def _loaded(self, event: CopyLoaded) -> tuple[Instruction, ...]:
        slot = self._awaited(event.copy, event.ticket)
        if slot is None:
            return ()
        free_bytes = self.capacity_bytes - self.reserved_bytes - self.used_bytes + slot.num_bytes
        if event.num_bytes > free_bytes:
            reason = f"SLOTS_EXHAUSTED: the loaded copy takes {event.num_bytes} bytes and {free_bytes} of {self.capacity_bytes} are free"
            return self._failed(CopyFailed(event.ticket, event.copy, reason))
        slot.state, slot.is_loaded, slot.num_bytes = SlotState.READY, True, event.num_bytes
        return (KeepWeights(event.ticket, event.copy),)

    def _failed(self, event: CopyFailed) -> tuple[Instruction, ...]:
        slot = self._awaited(event.copy, event.ticket)
        if slot is not None:
            slot.state, slot.num_bytes, slot.expanded_bytes, slot.reason = SlotState.FAILED, 0, 0, event.reason
        return ()

    def _corrupted(self, event: CopyCorrupted) -> Iterable[Instruction]:
        slot = self._slots.get(event.copy)
        if slot is None or not slot.is_loaded or slot.is_released:
            return
        slot.state, slot.reason = SlotState.FAILED, event.reason
        if slot.leases == 0:
            yield from self._unload(slot)

    def _unload(self, slot: _Slot) -> Iterable[Instruction]:
        slot.is_loaded, slot.num_bytes, slot.expanded_bytes = False, 0, 0
        yield DropWeights(slot.copy)

    def _awaited(self, copy: CopyId, ticket: int) -> _Slot | None:
        slot = self._slots.get(copy)
        return slot if slot is not None and slot.state is SlotState.LOADING and slot.ticket == ticket else None

    def _ended(self, copies: tuple[CopyId, ...]) -> Iterable[Instruction]:
        for copy in copies:
            slot = self._slots.get(copy)
            if slot is None or slot.leases == 0:
                message = f"a lease of {copy} ended that was never given"
                raise InvariantBroken(message)
            slot.leases -= 1
            if slot.is_released and slot.leases == 0:
                yield from self._free(slot)
            elif slot.state is SlotState.FAILED and slot.leases == 0:
                yield from self._unload(slot)

    def validate(self) -> None:
        """Check what must hold between any two events; raises InvariantBroken. Called by tests after every event."""
        checks = {
            "slots in use <= num_slots": len(self._slots) <= self.num_slots,
            "used_bytes + reserved_bytes <= capacity_bytes": self.used_bytes + self.reserved_bytes <= self.capacity_bytes,
            "leases are of loaded copies": all(slot.is_loaded or slot.leases == 0 for slot in self._slots.values()),
            "released copies wait for a lease only": all(slot.leases > 0 for slot in self._slots.values() if slot.is_released),
            "ready copies are loaded": all(slot.is_loaded for slot in self._slots.values() if slot.state is SlotState.READY),
            "loading copies are not": not any(slot.is_loaded for slot in self._slots.values() if slot.state is SlotState.LOADING),
            "failed copies hold no bytes once nothing uses them": all(
                slot.num_bytes == 0 and not slot.is_loaded for slot in self._slots.values() if slot.state is SlotState.FAILED and slot.leases == 0
            ),
        }
        broken = [name for name, holds in checks.items() if not holds]
        if broken:
            message = f"slot table: {', '.join(broken)}"
            raise InvariantBroken(message)
