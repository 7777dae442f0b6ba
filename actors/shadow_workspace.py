"""Where shadows in use lie expanded: a bounded workspace of one actor, filled by a thread of its own, least recently used out first.

A shadow in a slot stays packed. The first frame that asks for it waits for its expansion, some milliseconds; frames that ask for nothing packed go on.
What frames under way use is never thrown out, so many at once can exceed the bound for as long as they take; what is reported counts them.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from actors.blob_files import StoredBlob
from actors.device import ErrorKind, error_kind
from actors.expert_layouts import ExpertWeights
from actors.staging import Staging
from cluster.core.ids import CopyId

Expanded = Mapping[CopyId, ExpertWeights]
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Request:
    copies: tuple[CopyId, ...]
    ready: Callable[[Expanded], None]


class ShadowWorkspace:
    """`hold` packed shadows; `take` some expanded, and `give_back` what was taken. Callable from any thread."""

    def __init__(
        self,
        *,
        max_experts: int,
        max_waiting: int,
        staging: Callable[[], Staging],
        expand: Callable[[StoredBlob, torch.device], ExpertWeights],
        complete: Callable[[ExpertWeights], None] = lambda _weights: None,
        on_sticky: Callable[[BaseException], None],
    ) -> None:
        """`complete` is called for what was expanded once those who waited for it have it: what they need not wait for."""
        self._max_experts = max_experts
        self._max_waiting = max_waiting
        self._open_staging = staging
        self._expand = expand
        self._complete = complete
        self._on_sticky = on_sticky
        self._changed = threading.Condition()
        self._packed: dict[CopyId, StoredBlob] = {}
        self._expanded: OrderedDict[CopyId, ExpertWeights] = OrderedDict()
        self._in_use: Counter[CopyId] = Counter()
        self._waiting: deque[_Request] = deque()
        self._hinted: OrderedDict[CopyId, None] = OrderedDict()
        self._is_expanding = False
        self._is_stopping = False
        self._thread = threading.Thread(target=self._main, name="shadow-workspace", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def hold(self, copy: CopyId, packed: StoredBlob) -> None:
        """A slot holds this shadow from now on."""
        with self._changed:
            self._packed[copy] = packed

    def drop(self, copy: CopyId) -> None:
        """Its slot is free; nothing of it is under way."""
        with self._changed:
            del self._packed[copy]
            self._expanded.pop(copy, None)
            self._hinted.pop(copy, None)

    def take(self, copies: Sequence[CopyId], ready: Callable[[Expanded], None]) -> bool:
        """Call `ready` once these held shadows are expanded: now when they are, else from the workspace's thread. One that cannot be is left out.

        Give back the same copies, each as often as it is mentioned. False, and nothing is taken, when too many wait already or the end is near.
        """
        with self._changed:
            if not all(copy in self._expanded for copy in copies):
                if self._is_stopping or len(self._waiting) >= self._max_waiting:
                    return False
                self._in_use.update(copies)
                self._waiting.append(_Request(tuple(copies), ready))
                self._changed.notify_all()
                return True
            self._in_use.update(copies)
            found = self._found(copies)
        ready(found)
        return True

    def warm(self, copy: CopyId) -> bool:
        """Expand a shadow that is likely to be asked for soon, when nobody waits. False, and nothing is done, for one that is not held packed here.

        At most as many hints wait as the workspace has room for: more would only throw each other out.
        """
        with self._changed:
            is_wanted = copy in self._packed and copy not in self._expanded and copy not in self._hinted
            if not is_wanted or self._is_stopping or len(self._hinted) >= self._max_experts:
                return False
            self._hinted[copy] = None
            self._changed.notify_all()
            return True

    def discard(self, weights: ExpertWeights) -> None:
        """Forget these expanded weights, which came out wrong: they are expanded again when they are next asked for."""
        with self._changed:
            for copy in [copy for copy, expanded in self._expanded.items() if expanded is weights]:
                del self._expanded[copy]

    def give_back(self, copies: Sequence[CopyId]) -> None:
        """What was taken is not used any more."""
        if not copies:
            return
        with self._changed:
            self._in_use.subtract(copies)
            self._in_use = +self._in_use
            self._trim()

    @property
    def expanded_bytes(self) -> int:
        """Bytes of all that is expanded now."""
        with self._changed:
            return sum(weights.num_bytes for weights in self._expanded.values())

    @property
    def is_busy(self) -> bool:
        """Whether an expansion waits or is under way."""
        with self._changed:
            return self._is_expanding or bool(self._waiting) or bool(self._hinted)

    def stop(self, timeout_s: float) -> bool:
        """Take no more, serve who waits, end. False when the thread is still busy at the limit."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            self._serve()
        except Exception as error:  # noqa: BLE001  (an actor that can expand nothing any more must not look alive)
            self._on_sticky(error)

    def _serve(self) -> None:
        torch.set_num_threads(1)
        staging = self._open_staging()
        while (request := self._next()) is not None:
            made = [self._provide(copy, staging) for copy in dict.fromkeys(request.copies)]
            with self._changed:
                found = self._found(request.copies)
                self._is_expanding = False
            try:
                request.ready(found)
            except Exception:
                # A link that is gone must not take the other links' shadows with it; the router sees the loss itself.
                logger.exception("expanded shadows could not be handed on")
            for weights in made:
                if weights is not None:
                    self._attempt(partial(self._complete, weights), staging)
            del made, found, request, weights  # nothing here may keep weights that were thrown out

    def _next(self) -> _Request | None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting) or bool(self._hinted) or self._is_stopping)
            if self._waiting:
                self._is_expanding = True
                return self._waiting.popleft()
            if self._is_stopping:
                return None
            self._is_expanding = True
            copy, _ = self._hinted.popitem(last=False)
            self._in_use[copy] += 1
            return _Request((copy,), lambda _found: self.give_back([copy]))

    def _provide(self, copy: CopyId, staging: Staging) -> ExpertWeights | None:
        """Expand a shadow that is not expanded; None when nothing was done."""
        with self._changed:
            packed = self._packed.get(copy)
            if copy in self._expanded or packed is None:
                return None
        weights = self._attempt(partial(self._expand, packed, staging.device), staging)
        with self._changed:
            # A hint takes no lease: the slot may have been freed meanwhile.
            if weights is not None and self._packed.get(copy) is packed:
                self._expanded[copy] = weights
                self._trim()
                return weights
        return None

    def _attempt(self, work: Callable[[], Result], staging: Staging) -> Result | None:
        try:
            with staging.scope(), torch.inference_mode():
                result = work()
                staging.settle()
        except Exception as error:  # noqa: BLE001  (whatever an expansion raises, its shadow does not answer; other copies do)
            if error_kind(error) is ErrorKind.STICKY:
                self._on_sticky(error)
            staging.free()
            return None
        return result

    def _found(self, copies: Sequence[CopyId]) -> Expanded:
        found = {copy: self._expanded[copy] for copy in copies if copy in self._expanded}
        for copy in found:
            self._expanded.move_to_end(copy)
        return found

    def _trim(self) -> None:
        idle = [copy for copy in self._expanded if copy not in self._in_use]
        for copy in idle[: max(0, len(self._expanded) - self._max_experts)]:
            del self._expanded[copy]
