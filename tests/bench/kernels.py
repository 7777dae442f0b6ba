"""One expert's forward on one thread, by how its weights lie and are multiplied: why the layout is what it is, and what determinism costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from actors.expert_layouts import ExpertWeights, grouped_forward, with_packed
from actors.packed_matrix import can_pack
from actors.steady_forward import steady_forward
from actors.widened_forward import widened_forward, widening_pays
from bench.settings import Settings, Sizes
from bench.tables import Section, Table
from cluster.core.descriptors import DType, ExpertDescriptor
from kit.plain_experts import make_weights

ROWS = (1, 8, 16, 64, 256, 1024)
ROUNDS = 3
# From here on weights are read once for many rows, and few experts tell as much as all.
MANY_ROWS, FEW_EXPERTS = 256, 2
Forward = Callable[[Tensor, int], Tensor]
PLAIN, STEADY = "mapped", "deterministic"


def run(settings: Settings) -> Section:
    """Every way at every number of rows, in turns; experts taken one after the other, so that their weights come from memory as in service."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, dict[int, float]]] = {}
    for dtype in (DType.BF16, DType.FP32):
        experts = [make_weights(_descriptor(settings.sizes, dtype), seed) for seed in range(settings.sizes.num_experts)]
        with torch.inference_mode():
            found[dtype.value] = _measure(ways_of(experts, dtype), experts, ROWS if settings.rounds > 1 else ROWS[:2])
    return Section(
        [_table(name, ways) for name, ways in found.items()],
        {"seconds": found, "widening_pays": widening_pays(), "cpu_capability": torch.backends.cpu.get_cpu_capability()},
    )


def _descriptor(sizes: Sizes, dtype: DType) -> ExpertDescriptor:
    return ExpertDescriptor(hidden_size=sizes.hidden_size, intermediate_size=sizes.intermediate_size, dtype=dtype)


def ways_of(experts: Sequence[ExpertWeights], dtype: DType) -> dict[str, Forward]:
    """Forwards of the expert of a number, by name."""
    ways: dict[str, Forward] = {PLAIN: _served(grouped_forward, experts), STEADY: _served(steady_forward, experts)}
    if dtype is not DType.BF16:
        return ways
    ways["widened on the way"] = _served(widened_forward, experts)
    wide = [{name: tensor.float() for name, tensor in expert.tensors.items()} for expert in experts]
    ways["fp32 copies"] = lambda x_TD, index: _gated(x_TD.float(), wide[index], linear).bfloat16()
    if can_pack():
        ways["packed"] = _served(grouped_forward, [with_packed(expert) for expert in experts])
    return ways


def _served(forward: Callable[[Tensor, Sequence[ExpertWeights], Sequence[int]], Tensor], experts: Sequence[ExpertWeights]) -> Forward:
    return lambda x_TD, index: forward(x_TD, [experts[index]], [len(x_TD)])


def _gated(x_TD: Tensor, tensors: Mapping[str, Tensor], multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    gate_TF, up_TF = multiply(x_TD, tensors["gate_up"]).chunk(2, dim=-1)
    return multiply(silu(gate_TF) * up_TF, tensors["down"])


def _measure(ways: Mapping[str, Forward], experts: Sequence[ExpertWeights], sizes: Sequence[int]) -> dict[str, dict[int, float]]:
    """Median seconds of one forward, by way and number of rows. Raises ValueError when two ways do not agree."""
    found: dict[str, dict[int, float]] = {name: {} for name in ways}
    for num_rows in sizes:
        x_TD = torch.randn(num_rows, experts[0].descriptor.hidden_size).to(experts[0].tensors["down"].dtype)
        expected_TD = ways[PLAIN](x_TD, 0).float()
        times: dict[str, list[float]] = {name: [] for name in ways}
        count = FEW_EXPERTS if num_rows >= MANY_ROWS else len(experts)
        for _ in range(ROUNDS):
            for name, forward in ways.items():
                if float((forward(x_TD, 0).float() - expected_TD).abs().max() / expected_TD.abs().max()) > 0.05:
                    message = f"{name} computes something else than {PLAIN}"
                    raise ValueError(message)
                begun_s = time.perf_counter()
                for index in range(count):
                    forward(x_TD, index)
                times[name].append((time.perf_counter() - begun_s) / count)
        for name, samples in times.items():
            found[name][num_rows] = median(samples)
    return found


def _table(dtype: str, ways: Mapping[str, Mapping[int, float]]) -> Table:
    plain = ways[PLAIN]
    rows = [(name, *(f"{1e3 * seconds:.2f} ({seconds / plain[num_rows]:.2f}x)" for num_rows, seconds in times.items())) for name, times in ways.items()]
    return Table(
        f"one expert's forward on one thread, {dtype}: ms, and the time against `mapped`",
        ("way", *(f"{num_rows} rows" for num_rows in plain)),
        rows,
        "`mapped` and `widened on the way` use the weights as the store maps them; copies are private memory, twice the stored bytes in fp32.",
    )
