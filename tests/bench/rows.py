"""The rows of the table: one process each, started once, measured in turns."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from bench.processes import cpu_s
from bench.settings import IN_PROCESS, Case, Settings
from cluster.local.settings import PROJECT_ROOT

START_S = 180.0
ANSWER_S = 120.0


class ModuleProcess:
    """A module that obeys JSON commands, in a process of its own; `ask` sends a command and waits for its answer.

    `pausing`: it is stopped (SIGSTOP) while nobody asks, because OpenMP threads that wait actively would keep a core busy while others are measured.
    """

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str], name: str = "", *, pausing: bool = False) -> None:
        command = [sys.executable, "-m", module, *arguments]
        self._process = subprocess.Popen(command, env=environment, cwd=PROJECT_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._name = name or module
        self._pausing = pausing

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Returns when the peer is made."""
        self._read(START_S)
        self._pause()

    def ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one command."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = self._read(ANSWER_S + float(command.get("seconds", 0.0)))
        self._pause()
        return answer

    def close(self) -> None:
        """Let it end by itself, or end it."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _pause(self) -> None:
        if self._pausing:
            self._process.send_signal(signal.SIGSTOP)

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            is_there = bool(selector.select(timeout_s))
        line = self._process.stdout.readline() if is_there else ""
        if not line:
            message = f"{self._name} said nothing for {timeout_s:.0f} s, or ended (exit code {self._process.poll()}); see its messages above"
            raise RuntimeError(message)
        return dict(json.loads(line))


class CallerProcess(ModuleProcess):
    """One `bench.caller`."""

    def __init__(self, peer: str, folders: Mapping[str, Path], settings: Settings, options: Mapping[str, str], environment: Mapping[str, str]) -> None:
        names = {name: str(path) for name, path in folders.items()}
        arguments = ["--peer", peer, "--folders", json.dumps(names), "--sizes", json.dumps(asdict(settings.sizes)), "--options", json.dumps(dict(options))]
        super().__init__("bench.caller", arguments, environment, f"peer {peer}", pausing=peer == IN_PROCESS)


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement."""

    latencies_s: list[float]
    tokens_per_s: float
    cpu_s_per_call: float
    server_cpu_s_per_call: float = 0.0


@dataclass
class Row:
    """One line of the table.

    `merges`: it has no callers of its own and takes the rows of all of them as one batch. `servers`: processes whose CPU time is counted beside the
    caller's. `flavour`: what the peer shall do otherwise, where it knows more than one way.
    """

    name: str
    caller: CallerProcess
    merges: bool = False
    servers: tuple[int, ...] = ()
    flavour: str = ""
    samples: dict[Case, list[Sample]] = field(default_factory=dict)

    def measure(self, case: Case, seconds: float, warm_up: int) -> Sample:
        """Measure a case once."""
        callers, tokens = (1, case.callers * case.tokens) if self.merges else (case.callers, case.tokens)
        model = f"{self.flavour}/{case.model}" if self.flavour else case.model
        command = {"do": "measure", "model": model, "callers": callers, "tokens": tokens, "seconds": seconds, "warm_up": warm_up}
        before_s = cpu_s(self.servers)
        answer = self.caller.ask(command)
        served_s = cpu_s(self.servers) - before_s
        calls = len(answer["latencies_s"])
        return Sample(answer["latencies_s"], calls * tokens / answer["wall_s"], answer["cpu_s"] / calls, served_s / (calls + warm_up * callers))

    def take(self, case: Case, settings: Settings) -> None:
        """Measure a case once more, for the table."""
        taken = self.samples.setdefault(case, [])
        # What a first call of its size has to do is done by then: one call brings caches and clocks back.
        taken.append(self.measure(case, settings.seconds, 1 if taken else settings.warm_up_calls))


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
        return cls(IN_PROCESS, variants)

    def flavoured(self, name: str, flavour: str) -> Self:
        """The same processes, asked to do it another way."""
        return type(self)(name, {variant: Row(variant, row.caller, merges=True, flavour=flavour) for variant, row in self.variants.items()})

    def take(self, case: Case, settings: Settings) -> None:
        """Measure a case once more with the variant that suits it."""
        if case not in self.chosen:
            trials = {name: row.measure(case, settings.seconds / 2, settings.warm_up_calls) for name, row in self.variants.items()}
            self.chosen[case] = max(trials, key=lambda name: trials[name].tokens_per_s)
        row = self.variants[self.chosen[case]]
        self.samples.setdefault(case, []).append(row.measure(case, settings.seconds, 1))


class EchoServer:
    """The echo service in a process of its own."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "bench.peers.grpc_echo"]
        self._process = subprocess.Popen(command, env=environment, cwd=PROJECT_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def address(self) -> str:
        """Where it listens."""
        assert self._process.stdout is not None
        return f"127.0.0.1:{self._process.stdout.readline().strip()}"

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=10)


def settle(seconds: float = 1.0) -> None:
    """Let the processes that were just started come to rest."""
    time.sleep(seconds)
