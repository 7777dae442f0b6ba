"""The runner's end of the load process: start it, tell it what to do, read what its requests saw."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from pathlib import Path

from chaos.core.observations import Request
from chaos.core.peak import NUM_PROOFS, keeps_up, rates_to_try
from chaos.load_settings import Command, LoadSettings
from cluster.core.errors import FleetError

START_LIMIT_S = 30.0
STOP_LIMIT_S = 60.0
END_LIMIT_S = 10.0
PEAK_S = 2.0
WARM_S = 0.5


class LoadProcess:
    """One load process. Its requests are read from a file as they end."""

    def __init__(self, process: asyncio.subprocess.Process, settings: LoadSettings) -> None:
        self._process = process
        self._settings = settings
        self._offset = 0
        self._requests: list[Request] = []
        self.pid = process.pid
        self.is_on = False

    @classmethod
    async def start(cls, settings: LoadSettings, folder: Path) -> LoadProcess:
        """Start it; returns once it has a channel. Raises FleetError when it ends instead."""
        path = folder / "load.json"
        path.write_text(settings.model_dump_json())
        settings.kept_dir.mkdir(parents=True, exist_ok=True)
        settings.records_path.touch()
        pipe = asyncio.subprocess.PIPE
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "chaos.load", str(path), stdin=pipe, stdout=pipe, env=environment)
        load = cls(process, settings)
        try:
            await load._answer(START_LIMIT_S)
        except BaseException:
            await load.close()
            raise
        return load

    async def measure_peak(self, callers: int) -> float:
        """The most requests a second that are answered soon when they come one by one: at most what a closed loop of so many callers reaches."""
        ceiling = await self._rate_of(callers)
        rate = ceiling
        for rate in rates_to_try(ceiling):
            if await self._keeps_up_again_and_again(rate):
                break
        return rate

    async def _keeps_up_again_and_again(self, rate: float) -> bool:
        for _ in range(NUM_PROOFS):
            if not await self._keeps_up(rate):
                return False
        return True

    async def _rate_of(self, callers: int) -> float:
        """Answers a second of a closed loop, once warm."""
        await self._tell(Command(do="start", callers=callers))
        await asyncio.sleep(WARM_S)
        before = await self._tell(Command(do="mark"))
        await asyncio.sleep(PEAK_S)
        after = await self._tell(Command(do="mark"))
        await self._tell(Command(do="stop"), STOP_LIMIT_S)
        return (after["num_done"] - before["num_done"]) / (after["at_s"] - before["at_s"])

    async def _keeps_up(self, rate: float) -> bool:
        await self.begin(callers=0, rate=rate)
        await asyncio.sleep(WARM_S)
        begin_s = time.monotonic()
        await asyncio.sleep(PEAK_S)
        end_s = time.monotonic()
        await self.stop()  # all that was sent ends, so that what was late is seen
        return keeps_up(self.requests(begin_s), begin_s, end_s)

    async def begin(self, *, callers: int, rate: float) -> None:
        """Begin the load: an open loop if there is a rate, else a closed one."""
        await self._tell(Command(do="start", callers=callers, rate=rate))
        self.is_on = True

    async def stop(self) -> None:
        """Send no more; returns when all that was sent has ended."""
        if self.is_on:
            self.is_on = False
            await self._tell(Command(do="stop"), STOP_LIMIT_S)

    def requests(self, begin_s: float = 0.0) -> list[Request]:
        """Those that have ended by now, and had not at `begin_s`."""
        with self._settings.records_path.open() as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self._offset += len(whole.encode())
        self._requests += [Request.from_list(json.loads(line)) for line in whole.splitlines()]
        return [request for request in self._requests if request.end_s >= begin_s]

    def forget(self, before_s: float) -> None:
        """Drop requests that ended before then: they are in the file."""
        self._requests = [request for request in self._requests if request.end_s >= before_s]

    async def close(self) -> None:
        """End the process, by force if it takes too long."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), END_LIMIT_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _tell(self, command: Command, limit_s: float = START_LIMIT_S) -> dict[str, float]:
        if self._process.stdin is None or self._process.returncode is not None:
            message = f"the load process has ended (exit code {self._process.returncode}); what it wrote to stderr is above"
            raise FleetError(message)
        self._process.stdin.write(command.model_dump_json().encode() + b"\n")
        await self._process.stdin.drain()
        return await self._answer(limit_s)

    async def _answer(self, limit_s: float) -> dict[str, float]:
        assert self._process.stdout is not None  # noqa: S101  (made with a pipe)
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), limit_s)
        except TimeoutError:
            message = f"the load process did not answer within {limit_s:g} s"
            raise FleetError(message) from None
        if not line:
            message = "the load process ended; what it wrote to stderr is above"
            raise FleetError(message)
        answer: dict[str, float] = json.loads(line)
        return answer
