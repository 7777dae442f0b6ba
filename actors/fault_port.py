"""Plays faults in an actor whose spec allows chaos: holds and slows the compute thread, makes forwards raise, flips bits, keeps replies back.

Which fault strikes when is decided in `actors.core.faults`. Weights are changed in a private copy of one replica in this process; the mapped store is never
written. Every fault ends by itself, by a thread that runs only while there is one. Without chaos in the spec nothing of this exists in the actor.
"""

from __future__ import annotations

import hmac
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.compute_thread import Reply
from actors.core.faults import (
    ActiveFaults,
    Balloon,
    DropReplies,
    Exit,
    Fault,
    FlipWeights,
    FrameOrder,
    NanWeights,
    name_of,
    parse_fault,
)
from actors.core.frames import Buffers, refuse_segments
from actors.expert_layouts import ExpertWeights
from actors.frame_forward import FrameRunner
from actors.hindered_forward import HinderedRunner
from actors.spoilt_weights import Replicas, SpoiltWeights
from cluster.core import link_frames
from cluster.core.errors import MoeError, Unauthenticated
from cluster.core.ids import Incarnation
from cluster.core.link_frames import FaultReply, Forward, Result, SegmentStatus

Submit = Callable[[Forward, memoryview, Reply], None]
_KEEPER_WAIT_S = 1.0
_EXIT_DELAY_S = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class _HeldReply:
    """A reply on its way out; `due_s` is None when it waits to be healed."""

    due_s: float | None
    send: Callable[[], None]


class FaultPort:
    """The faults of one actor. `hinder` its compute, `hinder_submit` its front, `attach` its replicas, then `answer` fault frames from any thread."""

    def __init__(
        self,
        incarnation: Incarnation,
        token: bytes,
        *,
        clock: Callable[[], float] = time.monotonic,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self._incarnation = incarnation
        self._token = token
        self._clock = clock
        self._leave = leave
        self._commands = threading.Lock()
        self._changed = threading.Condition()
        self._faults = ActiveFaults()
        self._held: list[_HeldReply] = []
        self._weights = SpoiltWeights()
        self._balloon: NDArray[np.uint8] | None = None
        self._keeper: threading.Thread | None = None

    def attach(self, replicas: Replicas) -> None:
        """Whose weights may be spoilt."""
        self._weights.attach(replicas)

    def answer(self, frame: link_frames.Fault) -> FaultReply:
        """Do what a fault frame asks. Slow for large balloons and weights: not for an event loop."""
        try:
            if not hmac.compare_digest(frame.token, self._token):
                message = f"the fault token is not that of {self._incarnation}; derive it from this deployment's link secret and this generation"
                raise Unauthenticated(message)
            with self._commands:
                message = self._obey(frame.name, frame.settings)
            return FaultReply(ok=True, message=message)
        except MoeError as error:
            return FaultReply(ok=False, message=f"{error.reason}: {error}"[:1024])
        except MemoryError:
            return FaultReply(ok=False, message="balloon: bytes: there is not so much memory; ask for less")

    def heal(self) -> None:
        """Undo everything, now."""
        with self._commands:
            self._heal()

    def _heal(self) -> None:
        with self._changed:
            ended, held = self._faults.heal(), [*self._held]
            self._held.clear()
            self._changed.notify_all()
        self._undo(ended)
        for reply in held:
            reply.send()

    def hinder(self, runner: FrameRunner) -> FrameRunner:
        """A compute that suffers these faults."""
        return HinderedRunner(self, runner)

    def hinder_submit(self, submit: Submit) -> Submit:
        """A front that refuses frames and keeps replies back."""

        def hindered(frame: Forward, body: memoryview, reply: Reply) -> None:
            with self._changed:
                refuses = self._faults.refuses(self._clock())
            if refuses:
                message = "refused: the fault refuse_all is active here"
                reply(refuse_segments(frame, self._incarnation, SegmentStatus.OVERLOADED, message), ())
            else:
                submit(frame, body, lambda result, buffers: self._send(reply, result, buffers))

        return hindered

    def on_frame(self, weights: Mapping[int, ExpertWeights]) -> FrameOrder:
        """The compute thread's next frame has its turn."""
        with self._changed:
            self._faults.struck.update(self._weights.used_by(weights.values()))
            return self._faults.on_frame(self._clock())

    def hold_while_stuck(self) -> None:
        """Keep the calling thread until it is healed or its time is over."""
        with self._changed:
            while self._faults.is_stuck(self._clock()):
                self._changed.wait(_KEEPER_WAIT_S)

    def delay(self, seconds: float) -> None:
        """Keep the calling thread, less when everything is healed."""
        until_s = self._clock() + seconds
        with self._changed:
            while (left_s := until_s - self._clock()) > 0 and self._faults.next_expiry_s() is not None:
                self._changed.wait(min(left_s, _KEEPER_WAIT_S))

    def note_flip(self) -> None:
        """A bit of an output was flipped."""
        with self._changed:
            self._faults.struck["flip_outputs"] += 1

    def _obey(self, name: str, settings: str) -> str:
        match name:
            case "heal":
                self._heal()
                return "healed"
            case "state":
                with self._changed:
                    return json.dumps(self._faults.state(self._clock()))
        return self._inject(parse_fault(name, settings))

    def _inject(self, fault: Fault) -> str:
        done = f"{name_of(fault)} is active"
        match fault:
            case NanWeights() | FlipWeights():
                done = f"{name_of(fault)} is active in {self._weights.spoil(fault).expert}"
            case Balloon():
                self._balloon = np.full(fault.num_bytes, 1, np.uint8)
            case Exit():
                timer = threading.Timer(_EXIT_DELAY_S, self._leave, (fault.code,))
                timer.daemon = True
                timer.start()
        with self._changed:
            self._faults.add(fault, self._clock())
            if isinstance(fault, Balloon | Exit):
                self._faults.struck[name_of(fault)] += 1
            if self._keeper is None:
                self._keeper = threading.Thread(target=self._keep, name="fault-keeper", daemon=True)
                self._keeper.start()
            self._changed.notify_all()
        return done

    def _undo(self, ended: tuple[Fault, ...]) -> None:
        for fault in ended:
            self._weights.restore(name_of(fault))
            if isinstance(fault, Balloon):
                self._balloon = None

    def _send(self, reply: Reply, result: Result, buffers: Buffers) -> None:
        with self._changed:
            now_s = self._clock()
            due_s = self._faults.on_reply(now_s)
            if due_s is None or due_s > now_s:
                self._held.append(_HeldReply(due_s, lambda: reply(result, buffers)))
                self._changed.notify_all()
                return
        reply(result, buffers)

    def _keep(self) -> None:
        """End faults and let replies go when their time has come; ends itself when there is nothing left to do."""
        while True:
            with self._changed:
                now_s = self._clock()
                ended = self._faults.expire(now_s)
                drops_end = any(isinstance(fault, DropReplies) for fault in ended)
                due = [item for item in self._held if (drops_end if item.due_s is None else item.due_s <= now_s)]
                self._held = [item for item in self._held if item not in due]
                if not ended and not due:
                    moments = [item.due_s for item in self._held if item.due_s is not None]
                    expiry_s = self._faults.next_expiry_s()
                    moments += [] if expiry_s is None else [expiry_s]
                    if not moments:
                        self._keeper = None
                        return
                    self._changed.wait(min(_KEEPER_WAIT_S, max(0.0, min(moments) - now_s)))
                    continue
                self._changed.notify_all()
            if ended:
                with self._commands:
                    self._undo(ended)
            for item in due:
                item.send()
