"""A started expert runtime with everything a test wants to move: blobs, the forward, the clock, the replies. No sockets, no store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from actors.expert_layouts import ExpertWeights, expert_forward, grouped_forward, load_weights
from actors.expert_runtime import ExpertRuntime
from cluster.core.actor_config import ExpertActorConfig
from cluster.core.ids import CopyId
from cluster.core.link_frames import SegmentStatus
from cluster.core.status import SlotState
from kit.experts import TIMEOUT_S, Ask, RandomBlobs, Replies, expert_copy, frame_of, random_rows

torch.set_num_threads(1)
CPU = torch.device("cpu")
Trap = Callable[[Sequence[ExpertWeights], Sequence[int]], None]
A, B, C = expert_copy(0), expert_copy(1), expert_copy(2)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Forward:
    """`grouped_forward` with a gate to hold it at, a record of its calls, and traps that may raise first: one for frames, one for warming."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.calls: list[list[int]] = []
        self.trap: Trap = lambda _weights, _rows: None
        self.warm_trap: Trap = lambda _weights, _rows: None

    def __call__(self, x_ND: torch.Tensor, weights: Sequence[ExpertWeights], rows: Sequence[int]) -> torch.Tensor:
        if threading.current_thread().name == "compute":
            self.entered.release()
            assert self.gate.wait(TIMEOUT_S)
            self.calls.append(list(rows))
            self.trap(weights, rows)
        else:
            self.warm_trap(weights, rows)
        return grouped_forward(x_ND, weights, rows)

    def hold(self) -> None:
        self.gate.clear()

    def wait_until_entered(self) -> None:
        assert self.entered.acquire(timeout=TIMEOUT_S)


class Bench:
    """A started runtime with what a test wants to move."""

    def __init__(self, blobs: RandomBlobs | None = None, load: Callable[..., ExpertWeights] = load_weights, **overrides: object) -> None:
        values = {"deployment": "d", "actor_id": "e-0", "generation": 1, "num_slots": 4, "memory_bytes": 1 << 20, "store_dir": Path("unused")}
        self.config = ExpertActorConfig.model_validate(values | overrides)
        self.blobs = blobs or RandomBlobs()
        self.forward = Forward()
        self.clock = Clock()
        self.deaths: list[str] = []
        self.runtime = ExpertRuntime(
            self.config, self.blobs, CPU, forward=self.forward, load=load, clock=self.clock, on_sticky=lambda error: self.deaths.append(type(error).__name__)
        )
        self.replies = Replies()
        self.runtime.start(TIMEOUT_S)

    def hold_copies(self, *copies: CopyId, epoch: int = 1) -> None:
        self.runtime.assume(self.blobs.sized(*copies), epoch)
        self.wait_until(lambda: all(self.state(copy) is SlotState.READY for copy in copies))

    def state(self, copy: CopyId) -> SlotState | None:
        return next((slot.state for slot in self.runtime.slots() if slot.copy == copy), None)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        pause = threading.Event()
        for _ in range(int(TIMEOUT_S / 0.002)):
            if condition():
                return
            pause.wait(0.002)
        pytest.fail("the condition did not come true in time")

    def submit(self, *asks: Ask, generation: int = 1, frame_id: int = 1) -> None:
        frame, body = frame_of(*asks, generation=generation, frame_id=frame_id)
        self.runtime.submit(frame, body, self.replies)

    def statuses(self) -> list[SegmentStatus]:
        return [item.status for item in self.replies.next()[0].segments]

    def weights(self, copy: CopyId) -> ExpertWeights:
        return load_weights(self.blobs.open(copy.version), CPU)

    def expected(self, ask: Ask) -> torch.Tensor:
        return expert_forward(torch.from_numpy(ask.rows), self.weights(ask.copy))


def started(blobs: RandomBlobs | None = None, load: Callable[..., ExpertWeights] = load_weights, **overrides: object) -> Iterator[Bench]:
    """The body of a fixture: a bench that is stopped when the test is over."""
    made = Bench(blobs, load, **overrides)
    yield made
    made.forward.gate.set()
    made.blobs.gate.set()
    assert made.runtime.stop(TIMEOUT_S)


def ask(copy: CopyId, num_rows: int = 3, seed: int = 0, runs: Sequence[tuple[int, int]] = ()) -> Ask:
    """Random rows for a copy."""
    return Ask(copy, random_rows(seed + copy.expert.index, num_rows), runs)
