"""Loads copies beside the compute thread: map the stored blob, verify it, bring it to the device, warm it with two forwards, and say how it went.

A shadow is expanded and warmed once, to see that it can be, and held packed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from actors.blob_files import StoredBlob
from actors.core.slots import CopyFailed, LoadCopy
from actors.device import ErrorKind, error_kind
from actors.expert_layouts import TORCH_DTYPES, ExpertWeights, load_weights
from actors.frame_forward import GroupedForward
from actors.staging import Staging, judged
from cluster.core.errors import CheckpointError, MoeError
from cluster.core.ids import CopyId, Role

WARM_ROWS = (1, 16)
Loaded = ExpertWeights | StoredBlob
"""What a slot holds: a replica's weights, or a shadow as it is stored."""


class BlobSource(Protocol):
    """Where stored experts are opened from; `actors.expert_store.ExpertStore` is one."""

    def open(self, digest: str) -> StoredBlob:
        """Verify a blob and map it."""
        ...


class CopyLoader:
    """One thread, one load at a time, in order; the queue is bounded by the slots that ask."""

    def __init__(
        self,
        source: BlobSource,
        *,
        staging: Callable[[], Staging],
        forward: GroupedForward,
        load: Callable[[StoredBlob, torch.device], ExpertWeights] = load_weights,
        on_loaded: Callable[[int, CopyId, Loaded], None],
        on_failed: Callable[[CopyFailed], None],
        on_sticky: Callable[[BaseException], None],
    ) -> None:
        self._source = source
        self._open_staging = staging
        self._forward = forward
        self._load = load
        self._on_loaded = on_loaded
        self._on_failed = on_failed
        self._on_sticky = on_sticky
        self._changed = threading.Condition()
        self._waiting: deque[LoadCopy] = deque()
        self._cancelled: set[int] = set()
        self._current: LoadCopy | None = None
        self._is_stopping = False
        self._thread = threading.Thread(target=self._main, name="copy-loader", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, wanted: LoadCopy) -> None:
        """Queue a load."""
        with self._changed:
            self._waiting.append(wanted)
            self._changed.notify_all()

    def cancel(self, ticket: int) -> None:
        """Forget a load: not begun if it waits, let go at its next step if it is under way. Nothing is said of it any more."""
        with self._changed:
            self._waiting = deque(item for item in self._waiting if item.ticket != ticket)
            if self._current is not None and self._current.ticket == ticket:
                self._cancelled.add(ticket)

    @property
    def is_busy(self) -> bool:
        """Whether a load waits or is under way."""
        with self._changed:
            return self._current is not None or bool(self._waiting)

    def stop(self, timeout_s: float) -> bool:
        """Forget what waits and end. False when the load under way is not done at the limit."""
        with self._changed:
            self._is_stopping = True
            self._waiting.clear()
            if self._current is not None:
                self._cancelled.add(self._current.ticket)
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            self._serve()
        except Exception as error:  # noqa: BLE001  (an actor that can load nothing any more must not look alive)
            self._on_sticky(error)

    def _serve(self) -> None:
        torch.set_num_threads(1)
        staging = self._open_staging()
        while (wanted := self._next()) is not None:
            self._attend(wanted, staging)
            with self._changed:
                self._cancelled.discard(wanted.ticket)
                self._current = None
                self._changed.notify_all()

    def _next(self) -> LoadCopy | None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting) or self._is_stopping)
            if self._is_stopping:
                return None
            self._current = self._waiting.popleft()
            return self._current

    def _attend(self, wanted: LoadCopy, staging: Staging) -> None:
        try:
            with staging.scope(), torch.inference_mode():
                loaded = self._prepare(wanted, staging)
        except Exception as error:  # noqa: BLE001  (whatever a load raises is the reason that its slot reports)
            reason = _reason(error)
            kind, cause = judged(error, staging)
            if kind is ErrorKind.STICKY:
                self._on_sticky(cause)
            del cause
        else:
            if loaded is not None:
                self._on_loaded(wanted.ticket, wanted.copy, loaded)
            return
        staging.free()
        self._on_failed(CopyFailed(wanted.ticket, wanted.copy, reason))

    def _prepare(self, wanted: LoadCopy, staging: Staging) -> Loaded | None:
        blob = self._source.open(wanted.copy.version)
        is_shadow = wanted.copy.role is Role.SHADOW
        if blob.kind != ("shadow" if is_shadow else "expert"):
            message = f"{wanted.copy}: the store holds a {blob.kind} under this digest, not {'a shadow' if is_shadow else 'an expert'}"
            raise CheckpointError(message)
        if self._is_cancelled(wanted):
            return None
        weights = self._load(blob, staging.device)
        for num_rows in WARM_ROWS:
            if self._is_cancelled(wanted):
                return None
            descriptor = weights.descriptor
            x_ND = torch.zeros(num_rows, descriptor.hidden_size, dtype=TORCH_DTYPES[descriptor.dtype], device=staging.device)
            self._forward(x_ND, [weights], [num_rows])
        staging.settle()
        return blob if is_shadow else weights

    def _is_cancelled(self, wanted: LoadCopy) -> bool:
        with self._changed:
            return wanted.ticket in self._cancelled


def _reason(error: Exception) -> str:
    if isinstance(error, MoeError):
        return f"{error.reason}: {error}"
    if error_kind(error) is ErrorKind.OUT_OF_MEMORY:
        return "OUT_OF_MEMORY: the device has no room for the copy; lower actors.memory_bytes"
    return f"LOAD_FAILED: {type(error).__name__}"
