"""The forward of `actors.layout: widened`: many bf16 rows are multiplied in fp32, the mapped weights widened a strip at a time on their way through the cache.

Where bf16 dot products are no faster than fp32's (AVX-512 without AMX), oneDNN's bf16 kernels stay behind its fp32 ones by up to 1.7 times from about 100 rows
on, packed or not. Results are rounded to bf16 where the bf16 kernel rounds; only the order of sums differs, so a row's last bit may depend on how many
rows share its segment. No layout is kept: the strip is one buffer per thread. Shape legend: T rows, I input width, O output width of a matrix.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from actors.expert_layouts import ExpertWeights, expert_forward, grouped_forward
from actors.steady_forward import steady_forward

Layout = Literal["auto", "mapped", "packed", "widened"]
GroupedForward = Callable[[Tensor, Sequence[ExpertWeights], Sequence[int]], Tensor]

# Elements of a strip: 2 MiB in fp32, what a core's second-level cache holds. Half or twice as many were slower, or no faster.
STRIP_ELEMENTS = 1 << 19
# On the machine of docs/bench the two cross between 48 and 96 rows.
MIN_ROWS = 96
# `auto` wants this share of time saved, beyond what a busy machine's clock makes up by itself.
_WORTHWHILE = 0.85
_TRIAL_SHAPE = (4096, 512)
_TRIAL_ROWS = (MIN_ROWS, 4 * MIN_ROWS)
_TRIALS = 3

_local = threading.local()


def forward_of(layout: Layout, device: torch.device, *, deterministic: bool = False) -> GroupedForward:
    """The forward of a device: `mapped` and `packed` with the matrices an expert has, `widened` as above, `auto` the faster in a trial of about 0.1 s."""
    if deterministic:
        return steady_forward
    if device.type != "cpu" or layout in {"mapped", "packed"} or (layout == "auto" and not widening_pays()):
        return grouped_forward
    return widened_forward


@torch.no_grad()
def widened_forward(x_ND: Tensor, weights: Sequence[ExpertWeights], rows: Sequence[int]) -> Tensor:
    """As `grouped_forward`; segments of at least MIN_ROWS rows of bf16 in fp32. Raises ValueError when the segments are not exactly the rows."""
    if x_ND.dtype is not torch.bfloat16 or max(rows, default=0) < MIN_ROWS:
        return grouped_forward(x_ND, weights, rows)
    parts = torch.split_with_sizes(x_ND, list(rows))
    return torch.cat([expert_forward(part, expert, widened_linear if len(part) >= MIN_ROWS else linear) for part, expert in zip(parts, weights, strict=True)])


def widened_linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """`linear` without bias: sums in fp32, rounded once to the element type of `x_TI`."""
    width = weight_OI.shape[1]
    step = max(1, STRIP_ELEMENTS // width)
    wide_TI = x_TI.float()
    output_TO = x_TI.new_empty((x_TI.shape[0], weight_OI.shape[0]))
    buffer = _strip(max(STRIP_ELEMENTS, width))
    for part_OI, into_TO in zip(torch.split(weight_OI, step), torch.split(output_TO, step, dim=1), strict=True):
        strip_OI = buffer[: part_OI.numel()].view(part_OI.shape)
        strip_OI.copy_(part_OI)
        into_TO.copy_(linear(wide_TI, strip_OI))
    return output_TO


def widening_pays() -> bool:
    """Whether it is clearly faster than the bf16 kernel at few and at many rows, on this device and now."""
    weight_OI = torch.ones(_TRIAL_SHAPE, dtype=torch.bfloat16)
    with torch.inference_mode():
        for num_rows in _TRIAL_ROWS:
            x_TI = torch.ones((num_rows, _TRIAL_SHAPE[1]), dtype=torch.bfloat16)
            if _fastest_s(widened_linear, x_TI, weight_OI) > _WORTHWHILE * _fastest_s(linear, x_TI, weight_OI):
                return False
    return True


def _fastest_s(compute: Callable[[Tensor, Tensor], Tensor], x_TI: Tensor, weight_OI: Tensor) -> float:
    times = []
    for _ in range(_TRIALS + 1):
        begun_s = time.perf_counter()
        compute(x_TI, weight_OI)
        times.append(time.perf_counter() - begun_s)
    return min(times[1:])


def _strip(num_elements: int) -> Tensor:
    """This thread's buffer."""
    buffer: Tensor | None = getattr(_local, "strip", None)
    if buffer is None or buffer.numel() < num_elements:
        buffer = _local.strip = torch.empty(num_elements)
    return buffer
