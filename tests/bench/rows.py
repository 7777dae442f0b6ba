"""The rows of the table: one process each, started once, measured in turns."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from bench.settings import Case, Settings
from cluster.local.settings import PROJECT_ROOT

START_S = 180.0
ANSWER_S = 120.0


class CallerProcess:
    """One `bench.caller`; `ask` sends a command and waits for its answer."""

    def __init__(self, peer: str, folders: Mapping[str, Path], settings: Settings, options: Mapping[str, str], environment: Mapping[str, str]) -> None:
        names = {name: str(path) for name, path in folders.items()}
        command = [sys.executable, "-m", "bench.caller", "--peer", peer, "--folders", json.dumps(names)]
        command += ["--sizes", json.dumps(asdict(settings.sizes)), "--options", json.dumps(dict(options))]
        self._process = subprocess.Popen(command, env=environment, cwd=PROJECT_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._peer = peer

    def wait_until_ready(self) -> None:
        """Returns when the peer is made."""
        self._read(START_S)

    def ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read(ANSWER_S + float(command.get("seconds", 0.0)))

    def close(self) -> None:
        """Let it end by itself, or end it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            is_there = bool(selector.select(timeout_s))
        line = self._process.stdout.readline() if is_there else ""
        if not line:
            message = f"peer {self._peer} said nothing for {timeout_s:.0f} s, or ended (exit code {self._process.poll()}); see its messages above"
            raise RuntimeError(message)
        return dict(json.loads(line))


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement."""

    latencies_s: list[float]
    tokens_per_s: float
    cpu_s_per_call: float


@dataclass
class Row:
    """One line of the table. `merges`: it has no callers of its own and takes the rows of all of them as one batch."""

    name: str
    caller: CallerProcess
    merges: bool = False
    samples: dict[Case, list[Sample]] = field(default_factory=dict)

    def measure(self, case: Case, seconds: float, warm_up: int) -> Sample:
        """Measure a case once."""
        callers, tokens = (1, case.callers * case.tokens) if self.merges else (case.callers, case.tokens)
        command = {"do": "measure", "model": case.model, "callers": callers, "tokens": tokens, "seconds": seconds, "warm_up": warm_up}
        answer = self.caller.ask(command)
        calls = len(answer["latencies_s"])
        return Sample(answer["latencies_s"], calls * tokens / answer["wall_s"], answer["cpu_s"] / calls)

    def take(self, case: Case, settings: Settings) -> None:
        """Measure a case once more, for the table."""
        self.samples.setdefault(case, []).append(self.measure(case, settings.seconds, settings.warm_up_calls))


@dataclass
class BestOf:
    """The same in several processes with other thread counts and wait policies; for each case the one that is fastest in a trial is measured."""

    name: str
    variants: dict[str, Row]
    chosen: dict[Case, str] = field(default_factory=dict)
    samples: dict[Case, list[Sample]] = field(default_factory=dict)

    @classmethod
    def in_process(cls, folders: Mapping[str, Path], settings: Settings) -> Self:
        """The process of its own: one thread, and all cores with waiting threads that spin or sleep."""
        cores = os.cpu_count() or 1
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "GOMP_", "KMP_"))}
        variants = {}
        for threads, policy in [(1, "PASSIVE"), *([(cores, "PASSIVE"), (cores, "ACTIVE")] if cores > 1 else [])]:
            caller = CallerProcess("in_process", folders, settings, {"threads": str(threads)}, environment | {"OMP_WAIT_POLICY": policy})
            name = f"{threads} threads, {policy.lower()}"
            variants[name] = Row(name, caller, merges=True)
        return cls("in_process", variants)

    def take(self, case: Case, settings: Settings) -> None:
        """Measure a case once more with the variant that suits it."""
        if case not in self.chosen:
            trials = {name: row.measure(case, settings.seconds, settings.warm_up_calls) for name, row in self.variants.items()}
            self.chosen[case] = max(trials, key=lambda name: trials[name].tokens_per_s)
        row = self.variants[self.chosen[case]]
        self.samples.setdefault(case, []).append(row.measure(case, settings.seconds, settings.warm_up_calls))


class EchoServer:
    """The echo service in a process of its own."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "bench.peers.grpc_echo"]
        self._process = subprocess.Popen(command, env=environment, cwd=PROJECT_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def address(self) -> str:
        """Where it listens."""
        assert self._process.stdout is not None
        return f"127.0.0.1:{self._process.stdout.readline().strip()}"

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=10)


def settle(seconds: float = 1.0) -> None:
    """Let the processes that were just started come to rest."""
    time.sleep(seconds)
