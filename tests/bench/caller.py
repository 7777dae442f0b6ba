"""A process that calls one peer as often as it is told: one JSON command per line on stdin, one JSON answer per line on stdout.

{"do": "answer", "model": "bench", "tokens": 8, "seed": 1, "path": "answer.npy"}                  call once, save the answer to be checked
{"do": "measure", "model": "bench", "callers": 16, "tokens": 64, "seconds": 1.0, "warm_up": 3}    {"latencies_s": [...], "wall_s": ..., "cpu_s": ...}
{"do": "flood", "model": "bench", "tokens": 64, "rate_per_s": 900.0, "seconds": 5.0, "timeout_s": 1.0}   send at even intervals, waiting for nothing
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.layer import Rows, random_rows
from bench.settings import Sizes

NUM_INPUTS = 4


class Caller:
    """Calls a peer; one caller blocks, many share an event loop."""

    def __init__(self, peer: Any, sizes: Sizes) -> None:
        self._peer = peer
        self._sizes = sizes
        self._loop = asyncio.new_event_loop()

    def answer(self, model: str, tokens: int, seed: int, path: str) -> dict[str, Any]:
        """Save what the peer answers to rows of a seed."""
        rows = random_rows(self._sizes, tokens, seed, model)
        blocking, concurrent = self._peer.call(rows, model), self._loop.run_until_complete(self._peer.acall(rows, model))
        np.save(path, np.stack([blocking.astype(np.float32), concurrent.astype(np.float32)]))
        return {}

    def measure(self, model: str, callers: int, tokens: int, seconds: float, warm_up: int, pause_s: float = 0.0) -> dict[str, Any]:
        """Call for some seconds; what `warm_up` calls of each caller take is not counted. One caller may pause between two calls."""
        inputs = [random_rows(self._sizes, tokens, seed, model) for seed in range(NUM_INPUTS)]
        if callers == 1:
            self._block(inputs, model, warm_up, 0.0)
            begun_s, cpu_s = time.perf_counter(), time.process_time()
            latencies = self._block(inputs, model, 1, seconds, pause_s)
        else:
            self._loop.run_until_complete(self._together(inputs, model, callers, warm_up, 0.0))
            begun_s, cpu_s = time.perf_counter(), time.process_time()
            latencies = self._loop.run_until_complete(self._together(inputs, model, callers, 1, seconds))
        return {"latencies_s": latencies, "wall_s": time.perf_counter() - begun_s, "cpu_s": time.process_time() - cpu_s}

    def flood(self, model: str, tokens: int, rate_per_s: float, seconds: float, timeout_s: float) -> dict[str, Any]:
        """Send at even intervals whatever becomes of it; the peer's `attempt` makes one attempt with a `message` of its own and says what became of that."""
        messages = [self._peer.message(random_rows(self._sizes, tokens, seed, model), model) for seed in range(NUM_INPUTS)]
        return self._loop.run_until_complete(self._flood(messages, rate_per_s, seconds, timeout_s))

    async def _flood(self, messages: list[Any], rate_per_s: float, seconds: float, timeout_s: float) -> dict[str, Any]:
        found: dict[str, list[float]] = {"answered": [], "refused": [], "late": [], "failed": []}
        under_way: set[asyncio.Task[None]] = set()

        async def one(number: int) -> None:
            begun_s = time.perf_counter()
            ending = await self._peer.attempt(messages[number % NUM_INPUTS], timeout_s)
            found[ending].append(time.perf_counter() - begun_s)

        begun_s, number = time.perf_counter(), 0
        late: list[float] = []
        slept_s = begun_s
        while (elapsed_s := time.perf_counter() - begun_s) < seconds:
            late.append(begun_s + elapsed_s - slept_s)
            while number < elapsed_s * rate_per_s:
                task = asyncio.ensure_future(one(number))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
                number += 1
            slept_s = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
        ended_s, num_in_window = time.time(), len(found["answered"])
        await asyncio.gather(*under_way)
        answer = {"num_sent": number, "answered_s": found["answered"], "refused_s": found["refused"], "ended_s": ended_s, "num_in_window": num_in_window}
        return answer | {"num_late": len(found["late"]), "num_failed": len(found["failed"]), "loop_late_s": late}

    def _block(self, inputs: list[Rows], model: str, at_least: int, seconds: float, pause_s: float = 0.0) -> list[float]:
        latencies: list[float] = []
        until_s = time.perf_counter() + seconds
        while len(latencies) < at_least or time.perf_counter() < until_s:
            begun_s = time.perf_counter()
            self._peer.call(inputs[len(latencies) % NUM_INPUTS], model)
            latencies.append(time.perf_counter() - begun_s)
            if pause_s:
                time.sleep(pause_s)
        return latencies

    async def _together(self, inputs: list[Rows], model: str, callers: int, at_least: int, seconds: float) -> list[float]:
        until_s = time.perf_counter() + seconds

        async def one(number: int) -> list[float]:
            latencies: list[float] = []
            while len(latencies) < at_least or time.perf_counter() < until_s:
                begun_s = time.perf_counter()
                await self._peer.acall(inputs[(number + len(latencies)) % NUM_INPUTS], model)
                latencies.append(time.perf_counter() - begun_s)
            return latencies

        return [latency for found in await asyncio.gather(*(one(number) for number in range(callers))) for latency in found]


def main() -> None:
    """Make the peer, say that it is ready, then obey until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--folders", type=json.loads, required=True)
    parser.add_argument("--sizes", type=json.loads, required=True)
    parser.add_argument("--options", type=json.loads, default={})
    given = parser.parse_args()
    sizes = Sizes(**given.sizes)
    # Whatever the peer's libraries print goes to stderr; stdout is for answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer = importlib.import_module(f"bench.peers.{given.peer}").Peer({name: Path(path) for name, path in given.folders.items()}, sizes, given.options)
    caller = Caller(peer, sizes)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        reply = {"answer": caller.answer, "measure": caller.measure, "flood": caller.flood}[command.pop("do")](**command)
        print(json.dumps(reply), file=answers, flush=True)
    getattr(peer, "close", lambda: None)()


if __name__ == "__main__":
    main()
