"""Carries out one repetition: feeds the run machine with what happens, does what it says, and undoes every fault on every way out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal

from chaos.core.experiment import Probe
from chaos.core.measures import affected, control, latencies_ms, measure
from chaos.core.observations import Observations, Strike
from chaos.core.report import ActionRecord, Judged, Record
from chaos.core.run_machine import (
    Checked,
    Ending,
    Event,
    Finish,
    GuardTripped,
    Inject,
    Injected,
    InjectFailed,
    Interrupted,
    Planned,
    ProbeSteadyState,
    Recover,
    Recovered,
    RecoverFailed,
    RollBack,
    RollbackMissed,
    RollbackSeen,
    RunMachine,
    SteadyStateProbed,
    Step,
    TimePassed,
    WakeAt,
)
from chaos.faults.table import fault_of
from chaos.plan import Choice, choose, dice
from chaos.port import Injection, Order
from chaos.probes.table import PROBES
from chaos.scenario_files import ScenarioFile
from chaos.session import Session
from cluster.core.errors import MoeError

SETTLE_S = 0.5
SETTLE_TRIES = 3
MODES = {"before": {"sot", "edge", "continuous"}, "after": {"eot", "edge", "continuous"}}
GUARD_S = 0.5
QUICK_S = 1.5
FIRST_ASK_S = 0.35
HEAL_LIMIT_S = 60.0


class Repetition:
    """One repetition of a scenario within a session. `run` is its one way in; `interrupt` may be called from a signal handler."""

    def __init__(self, file: ScenarioFile, session: Session, number: int, seed: int) -> None:
        self._file, self._scenario, self._session = file, file.scenario, session
        self._number, self._seed = number, seed
        self._rng = dice(file, seed, number)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._orders: list[Order] = []
        self._injections: dict[int, Injection] = {}
        self._records: list[ActionRecord] = []
        self._rollbacks: list[Judged] = []
        self._steady: dict[str, list[Judged]] = {"before": [], "after": []}
        self._machine: RunMachine | None = None
        self._control_s = self._begun_s = self._end_s = 0.0
        self._whole_again_s: float | None = None
        self._facts: dict[str, float] = {}

    def interrupt(self, reason: str) -> None:
        """End as soon as everything is healed."""
        self._events.put_nowait(Interrupted(reason))

    async def run(self) -> Record:
        """Carry it out; returns what is to be recorded. Whatever happens, no fault is left behind."""
        started, begin_s = datetime.now(UTC).isoformat(timespec="milliseconds"), time.monotonic()
        try:
            finish = await self._drive()
        finally:
            await self._heal()
        return await self._record(started, begin_s, finish)

    async def _drive(self) -> Finish:
        problems = await self._plan()
        method = [Planned(action.name, action.at, order.seconds) for action, order in zip(self._scenario.method, self._orders, strict=False)]
        machine = self._machine = RunMachine(method, self._scenario.observe_s, len(self._scenario.rollbacks))
        self._events.put_nowait(Checked(tuple(problems)))
        wake_s: float | None = None
        guard = asyncio.create_task(self._guard())
        try:
            while True:
                event = await self._next_event(wake_s)
                for step in (steps := machine.step(event, time.monotonic())):
                    if isinstance(step, Finish):
                        return step
                    self._do(step)
                wake_s = next((step.at_s for step in steps if isinstance(step, WakeAt)), None)
        finally:
            guard.cancel()

    async def _plan(self) -> list[str]:
        """Choose targets and draw numbers; what speaks against the method, for people."""
        session = self._session
        try:
            inventory = await asyncio.to_thread(session.target.inventory)
            choices = choose(self._file, inventory, model=session.model.name, rng=self._rng, number=self._number)
        except MoeError as error:
            return [str(error)]
        for choice in choices:
            self._orders.append(self._order(choice))
            arguments = choice.settings.model_dump(exclude_none=True) | ({} if choice.seconds is None else {"seconds": round(choice.seconds, 3)})
            self._records.append(ActionRecord(name=choice.action.name, fault=choice.action.fault, target=choice.target.name, arguments=arguments))
        return []

    def _order(self, choice: Choice) -> Order:
        return Order(
            cluster=self._session.target,
            target=choice.target,
            settings=choice.settings,
            model=self._session.model.name,
            layer=self._session.layer.layer,
            rng=self._rng,
            clock=time.monotonic,
            pause=asyncio.sleep,
            seconds=choice.seconds,
            recover_limit_s=self._scenario.recover_s,
        )

    async def _next_event(self, wake_s: float | None) -> Event:
        limit_s = None if wake_s is None or wake_s == float("inf") else max(0.0, wake_s - time.monotonic())
        try:
            return await asyncio.wait_for(self._events.get(), limit_s)
        except TimeoutError:
            return TimePassed()

    def _do(self, step: Step) -> None:
        match step:
            case ProbeSteadyState():
                self._spawn(self._probe(step.when))
            case Inject():
                self._spawn(self._inject(step.action), partial(InjectFailed, step.action))
            case Recover():
                self._spawn(self._recover(step.action), partial(RecoverFailed, step.action))
            case RollBack():
                self._spawn(self._roll_back(step.rollback), partial(RollbackMissed, step.rollback))

    def _spawn(self, work: Coroutine[Any, Any, None], failed: Callable[[str], Event] | None = None) -> None:
        """Begin it. An error of our own ends the run; the machine is told by `failed` as well, or it would wait for this step for ever."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(lambda _: self._done(task, failed))

    def _done(self, task: asyncio.Task[None], failed: Callable[[str], Event] | None) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            reason = f"{type(error).__name__}: {error}"
            self._events.put_nowait(Interrupted(reason))
            if failed is not None:
                self._events.put_nowait(failed(reason))

    async def _probe(self, when: Literal["before", "after"]) -> None:
        """Wait until the cluster is whole, let the load run for a moment, measure. Afterwards a few moments: a busy machine may disturb the first."""
        scenario, session = self._scenario, self._session
        lack = await session.wait_until_whole(scenario.recover_s)
        if when == "after" and not lack:
            self._whole_again_s = time.monotonic() - self._fault_s()
        begin_s = time.monotonic()
        if when == "before":
            self._control_s = begin_s
            session.count_from_here()
            waited_s = session.wait_s()
        judged = await self._measured(when, scenario.control_s if when == "before" else SETTLE_S)
        for _ in range(0 if when == "before" or lack else SETTLE_TRIES - 1):
            if all(found.ok for found in judged):
                break
            judged = await self._measured(when, SETTLE_S)
        self._end_s = time.monotonic()
        if when == "before":
            self._facts["control_sched_wait_ms"] = 1e3 * (session.wait_s() - waited_s) / (self._end_s - begin_s)
            self._begun_s = self._end_s
        if lack:
            judged.append(Judged(name="whole", value=lack, tolerance="whole", ok=False, reason=lack))
        self._steady[when] = judged
        self._events.put_nowait(SteadyStateProbed(when, tuple(found.verdict for found in judged)))

    async def _measured(self, when: Literal["before", "after"], window_s: float) -> list[Judged]:
        begin_s = time.monotonic()
        await asyncio.sleep(window_s)
        end_s = time.monotonic()
        counts = await asyncio.to_thread(self._session.counts, ())
        seen = await self._session.observed(control_s=begin_s, begun_s=end_s, end_s=end_s, affected_s=self._scenario.affected_s, counts=counts)
        return self._judged(self._scenario.steady_state.probes, seen, MODES[when])

    def _judged(self, probes: Sequence[Probe], seen: Observations, modes: set[str]) -> list[Judged]:
        return [Judged.of(probe.name, PROBES[probe.name](seen), probe.tolerance) for probe in probes if probe.mode in modes]

    async def _inject(self, number: int) -> None:
        order, action, record = self._orders[number], self._scenario.method[number], self._records[number]
        injection = self._injections[number] = Injection(order.target, [])
        record.phase_before = str(self._machine.phase) if self._machine else ""
        self._session.watcher.quicken(time.monotonic() + QUICK_S)
        waited_s = self._session.wait_s()
        try:
            await fault_of(action).inject(order, injection)
        except (MoeError, OSError) as error:
            record.problem = str(error)
            self._events.put_nowait(InjectFailed(number, str(error)))
            return
        at_s = injection.strikes[0].at_s
        record.injected_s, record.details = at_s - self._begun_s, dict(injection.strikes[0].details)
        self._events.put_nowait(Injected(number, at_s))
        # The router keeps only the last time of each kind of loss: it is asked early, before a second one, and once more.
        known = []
        for wait_s in (min(FIRST_ASK_S, self._scenario.affected_s), self._scenario.affected_s):
            await asyncio.sleep(max(0.0, at_s + wait_s - time.monotonic()))
            known.append(await asyncio.to_thread(self._session.distrust_s, self._fault_s()))
        if (more_s := self._session.wait_s() - waited_s) >= 0.0:  # else it was the router that was killed
            self._facts.setdefault("sched_wait_ms", 1e3 * more_s / max(0.1, time.monotonic() - at_s))
        if found := [known_s for known_s in known if known_s is not None]:
            self._facts.setdefault("router_detected_ms", 1e3 * (min(found) - self._fault_s()))

    async def _recover(self, number: int) -> None:
        record, injection = self._records[number], self._injections[number]
        try:
            await fault_of(self._scenario.method[number]).recover(self._orders[number], injection)
        except (MoeError, OSError) as error:
            record.problem = str(error)
            self._events.put_nowait(RecoverFailed(number, str(error)))
            return
        finally:
            # What proves that the fault struck is known only when it is over.
            for strike in injection.strikes[:1]:
                record.details |= strike.details
        record.recovered_s = time.monotonic() - self._begun_s
        record.phase_after = str(self._machine.phase) if self._machine else ""
        self._events.put_nowait(Recovered(number))

    async def _roll_back(self, number: int) -> None:
        """Measure again and again, each time over a short window of its own, until it is as wanted or its time is up."""
        wanted, session = self._scenario.rollbacks[number], self._session
        deadline_s = time.monotonic() + wanted.within_s
        while True:
            begin_s = time.monotonic()
            await asyncio.sleep(GUARD_S)
            now_s, counts = time.monotonic(), await asyncio.to_thread(session.counts, ())
            seen = await session.observed(control_s=begin_s, begun_s=now_s, end_s=now_s, affected_s=GUARD_S, strikes=self._strikes(), counts=counts)
            found = Judged.of(wanted.name, PROBES[wanted.name](seen), wanted.tolerance)
            if found.ok or now_s > deadline_s:
                break
        self._rollbacks.append(found)
        self._events.put_nowait(RollbackSeen(number) if found.ok else RollbackMissed(number, f"not within {wanted.within_s:g} s: {found.reason}"))

    async def _guard(self) -> None:
        """Watch the continuous probes while faults are active; the first that is out of tolerance ends the repetition."""
        probes = [probe for probe in self._scenario.steady_state.probes if probe.mode == "continuous"]
        while probes:
            await asyncio.sleep(GUARD_S)
            if self._machine is None or not self._machine.active:
                continue
            now_s = time.monotonic()
            seen = await self._session.observed(control_s=now_s - 2 * GUARD_S, begun_s=now_s, end_s=now_s, affected_s=GUARD_S)
            broken = [found for found in self._judged(probes, seen, {"continuous"}) if not found.ok and found.value is not None]
            if broken:
                self._events.put_nowait(GuardTripped(f"guard: {broken[0].reason}"))
                return

    async def _heal(self) -> None:
        """Undo whatever is still there, when the machine did not end in order."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        left = self._machine.active if self._machine is not None else []
        for number in reversed(left):
            if number in self._injections:
                with contextlib.suppress(MoeError, OSError, TimeoutError):
                    async with asyncio.timeout(HEAL_LIMIT_S):
                        await fault_of(self._scenario.method[number]).recover(self._orders[number], self._injections[number])

    def _strikes(self) -> list[Strike]:
        return [strike for _, injection in sorted(self._injections.items()) for strike in injection.strikes]

    def _fault_s(self) -> float:
        return min((strike.at_s for strike in self._strikes()), default=self._begun_s)

    async def _record(self, started: str, begin_s: float, finish: Finish) -> Record:
        session, scenario = self._session, self._scenario
        metrics: dict[str, float | None] = {}
        odd: dict[str, str] = {}
        struck: list[float] = []
        quiet: list[float] = []
        if finish.ending in {Ending.PASSED, Ending.DEVIATED}:
            counts = await asyncio.to_thread(session.counts, session.load.requests(self._control_s))
            seen = await session.observed(
                control_s=self._control_s,
                begun_s=self._begun_s,
                end_s=self._end_s,
                strikes=self._strikes(),
                affected_s=scenario.affected_s,
                counts=counts | self._facts,
                whole_again_s=self._whole_again_s,
            )
            metrics = measure(seen)
            odd = {name: session.checker.reasons[name] for name in sorted(seen.wrong_answers | seen.unchecked_answers)}
            struck, quiet = ([round(value, 2) for value in latencies_ms(found)] for found in (affected(seen), control(seen)))
        return Record(
            scenario=self._file.name,
            digest=self._file.digest,
            seed=self._seed,
            repetition=self._number,
            started=started,
            duration_s=round(time.monotonic() - begin_s, 3),
            ending=finish.ending.name,
            reason=finish.reason + (f"; the cluster was not whole: {session.lack}" if finish.ending is Ending.INTERRUPTED and session.lack else ""),
            deployment=session.target.name,
            fidelity=scenario.load.fidelity,
            tokens=scenario.load.tokens,
            rate=round(session.rate, 1),
            actions=self._records,
            rollbacks=self._rollbacks,
            steady_states=self._steady,
            metrics={name: None if value is None else round(value, 4) for name, value in metrics.items()},
            affected_ms=struck,
            control_ms=quiet,
            odd=odd,
            machine={"cores": os.cpu_count(), "platform": f"{platform.system()} {platform.machine()}", "peak_rate": round(session.peak, 1)},
        )
