"""Calls on their way into one dispatch: batch while busy, at the router's door.

A call goes at once while few of its kind are under way. Beyond that calls wait for each other, in an open wave that departs when those before it have
their answers, when it is full, or when its patience ends, so that one actor that hangs holds nobody up for long. The work of a dispatch is paid by the
wave, not by the call, so a router that falls behind catches up by itself.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextvars import copy_context
from dataclasses import replace
from typing import NamedTuple

from cluster.core.errors import DeadlineExceeded, MoeError, NotReady, Overloaded
from cluster.telemetry.metrics import RouterMetrics
from cluster.telemetry.tracing import current_traceparent
from router_service.caller import tenant_of_call
from router_service.core.layer_call import LayerCall, LayerReply
from router_service.core.wave import Patience, Share, WaveDraft, WaveLimits

Run = Callable[[Sequence[Share], float], Awaitable[Sequence[LayerReply | MoeError]]]


def is_recorded(call: LayerCall) -> bool:
    """Whether spans are written of a call."""
    return bool(call.traceparent or current_traceparent())


class Waves:
    """Joins calls and tells each its own reply. `run(shares, deadline_s)` carries one wave; it raises only what ends every call of it."""

    def __init__(self, run: Run, limits: WaveLimits, metrics: RouterMetrics | None = None) -> None:
        self._run = run
        self._limits = limits
        self._departed: Callable[[Sequence[float]], None] = (lambda _: None) if metrics is None else metrics.wave_departed
        self._open: dict[Hashable, _Wave] = {}
        self._num_under_way: Counter[Hashable] = Counter()
        self._patience = Patience(limits)

    async def join(self, share: Share) -> LayerReply:
        """This call's reply. Raises what `run` gives or raises for it; cancelling withdraws the call, and the wave with its last one."""
        if self._limits.max_calls == 1 or share.call.hidden_states.nbytes > self._limits.max_call_bytes or is_recorded(share.call):
            self._departed((0.0,))
            return _given(await self._run([share], share.call.deadline_s))
        key = share.key(tenant_of_call.get())
        if key not in self._open and self._num_under_way[key] < self._limits.max_overlapping_calls:
            return await self._alone(key, share)
        wave = self._open.get(key)
        if wave is None or not wave.draft.take(share.call):
            if wave is not None:
                self._depart(key, wave)
            wave = self._begin(key, share.call)
        return await wave.wait_for(share)

    async def _alone(self, key: Hashable, share: Share) -> LayerReply:
        self._num_under_way[key] += 1
        self._departed((0.0,))
        begun_s = asyncio.get_running_loop().time()
        try:
            return _given(await self._run([share], share.call.deadline_s))
        finally:
            self._ended(key, 1, begun_s)

    def _begin(self, key: Hashable, call: LayerCall) -> _Wave:
        loop = asyncio.get_running_loop()
        wave = self._open[key] = _Wave(WaveDraft.around(call, self._limits, loop.time()))
        wave.draft.take(call)
        wave.timer = loop.call_later(self._patience.hold_s, self._depart, key, wave)
        return wave

    def _ended(self, key: Hashable, num_calls: int, begun_s: float) -> None:
        self._patience.learn(asyncio.get_running_loop().time() - begun_s)
        self._num_under_way[key] -= num_calls
        if self._num_under_way[key] < self._limits.max_overlapping_calls and (wave := self._open.get(key)) is not None:
            self._depart(key, wave)
        if not self._num_under_way[key]:
            del self._num_under_way[key]

    def _depart(self, key: Hashable, wave: _Wave) -> None:
        if self._open.get(key) is wave:
            del self._open[key]
        if wave.timer is not None:
            wave.timer.cancel()
        if not wave.members or wave.task is not None:
            return
        loop, num_calls = asyncio.get_running_loop(), len(wave.members)
        begun_s = loop.time()
        self._num_under_way[key] += num_calls
        self._departed([begun_s - member.came_s for member in wave.members.values()])
        wave.task = loop.create_task(self._carry(wave), name="wave", context=wave.context)
        # Not in the task itself: one that is cancelled before its first step runs nothing.
        wave.task.add_done_callback(lambda _: self._ended(key, num_calls, begun_s))

    async def _carry(self, wave: _Wave) -> None:
        members = tuple(wave.members.items())
        shares = [member.share for _, member in members]
        outcomes: Sequence[LayerReply | Exception]
        try:
            outcomes = await self._run(shares, wave.draft.latest_s)
        except (Overloaded, DeadlineExceeded, NotReady) as error:  # of the router's state: it is the same for all
            outcomes = [error] * len(shares)
        except MoeError as error:
            outcomes = [error] if len(shares) == 1 else await asyncio.gather(*map(self._again, shares))
        except Exception as error:  # noqa: BLE001  (whoever waits must hear of it)
            outcomes = [error] * len(shares)
        for (future, _), outcome in zip(members, outcomes, strict=True):
            if isinstance(outcome, Exception):
                _fail(future, outcome)
            elif not future.done():
                future.set_result(outcome)

    async def _again(self, share: Share) -> LayerReply | Exception:
        """One call's rows must never fail another's: what ended the wave ends, by itself, only the call that it belongs to."""
        try:
            (outcome,) = await self._run([replace(share, is_again=True)], share.call.deadline_s)
        except Exception as error:  # noqa: BLE001  (else nobody of the wave would hear of anything)
            return error
        return outcome


class _Member(NamedTuple):
    share: Share
    came_s: float


class _Wave:
    """The calls of one wave, and who waits for them."""

    def __init__(self, draft: WaveDraft) -> None:
        self.draft = draft
        self.members: dict[asyncio.Future[LayerReply], _Member] = {}
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.context = copy_context()  # its tenant's

    async def wait_for(self, share: Share) -> LayerReply:
        """Be one of them until the reply."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[LayerReply] = loop.create_future()
        self.members[future] = _Member(share, loop.time())
        try:
            return await future
        finally:
            del self.members[future]
            if not self.members and self.task is not None:
                self.task.cancel()


def _given(outcomes: Sequence[LayerReply | MoeError]) -> LayerReply:
    (outcome,) = outcomes
    if isinstance(outcome, MoeError):
        raise outcome
    return outcome


def _fail(future: asyncio.Future[LayerReply], error: Exception) -> None:
    """Each caller gets an exception of its own: a traceback belongs to one task."""
    if not future.done():
        own = type(error).__new__(type(error), *error.args)
        own.__dict__.update(error.__dict__)
        own.__cause__ = error.__cause__
        future.set_exception(own)
