"""Reads resident weights again in the background and compares them with the digests taken when they were loaded.

One pass over everything takes about `every_s`: a piece, then a pause. Whoever is suspected is read at once. Nothing here is on a frame's way.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.blob_files import StoredBlob
from actors.core.weight_digests import array_digest, array_digests, have_changed, row_digests, row_spans
from actors.device import ErrorKind
from actors.expert_layouts import ExpertWeights
from actors.staging import Staging, judged
from cluster.core.ids import CopyId

PIECE_BYTES = 1 << 20
_LOWEST_PRIORITY = 19

Piece = tuple[str, int, int]


# Weakly referable: the pause between two pieces must not keep weights alive whose slot is free.
@dataclass(frozen=True, eq=False)
class Resident:
    """What a slot holds, with its digests; `pieces` are names and rows of tensors to be read one after the other."""

    copy: CopyId
    loaded: ExpertWeights | StoredBlob
    packed_digests: Mapping[str, int]
    pieces: tuple[Piece, ...]

    def has_changed(self, piece: Piece) -> bool:
        """Read a piece again: whether it is not what was loaded."""
        name, first, stop = piece
        if isinstance(self.loaded, ExpertWeights):
            return have_changed(self.loaded.tensors[name], self.loaded.digests[name], first, stop)
        return array_digest(self.loaded.tensors[name]) != self.packed_digests[name]


def resident_of(copy: CopyId, loaded: ExpertWeights | StoredBlob) -> Resident:
    """What was just loaded; packed tensors are digested here, weights were when they were loaded."""
    if isinstance(loaded, ExpertWeights):
        pieces = tuple((name, *span) for name in loaded.digests for span in row_spans(loaded.tensors[name], PIECE_BYTES))
        return Resident(copy, loaded, {}, pieces)
    return Resident(copy, loaded, array_digests(loaded.tensors), tuple((name, 0, 0) for name in loaded.tensors))


def digests_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The digests of an expert's tensors, on their device."""
    return {name: row_digests(tensor) for name, tensor in tensors.items()}


class Redigester:
    """One thread of low priority. `on_changed` is called from it, without any lock held, and may call back.

    A piece that there is no memory for to read it is left to the next pass.
    """

    def __init__(
        self, every_s: float, *, staging: Callable[[], Staging], on_changed: Callable[[Resident], None], on_sticky: Callable[[BaseException], None]
    ) -> None:
        self._every_s = every_s
        self._open_staging = staging
        self._on_changed = on_changed
        self._on_sticky = on_sticky
        self._changed = threading.Condition()
        self._residents: dict[CopyId, Resident] = {}
        self._suspects: deque[Resident] = deque()
        self._is_stopping = False
        self.passes_done = 0
        self._thread = threading.Thread(target=self._main, name="redigest", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def keep(self, resident: Resident) -> None:
        """A slot holds this from now on, in place of what it held."""
        with self._changed:
            self._residents[resident.copy] = resident

    def drop(self, copy: CopyId) -> None:
        """Its slot is free."""
        with self._changed:
            self._residents.pop(copy, None)

    def is_kept(self, resident: Resident) -> bool:
        """Whether a slot still holds this very object."""
        with self._changed:
            return self._residents.get(resident.copy) is resident

    def suspect(self, weights: ExpertWeights) -> None:
        """Read these weights at once; ignored when no slot holds them."""
        with self._changed:
            self._suspects.extend(item for item in self._residents.values() if item.loaded is weights and item not in self._suspects)
            self._changed.notify_all()

    def stop(self, timeout_s: float) -> bool:
        """End. False when a piece is still being read at the limit."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            self._serve()
        except Exception as error:  # noqa: BLE001  (an actor that reads its weights no more must not look alive)
            self._on_sticky(error)

    def _serve(self) -> None:
        torch.set_num_threads(1)
        with contextlib.suppress(OSError, AttributeError):  # a system without priorities of threads: the pauses alone must do
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        staging = self._open_staging()
        with staging.scope(), torch.inference_mode():
            while self._pass(staging):
                self.passes_done += 1

    def _pass(self, staging: Staging) -> bool:
        """Read everything once, or wait a while when there is nothing. False when it is time to end."""
        with self._changed:
            residents = [*self._residents.values()]
        if not residents:
            return self._pause(self._every_s, staging)
        pause_s = self._every_s / sum(len(resident.pieces) for resident in residents)
        waiting = [weakref.ref(resident) for resident in residents]
        del residents
        return all(self._read(resident, pause_s, staging) for resident in waiting)

    def _read(self, waiting: weakref.ref[Resident], pause_s: float, staging: Staging) -> bool:
        number = 0
        while (resident := waiting()) is not None and self.is_kept(resident) and number < len(resident.pieces):
            if self._has_changed(resident, resident.pieces[number], staging):
                self._on_changed(resident)
                del resident
                return self._pause(pause_s, staging)
            del resident
            if not self._pause(pause_s, staging):
                return False
            number += 1
        return True

    def _has_changed(self, resident: Resident, piece: Piece, staging: Staging) -> bool:
        try:
            return resident.has_changed(piece)
        except Exception as error:
            kind = judged(error, staging)[0]  # of the error itself nothing is kept: its traceback holds tensors
            if kind is not ErrorKind.OUT_OF_MEMORY:
                raise
        staging.free()
        return False

    def _pause(self, pause_s: float, staging: Staging) -> bool:
        """Wait, but read suspects at once. False when it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopping or bool(self._suspects), pause_s)
            suspects, is_stopping = [*self._suspects], self._is_stopping
            self._suspects.clear()
        while suspects:
            resident = suspects.pop()
            if self.is_kept(resident) and any(self._has_changed(resident, piece, staging) for piece in resident.pieces):
                self._on_changed(resident)
        return not is_stopping
