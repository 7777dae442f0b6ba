"""Where shadows in use lie expanded: a bounded workspace of one actor, filled by a thread of its own.

A shadow in a slot stays packed. The first frame that asks for it waits for its expansion, some milliseconds; frames that ask for nothing packed go on.
Whoever was asked for, or warmed, is needed until somebody says that its replica is back, or until nobody has asked for long. What is needed or used by
a frame under way makes room for nobody: then there is none, and rows are answered by the packed shadow as it is, expanded for them alone. Of the others
the least recently used makes room; one whose replica is back goes by itself a little later.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from actors.blob_files import StoredBlob
from actors.device import ErrorKind
from actors.expert_layouts import ExpertWeights
from actors.staging import Staging, judged
from cluster.core.ids import CopyId

Expanded = Mapping[CopyId, ExpertWeights | StoredBlob]
"""Weights of shadows that are expanded; for which there is no room, the shadow as it is packed."""
Result = TypeVar("Result")
LINGER_S = 5.0
"""An expansion whose replica is back is kept for so long, unless its room is needed: who was suspected may soon be so again."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Request:
    copies: tuple[CopyId, ...]
    ready: Callable[[Expanded], None]
    is_hint: bool = False


class ShadowWorkspace:
    """`hold` packed shadows; `take` some expanded, and `give_back` what was taken. Callable from any thread."""

    def __init__(
        self,
        *,
        max_experts: int,
        max_waiting: int,
        idle_s: float,
        clock: Callable[[], float],
        staging: Callable[[], Staging],
        expand: Callable[[StoredBlob, torch.device], ExpertWeights],
        complete: Callable[[ExpertWeights], None] = lambda _weights: None,
        on_sticky: Callable[[BaseException], None],
    ) -> None:
        """`complete` is called for what was expanded once those who waited for it have it: what they need not wait for.

        What nobody has asked for in `idle_s` makes room for others.
        """
        self._max_experts = max_experts
        self._max_waiting = max_waiting
        self._idle_s = idle_s
        self._clock = clock
        self._open_staging = staging
        self._expand = expand
        self._complete = complete
        self._on_sticky = on_sticky
        self._changed = threading.Condition()
        self._packed: dict[CopyId, StoredBlob] = {}
        self._expanded: OrderedDict[CopyId, ExpertWeights] = OrderedDict()
        self._asked_s: dict[CopyId, float] = {}
        self._back_s: dict[CopyId, float] = {}
        self._num_unexpanded = 0
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
            self._asked_s.pop(copy, None)
            self._back_s.pop(copy, None)
            self._hinted.pop(copy, None)

    def take(self, copies: Sequence[CopyId], ready: Callable[[Expanded], None]) -> bool:
        """Call `ready` once these held shadows are expanded: now when they are, else from the workspace's thread.

        One for which there is no room is given as it is packed; one that cannot be expanded is left out. Give back the same copies, each as often as it
        is mentioned. False, and nothing is taken, when too many wait already or the end is near.
        """
        with self._changed:
            self._need(copies)
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
            if copy not in self._packed or self._is_stopping:
                return False
            if copy in self._expanded:
                self._need((copy,))
            if copy in self._expanded or copy in self._hinted or len(self._hinted) >= self._max_experts:
                return False
            self._hinted[copy] = None
            self._changed.notify_all()
            return True

    def cool(self, copy: CopyId) -> None:
        """The replica of this shadow is back: its room may be used for others, and is free a little later unless rows come again."""
        with self._changed:
            self._hinted.pop(copy, None)
            if copy in self._expanded:
                self._back_s.setdefault(copy, self._clock())

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
    def num_unexpanded(self) -> int:
        """How many times rows were answered by a shadow for which there was no room."""
        with self._changed:
            return self._num_unexpanded

    @property
    def expanded_bytes(self) -> int:
        """Bytes of all that is expanded now, without what has outstayed its need."""
        with self._changed:
            self._trim()
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
            made, packed = self._provide_all(request.copies, staging)
            with self._changed:
                found = {**self._found(request.copies), **packed}
                self._num_unexpanded += 0 if request.is_hint else len(packed)
                self._is_expanding = False
            try:
                request.ready(found)
            except Exception:
                # A link that is gone must not take the other links' shadows with it; the router sees the loss itself.
                logger.exception("expanded shadows could not be handed on")
            while made:
                self._attempt(partial(self._complete, made.pop()), staging)
            del found, request  # nothing here may keep weights that were thrown out

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
            self._need((copy,))
            self._in_use[copy] += 1
            return _Request((copy,), lambda _found: self.give_back([copy]), is_hint=True)

    def _provide_all(self, copies: Sequence[CopyId], staging: Staging) -> tuple[list[ExpertWeights], dict[CopyId, StoredBlob]]:
        """Expand those that are not; what was expanded now, and those for which there was no room."""
        made: list[ExpertWeights] = []
        unexpanded: dict[CopyId, StoredBlob] = {}
        for copy in dict.fromkeys(copies):
            provided = self._provide(copy, staging)
            if isinstance(provided, ExpertWeights):
                made.append(provided)
            elif provided is not None:
                unexpanded[copy] = provided
        return made, unexpanded

    def _provide(self, copy: CopyId, staging: Staging) -> ExpertWeights | StoredBlob | None:
        """Expand a shadow that is not expanded; as it is packed when there is no room for it, None when nothing was done."""
        with self._changed:
            packed = self._packed.get(copy)
            if copy in self._expanded or packed is None:
                return None
            if not self._make_room():
                return packed
        weights = self._attempt(partial(self._expand, packed, staging.device), staging)
        with self._changed:
            # A hint takes no lease: the slot may have been freed meanwhile.
            if weights is not None and self._packed.get(copy) is packed:
                self._expanded[copy] = weights
                return weights
        return None

    def _attempt(self, work: Callable[[], Result], staging: Staging) -> Result | None:
        try:
            with staging.scope(), torch.inference_mode():
                result = work()
                staging.settle()
        except Exception as error:  # noqa: BLE001  (whatever an expansion raises, its shadow does not answer; other copies do)
            kind, cause = judged(error, staging)
            if kind is ErrorKind.STICKY:
                self._on_sticky(cause)
            del cause
        else:
            return result
        # The error is gone from here on, and with it the tensors that its traceback held.
        staging.free()
        return None

    def _found(self, copies: Sequence[CopyId]) -> dict[CopyId, ExpertWeights | StoredBlob]:
        found: dict[CopyId, ExpertWeights | StoredBlob] = {copy: self._expanded[copy] for copy in copies if copy in self._expanded}
        for copy in found:
            self._expanded.move_to_end(copy)
        return found

    def _need(self, copies: Sequence[CopyId]) -> None:
        now_s = self._clock()
        for copy in copies:
            if copy in self._packed:
                self._asked_s[copy] = now_s
                self._back_s.pop(copy, None)

    def _make_room(self) -> bool:
        """Let the least recently used go that nobody uses or needs, if there must be room for one more. False when there is none."""
        if len(self._expanded) < self._max_experts:
            return True
        idle_s = self._clock() - self._idle_s
        goes = next((copy for copy in self._expanded if copy not in self._in_use and not self._is_needed(copy, idle_s)), None)
        if goes is None:
            return False
        del self._expanded[goes]
        return True

    def _is_needed(self, copy: CopyId, idle_s: float) -> bool:
        """Whether somebody has asked since then, and nobody has said that its replica is back."""
        return copy not in self._back_s and self._asked_s.get(copy, -math.inf) > idle_s

    def _trim(self) -> None:
        """Let go of what is not needed any more because its replica is back, and has been so for a while."""
        past_s = self._clock() - LINGER_S
        for copy in [copy for copy in self._expanded if copy not in self._in_use and self._back_s.get(copy, math.inf) <= past_s]:
            del self._expanded[copy]
