"""What checksums of matrix products cost and catch: `PYTHONPATH=.:tests python -m bench.abft`.

Bound: random exponent bits are flipped; who of them is caught by the bound on outputs, which is looked at on every frame, and by their being not finite.
Cost: one grouped forward of 8 gated bf16 experts 512x2048, plain, with every frame checked and with one in sixteen, in turns. Catch rate: random bits of
weights and of products are flipped, one at a time; what counts are flips that move a row of the output by more than a hundredth of its norm.
False alarms: fresh random rows on healthy weights. Shape legend: N rows, D model width.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from actors.core.abft import block_sums
from actors.core.magnitude import beyond_reach, reach_of
from actors.expert_layouts import ExpertWeights, expert_forward, grouped_forward, load_weights
from actors.frame_audit import Audit, FrameSampler
from actors.product_watch import watching
from cluster.core.descriptors import DType, ExpertDescriptor
from kit.experts import RandomBlobs

NUM_EXPERTS = 8
NUM_ROWS = (1, 8, 64, 256, 1024)
FRACTION = 1 / 16
HARMFUL = 1e-2
GRAVE = 1e3
FIRST_EXPONENT_BIT, NUM_EXPONENT_BITS = 7, 8
LOOKS = 100
DESCRIPTOR = ExpertDescriptor(hidden_size=512, intermediate_size=2048, dtype=DType.BF16)


def main() -> None:
    """Print four tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--flips", type=int, default=4000)
    parser.add_argument("--clean", type=int, default=2000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    experts = [checked_expert(seed) for seed in range(1, 1 + NUM_EXPERTS)]
    console = Console()
    with torch.inference_mode():
        console.print(cost_table(experts, given.rounds))
        console.print(catch_table(experts[0], given.flips))
        console.print(alarm_table(experts, given.clean))
        console.print(bound_table(experts[0], given.flips // 4))


def checked_expert(seed: int) -> ExpertWeights:
    """A random expert in private memory, with checksums."""
    weights = load_weights(RandomBlobs(DESCRIPTOR).open(f"{seed:08x}" * 8), torch.device("cpu"))
    weights.tensors.update({name: tensor.clone() for name, tensor in weights.tensors.items()})
    weights.checksums.update({name: block_sums(tensor) for name, tensor in weights.tensors.items()})
    weights.reach.extend(filter(None, [reach_of(weights.descriptor, weights.tensors)]))
    return weights


def cost_table(experts: Sequence[ExpertWeights], num_rounds: int) -> Table:
    """Throughput with checks, as a share of that without."""
    table = Table(
        "rows", "plain ms", "every frame", f"1 in {round(1 / FRACTION)} (computed)", title="cost: throughput beside the plain forward, median of rounds"
    )
    for num_rows in NUM_ROWS:
        used = experts if num_rows >= NUM_EXPERTS else experts[:num_rows]
        rows = [num_rows // len(used)] * len(used)
        x_ND = torch.randn(sum(rows), DESCRIPTOR.hidden_size).bfloat16()
        always, never = FrameSampler(1.0), FrameSampler(0.0)
        plain_s, full_s = in_turns(num_rounds, lambda: frame(x_ND, used, rows, never), lambda: frame(x_ND, used, rows, always))  # noqa: B023  (called at once)
        ratios = [plain / full for plain, full in zip(plain_s, full_s, strict=True)]
        more = statistics.median(full / plain - 1 for plain, full in zip(plain_s, full_s, strict=True))
        cells = (f"{1000 * statistics.median(plain_s):.2f}", f"{statistics.median(ratios):.3f} ({min(ratios):.2f}-{max(ratios):.2f})")
        table.add_row(str(sum(rows)), *cells, f"{1 / (1 + FRACTION * more):.3f}")
    return table


def frame(x_ND: Tensor, experts: Sequence[ExpertWeights], rows: Sequence[int], sampler: FrameSampler) -> None:
    """One frame's forward, as the actor runs it."""
    audit = sampler.audit(experts)
    if audit is None:
        grouped_forward(x_ND, experts, rows)
        return
    with watching(audit):
        grouped_forward(x_ND, experts, rows)


def in_turns(num_rounds: int, *actions: Callable[[], None]) -> list[list[float]]:
    """The time of each action in each round, in seconds; the first round warms and is forgotten."""
    times: list[list[float]] = [[] for _ in actions]
    for number in range(num_rounds + 1):
        for action, taken in zip(actions, times, strict=True):
            begun_s = time.perf_counter()
            action()
            if number:
                taken.append(time.perf_counter() - begun_s)
    return times


@dataclass
class Caught:
    """How many flips there were, how many did harm, how many of those were caught, and how bad the worst missed one was."""

    num_flips: int = 0
    num_harmful: int = 0
    num_caught: int = 0
    missed: list[float] = field(default_factory=list)

    def count(self, harm: float, *, is_caught: bool) -> None:
        self.num_flips += 1
        if harm > HARMFUL:
            self.num_harmful += 1
            self.num_caught += is_caught
            self.missed += [] if is_caught else [harm]


def catch_table(expert: ExpertWeights, num_flips: int) -> Table:
    """Flips of weights and of products, by rows of the frame."""
    table = Table("flipped", "rows", "flips", f"harm > {HARMFUL}", "of those caught", "worst missed", title="catch rate when a frame is checked")
    for kind in ("weights", "product"):
        for num_rows in (1, 16):
            found = flip_many(expert, kind, num_rows, num_flips)
            share = f"{100 * found.num_caught / max(1, found.num_harmful):.2f} %"
            table.add_row(kind, str(num_rows), str(found.num_flips), str(found.num_harmful), share, f"{max(found.missed, default=0.0):.3f}")
    return table


def flip_many(expert: ExpertWeights, kind: str, num_rows: int, num_flips: int) -> Caught:
    """Flip one bit at a time, and put it right again."""
    generator = torch.Generator().manual_seed(num_rows)
    found = Caught()

    def pick(stop: int) -> int:
        return int(torch.randint(stop, (1,), generator=generator))

    sizes = [tensor.numel() for tensor in expert.tensors.values()]
    names = list(expert.tensors)
    for _ in range(num_flips):
        x_ND = torch.randn(num_rows, DESCRIPTOR.hidden_size, generator=generator).bfloat16()
        right_ND = expert_forward(x_ND, expert)
        name = names[0] if pick(sum(sizes)) < sizes[0] else names[1]
        matrix = expert.tensors[name]
        audit = Audit([expert])
        if kind == "weights":
            place, bit = pick(matrix.numel()), pick(16)
            flip(matrix, place, bit)
            with watching(audit):
                wrong_ND = expert_forward(x_ND, expert)
            flip(matrix, place, bit)
        else:
            with watching(flipper(matrix, pick(num_rows * matrix.shape[0]), pick(16))), watching(audit):
                wrong_ND = expert_forward(x_ND, expert)
        found.count(harm_of(wrong_ND, right_ND), is_caught=bool(audit.faults))
    return found


def bound_table(expert: ExpertWeights, num_flips: int) -> Table:
    """Flips of exponent bits, by rows of the frame, and what the look at every frame takes beside the forward, in processor time."""
    table = Table("flipped", "rows", "flips", f"harm > {HARMFUL}", "not finite", "beyond reach", f"harm > {GRAVE:g}", "of those neither", "cost of the look")
    table.title = "the bound on outputs, without checksums"
    for kind in ("weights", "product"):
        for num_rows in (1, 16, 256):
            flips = num_flips if num_rows < 256 else num_flips // 16
            counts = [flip_exponent(expert, kind, num_rows, seed) for seed in range(flips)]
            harmful, not_finite, beyond, grave, missed = (sum(column) for column in zip(*counts, strict=True))
            table.add_row(
                kind, str(num_rows), str(flips), *map(str, (harmful, not_finite, beyond, grave, missed)), f"{100 * look_share(expert, num_rows):.2f} %"
            )
    return table


def flip_exponent(expert: ExpertWeights, kind: str, num_rows: int, seed: int) -> tuple[bool, bool, bool, bool, bool]:
    """Flip one exponent bit: whether it did harm, was not finite, was beyond reach, did grave harm, and did that unseen."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(num_rows, DESCRIPTOR.hidden_size, generator=generator).bfloat16()
    right_ND = expert_forward(x_ND, expert)
    name = ("gate_up", "gate_up", "down")[seed % 3]  # as many numbers are in each
    matrix = expert.tensors[name]
    place = int(torch.randint(matrix.numel() if kind == "weights" else num_rows * matrix.shape[0], (1,), generator=generator))
    bit = FIRST_EXPONENT_BIT + int(torch.randint(NUM_EXPONENT_BITS, (1,), generator=generator))
    if kind == "weights":
        flip(matrix, place, bit)
        wrong_ND = expert_forward(x_ND, expert)
        flip(matrix, place, bit)
    else:
        with watching(flipper(matrix, place, bit)):
            wrong_ND = expert_forward(x_ND, expert)
    harm, is_finite = harm_of(wrong_ND, right_ND), bool(wrong_ND.isfinite().all())
    is_beyond = is_finite and bool(beyond_reach(x_ND, wrong_ND, expert.reach, [num_rows]))
    return harm > HARMFUL, not is_finite, is_beyond, harm > GRAVE, harm > GRAVE and is_finite and not is_beyond


def look_share(expert: ExpertWeights, num_rows: int) -> float:
    """Processor time of the look, as a share of that of one expert's forward."""
    x_ND = torch.randn(num_rows, DESCRIPTOR.hidden_size).bfloat16()
    y_ND = expert_forward(x_ND, expert)
    taken_s = []
    for action in (lambda: beyond_reach(x_ND, y_ND, expert.reach, [num_rows]), lambda: expert_forward(x_ND, expert)):
        begun_s = time.process_time()
        for _ in range(LOOKS):
            action()
        taken_s.append(time.process_time() - begun_s)
    return taken_s[0] / taken_s[1]


def flip(tensor: Tensor, place: int, bit: int) -> None:
    """Flip one bit of a bf16 tensor."""
    word = tensor.view(-1).view(torch.int16)[place]
    word.bitwise_xor_(torch.tensor(1 << bit if bit < 15 else -(1 << 15), dtype=torch.int16))


def flipper(matrix: Tensor, place: int, bit: int) -> Callable[[Tensor, Tensor, Tensor], None]:
    """Flips one bit of this matrix's product as soon as it is made."""

    def watch(_x: Tensor, seen: Tensor, product: Tensor) -> None:
        if seen is matrix:
            flip(product, place, bit)

    return watch


def harm_of(wrong_ND: Tensor, right_ND: Tensor) -> float:
    """The largest relative error of a row; infinite for one that is not finite."""
    error_N = torch.linalg.vector_norm(wrong_ND.double() - right_ND.double(), dim=1) / torch.linalg.vector_norm(right_ND.double(), dim=1)
    return float(error_N.nan_to_num(nan=torch.inf).max())


def alarm_table(experts: Sequence[ExpertWeights], num_frames: int) -> Table:
    """Frames of fresh rows on healthy weights, of three scales."""
    table = Table("frames", "rows", "row sums checked", "false alarms", title="false alarms")
    blocks = sum(sums.num_blocks for sums in experts[0].checksums.values())
    for num_rows, share in ((8, 0.9), (512, 0.1)):
        count, alarms = max(1, int(num_frames * share)), 0
        for number in range(count):
            scale = (1e-2, 1.0, 1e2)[number % 3]
            x_ND = (scale * torch.randn(num_rows, DESCRIPTOR.hidden_size)).bfloat16()
            audit = Audit(experts)
            with watching(audit):
                grouped_forward(x_ND, experts, [num_rows // NUM_EXPERTS] * NUM_EXPERTS)
            alarms += bool(audit.faults)
        table.add_row(str(count), str(num_rows), str(count * num_rows * blocks), str(alarms))
    return table


if __name__ == "__main__":
    main()
