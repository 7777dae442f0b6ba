"""A compute thread's forward that suffers faults: it waits, raises, flips a bit of an output, or takes longer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from actors.core.faults import Flips, FrameOrder, pick_bit
from actors.core.frames import FramePlan
from actors.expert_layouts import ExpertWeights
from actors.frame_forward import FrameRunner, Outcomes
from actors.product_watch import watching


class InjectedFault(Exception):
    """What a forward raises that was told to."""


class Hindrance(Protocol):
    """Who says what a frame suffers; `actors.fault_port.FaultPort` is one."""

    def on_frame(self, weights: Mapping[int, ExpertWeights]) -> FrameOrder:
        """The next frame has its turn."""
        ...

    def hold_while_stuck(self) -> None:
        """Keep the calling thread until it is healed or its time is over."""
        ...

    def delay(self, seconds: float) -> None:
        """Keep the calling thread, less when everything is healed."""
        ...

    def note_flip(self) -> None:
        """A bit of an output was flipped."""
        ...


class HinderedRunner:
    """Stands between the compute thread and its forward."""

    def __init__(self, port: Hindrance, runner: FrameRunner) -> None:
        self._port = port
        self._runner = runner

    def run(self, plan: FramePlan, body: memoryview, weights: Mapping[int, ExpertWeights]) -> Outcomes:
        """As the forward behind it does, later or worse."""
        order = self._port.on_frame(weights)
        if order.is_stuck:
            self._port.hold_while_stuck()
        begun_s = time.perf_counter()
        if order.raises or order.flips is not None:
            with watching(_Disturbance(order, weights, self._port.note_flip)):
                outcomes = self._runner.run(plan, body, weights)
        else:
            outcomes = self._runner.run(plan, body, weights)
        if order.factor > 1:
            self._port.delay((order.factor - 1) * (time.perf_counter() - begun_s))
        return outcomes


class _Disturbance:
    """Raises in the first product, or flips one bit of the first expert's output, before anybody has looked at it."""

    def __init__(self, order: FrameOrder, weights: Mapping[int, ExpertWeights], on_flip: Callable[[], None]) -> None:
        self._raises = order.raises
        self._flips: Flips | None = order.flips
        self._last = {expert.tensors["down"].data_ptr() for expert in weights.values()}
        self._on_flip = on_flip

    def __call__(self, _x_TI: torch.Tensor, weight_OI: torch.Tensor, y_TO: torch.Tensor) -> None:
        if self._raises:
            raise InjectedFault
        flips = self._flips
        if flips is None or weight_OI.data_ptr() not in self._last:
            return
        self._flips = None
        # The first row: further ones may be padding.
        byte, bit = pick_bit(flips.rng, y_TO.shape[1], y_TO.element_size(), flips.bits)
        y_TO[0].view(torch.uint8)[byte].bitwise_xor_(1 << bit)
        self._on_flip()
