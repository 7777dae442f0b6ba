"""`python -m chaos.load SETTINGS`: the load, in a process of its own. Every request's answer is known; every request is recorded as its sender saw it.

Open loop: requests are due at even times, whether or not earlier ones were answered, and latency counts from when one was due. Closed loop: each
caller sends its next request when it has its answer. A reply that equals the known answer bit for bit is right; any other is kept, once, with its
plan, to be replayed after the run: replaying costs cores that the cluster under test needs.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import json
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from chaos.core.observations import OK, OUTCOMES, Request
from chaos.load_settings import Command, LoadSettings
from cluster.core.errors import MoeError
from cluster.deploy.connection import read_token
from router_service.client import AsyncRouterClient, Reply
from router_service.core.outcomes import Plan

BF16 = np.dtype(ml_dtypes.bfloat16)
NOT_SENT = "LOAD_LIMIT"
STOP_LIMIT_S = 30.0


class Load:
    """Requests under way, and the file of those that ended."""

    def __init__(self, settings: LoadSettings, records: IO[str]) -> None:
        self._settings = settings
        self._records = records
        with np.load(settings.known_path) as known:
            self._inputs: NDArray[Any] = known["inputs"].view(BF16)
            self._answers: NDArray[np.uint16] = known["answers"]
        self._client = AsyncRouterClient(settings.address, token=read_token(settings.token_path), timeout_s=settings.timeout_s)
        self._numbers = itertools.count()
        self._kept: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_on = False
        self.num_done = 0

    def start_closed(self, callers: int) -> None:
        """Let `callers` go round."""
        self._is_on = True
        for _ in range(callers):
            self._spawn(self._go_round())

    def start_open(self, rate: float) -> None:
        """Send `rate` requests a second."""
        self._is_on = True
        self._spawn(self._send_on_time(1.0 / rate))

    async def stop(self) -> None:
        """Send no more; what is under way ends by its own deadline."""
        self._is_on = False
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=self._settings.timeout_s + STOP_LIMIT_S)
        self._records.flush()

    def abandon(self) -> None:
        """Wait for nothing: nobody wants to know any more."""
        self._is_on = False
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """End the channel."""
        await self._client.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _go_round(self) -> None:
        while self._is_on:
            await self._ask(time.monotonic())

    async def _send_on_time(self, pause_s: float) -> None:
        due_s = time.monotonic()
        while self._is_on:
            due_s += pause_s
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            if len(self._tasks) > self._settings.max_outstanding:
                self._record(Request(next(self._numbers), due_s, due_s, time.monotonic(), NOT_SENT))
            else:
                self._spawn(self._ask(due_s))

    async def _ask(self, due_s: float) -> None:
        number, sent_s = next(self._numbers), time.monotonic()
        which = number % len(self._inputs)
        try:
            reply = await self._client.dispatch(
                self._inputs[which],
                model=self._settings.model,
                layer=self._settings.layer,
                fidelity="exact" if self._settings.fidelity == "exact" else "any",
                report="plan",
            )
        except MoeError as error:
            self._record(Request(number, due_s, sent_s, time.monotonic(), error.reason))
            return
        self._record(self._seen(reply, which, (number, due_s, sent_s, time.monotonic())))

    def _seen(self, reply: Reply, which: int, moments: tuple[int, float, float, float]) -> Request:
        plan, number = reply.report.plan, moments[0]
        if plan is None:
            return Request(*moments, status="NO_PLAN")
        outcomes = tuple(reply.report.outcomes[name] for name in OUTCOMES)
        moved = (plan.attempts > 0) | ~np.isin(plan.outcomes, (1, 7))
        rows: NDArray[np.uint16] = reply.hidden_states.view(np.uint16)
        is_plain = outcomes[0] == sum(outcomes)
        return Request(
            *moments,
            status=OK,
            epoch=int(reply.report.epoch),
            outcomes=outcomes,
            moved=tuple(np.unique(plan.expert_ids[moved]).tolist()) if moved.any() else (),
            num_extra_rows=int(plan.attempts.sum()),
            generations=tuple(np.unique(plan.generations).tolist()),
            answer="" if is_plain and np.array_equal(rows, self._answers[which]) else self._keep(which, rows, plan, number),
        )

    def _keep(self, which: int, rows: NDArray[np.uint16], plan: Plan, number: int) -> str:
        """Keep a reply that is to be replayed; equal ones once. Its name."""
        digest = hashlib.sha256(bytes([which]))
        for part in (rows, plan.outcomes, plan.version_index, plan.weights):
            digest.update(np.ascontiguousarray(part).tobytes())
        digest.update(b"".join(plan.versions))
        name = digest.hexdigest()[:24]
        if name not in self._kept:
            self._kept.add(name)
            asyncio.get_running_loop().run_in_executor(None, _write, self._settings.kept_dir / f"{name}.npz", which, rows.copy(), plan, number)
        return name

    def _record(self, request: Request) -> None:
        self.num_done += request.is_ok
        self._records.write(json.dumps(request.as_list()) + "\n")


def _write(path: Path, which: int, rows: NDArray[np.uint16], plan: Plan, number: int) -> None:
    """Write in one step: the reader may come at any time."""
    temporary = path.with_suffix(f".{number}.new")
    arrays = {name: getattr(plan, name) for name in Plan.__slots__ if name != "versions"}
    versions = np.frombuffer(b"".join(plan.versions), np.uint8).reshape(len(plan.versions), -1)
    with temporary.open("wb") as file:
        np.savez(file, which=which, rows=rows, versions=versions, **arrays)
    temporary.replace(path)


async def _obey(settings: LoadSettings) -> None:
    """Do what stdin says until it ends: the runner's end is this process's end."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    with settings.records_path.open("a", buffering=1) as records:
        load = Load(settings, records)
        try:
            _tell(load, "ready")
            while line := await reader.readline():
                command = Command.model_validate_json(line)
                match command.do:
                    case "start" if command.rate > 0:
                        load.start_open(command.rate)
                    case "start":
                        load.start_closed(command.callers)
                    case "stop":
                        await load.stop()
                _tell(load, command.do)
        finally:
            load.abandon()
            await load.close()


def _tell(load: Load, what: str) -> None:
    sys.stdout.write(json.dumps({"did": what, "num_done": load.num_done, "at_s": time.monotonic()}) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Read the settings, obey."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are the runner's, which heals under load and then closes stdin
    gc.freeze()
    asyncio.run(_obey(LoadSettings.model_validate_json(Path(sys.argv[1]).read_text())))


if __name__ == "__main__":
    main()
