"""What checksums of matrix products cost and catch, in this process alone.

Cost: one grouped forward of 8 gated bf16 experts, plain and with every frame checked, in turns. Catch rate: random bits of weights and of products are
flipped, one at a time, in every element type; what counts are flips that move a row of the output by more than a hundredth of its norm. False alarms: fresh
random rows on healthy weights. Bound: random exponent bits are flipped; who of them is caught by the bound on outputs, which is looked at on every frame, and
by their being not finite. Shape legend: N rows, D model width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from actors.core.abft import block_sums
from actors.core.magnitude import beyond_reach, reach_of
from actors.expert_layouts import ExpertWeights, expert_forward, grouped_forward, load_weights
from actors.frame_audit import Audit, FrameSampler
from actors.product_watch import watching
from bench.settings import Settings, Sizes
from bench.tables import Section, Table
from cluster.core.descriptors import DType, ExpertDescriptor
from cluster.core.spec import AbftSpec
from kit.experts import RandomBlobs

NUM_ROWS = (1, 8, 64, 256, 1024)
FLIPPED_ROWS = (1, 16)
BOUND_ROWS, MANY_ROWS = (1, 16, 256), 256
KINDS = ("weights", "product")
FRACTION = AbftSpec().fraction
HARMFUL = 1e-2
GRAVE = 1e3
FIRST_EXPONENT_BIT, NUM_EXPONENT_BITS = 7, 8
LOOKS = 100
SAMPLED_GOAL, FULL_GOAL = 0.97, 0.75
# Bits of the significand from the lowest: the same share of each type's is called low.
MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
WORDS = {2: torch.int16, 4: torch.int32}
CLASSES = ("sign", "exponent", "mantissa, high half", "mantissa, low half")


def run(settings: Settings) -> Section:
    """Four tables."""
    torch.set_num_threads(1)
    experts = {dtype: [checked_expert(settings.sizes, dtype, seed) for seed in range(1, 1 + settings.sizes.num_experts)] for dtype in DType}
    with torch.inference_mode():
        costs = cost_of_rows(experts[DType.BF16], 2 * settings.rounds + 1)
        caught = {dtype.value: flips_of(own[0], settings.abft_flips) for dtype, own in experts.items()}
        alarms = [alarm for dtype, own in experts.items() for alarm in false_alarms(dtype.value, own, settings.abft_frames)]
        bounds = bounds_of(experts[DType.BF16][0], settings.abft_flips // 3)
    data = {"bound": bounds, "cost": costs, "caught": {name: [one.as_data() for one in own] for name, own in caught.items()}, "false_alarms": alarms}
    return Section([_cost_table(costs), _catch_table(caught), _alarm_table(alarms), _bound_table(bounds)], data)


def checked_expert(sizes: Sizes, dtype: DType, seed: int) -> ExpertWeights:
    """A random expert in private memory, with checksums."""
    descriptor = ExpertDescriptor(hidden_size=sizes.hidden_size, intermediate_size=sizes.intermediate_size, dtype=dtype)
    weights = load_weights(RandomBlobs(descriptor).open(f"{seed:08x}" * 8), torch.device("cpu"))
    weights.tensors.update({name: tensor.clone() for name, tensor in weights.tensors.items()})
    weights.checksums.update({name: block_sums(tensor) for name, tensor in weights.tensors.items()})
    weights.reach.extend(filter(None, [reach_of(weights.descriptor, weights.tensors)]))
    return weights


def cost_of_rows(experts: Sequence[ExpertWeights], num_rounds: int) -> list[dict[str, Any]]:
    """Throughput of a frame with checks, as a share of that without, by rows of the frame."""
    found = []
    for num_rows in NUM_ROWS:
        used = experts[: min(num_rows, len(experts))]
        rows = [num_rows // len(used)] * len(used)
        x_ND = _rows(sum(rows), used[0])
        always, never = FrameSampler(1.0), FrameSampler(0.0)
        plain_s, full_s = in_turns(num_rounds, lambda: frame(x_ND, used, rows, never), lambda: frame(x_ND, used, rows, always))  # noqa: B023  (called at once)
        ratios = [plain / full for plain, full in zip(plain_s, full_s, strict=True)]
        full = statistics.median(ratios)
        sampled = 1 / (1 + FRACTION * (1 / full - 1))
        found.append({"rows": sum(rows), "plain_s": statistics.median(plain_s), "full": full, "full_spread": (min(ratios), max(ratios)), "sampled": sampled})
    return found


def _rows(num_rows: int, expert: ExpertWeights, generator: torch.Generator | None = None, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(num_rows, expert.descriptor.hidden_size, generator=generator)).to(expert.tensors["down"].dtype)


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
    """Flips of one class of bits, how many did harm, how many of those were caught, and how bad the worst missed one was."""

    kind: str
    bits: str
    num_flips: int = 0
    num_harmful: int = 0
    num_caught: int = 0
    missed: list[float] = field(default_factory=list)

    def count(self, harm: float, *, is_caught: bool) -> None:
        """One more flip."""
        self.num_flips += 1
        if harm > HARMFUL:
            self.num_harmful += 1
            self.num_caught += is_caught
            self.missed += [] if is_caught else [harm]

    def as_data(self) -> dict[str, Any]:
        """For JSON; the worst missed harm may be infinite, which JSON does not know."""
        worst = max(self.missed, default=0.0)
        plain = {"kind": self.kind, "bits": self.bits, "flips": self.num_flips, "harmful": self.num_harmful, "caught": self.num_caught}
        return plain | {"worst_missed": worst if worst < torch.inf else "not finite"}


def class_of(bit: int, dtype: torch.dtype) -> str:
    """What a bit of an element means; bit 0 is the lowest of the significand."""
    mantissa = MANTISSA_BITS[dtype]
    if bit == 8 * dtype.itemsize - 1:
        return "sign"
    if bit >= mantissa:
        return "exponent"
    return "mantissa, high half" if bit >= mantissa // 2 else "mantissa, low half"


def flips_of(expert: ExpertWeights, num_flips: int) -> list[Caught]:
    """Flips of weights and of products, by class of bits."""
    found = {(kind, bits): Caught(kind, bits) for kind in KINDS for bits in CLASSES}
    for kind in KINDS:
        for num_rows in FLIPPED_ROWS:
            for bits, harm, is_caught in _flip_many(expert, kind, num_rows, num_flips // len(FLIPPED_ROWS)):
                found[kind, bits].count(harm, is_caught=is_caught)
    return list(found.values())


def _flip_many(expert: ExpertWeights, kind: str, num_rows: int, num_flips: int) -> Iterator[tuple[str, float, bool]]:
    """Flip one bit at a time, and put it right again; each class of bits in turn, so that the few signs are seen as often as the rest."""
    generator = torch.Generator().manual_seed(num_rows)

    def pick(stop: int) -> int:
        return int(torch.randint(stop, (1,), generator=generator))

    sizes = [tensor.numel() for tensor in expert.tensors.values()]
    names = list(expert.tensors)
    dtype = expert.tensors[names[0]].dtype
    by_class = {bits: [bit for bit in range(8 * dtype.itemsize) if class_of(bit, dtype) == bits] for bits in CLASSES}
    for number in range(num_flips):
        x_ND = _rows(num_rows, expert, generator)
        right_ND = expert_forward(x_ND, expert)
        matrix = expert.tensors[names[0] if pick(sum(sizes)) < sizes[0] else names[1]]
        bits = CLASSES[number % len(CLASSES)]
        bit = by_class[bits][pick(len(by_class[bits]))]
        audit = Audit([expert])
        if kind == "weights":
            place = pick(matrix.numel())
            flip(matrix, place, bit)
            with watching(audit):
                wrong_ND = expert_forward(x_ND, expert)
            flip(matrix, place, bit)
        else:
            with watching(flipper(matrix, pick(num_rows * matrix.shape[0]), bit)), watching(audit):
                wrong_ND = expert_forward(x_ND, expert)
        yield bits, harm_of(wrong_ND, right_ND), bool(audit.faults)


def bounds_of(expert: ExpertWeights, num_flips: int) -> list[dict[str, Any]]:
    """Flips of exponent bits, by rows of the frame, and what the look at every frame takes beside the forward, in processor time."""
    found = []
    for kind in KINDS:
        for num_rows in BOUND_ROWS:
            flips = num_flips if num_rows < MANY_ROWS else max(1, num_flips // 16)
            counts = [flip_exponent(expert, kind, num_rows, seed) for seed in range(flips)]
            names = ("harmful", "not_finite", "beyond_reach", "grave", "unseen")
            sums = dict(zip(names, (sum(column) for column in zip(*counts, strict=True)), strict=True))
            found.append({"kind": kind, "rows": num_rows, "flips": flips, **sums, "look_share": look_share(expert, num_rows)})
    return found


def flip_exponent(expert: ExpertWeights, kind: str, num_rows: int, seed: int) -> tuple[bool, bool, bool, bool, bool]:
    """Flip one exponent bit: whether it did harm, was not finite, was beyond reach, did grave harm, and did that unseen."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = _rows(num_rows, expert, generator)
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
    x_ND = _rows(num_rows, expert)
    y_ND = expert_forward(x_ND, expert)
    taken_s = []
    for action in (lambda: beyond_reach(x_ND, y_ND, expert.reach, [num_rows]), lambda: expert_forward(x_ND, expert)):
        begun_s = time.process_time()
        for _ in range(LOOKS):
            action()
        taken_s.append(time.process_time() - begun_s)
    return taken_s[0] / taken_s[1]


def flip(tensor: Tensor, place: int, bit: int) -> None:
    """Flip one bit of one element."""
    word, sign = WORDS[tensor.dtype.itemsize], 8 * tensor.dtype.itemsize - 1
    tensor.view(-1).view(word)[place].bitwise_xor_(torch.tensor(1 << bit if bit < sign else -(1 << sign), dtype=word))


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


def false_alarms(dtype: str, experts: Sequence[ExpertWeights], num_frames: int) -> list[dict[str, Any]]:
    """Frames of fresh rows on healthy weights, of three scales: nine in ten small, the rest large."""
    blocks = sum(sums.num_blocks for sums in experts[0].checksums.values())
    found = []
    for num_rows, share in ((8, 0.9), (512, 0.1)):
        count, alarms = max(1, int(num_frames * share)), 0
        for number in range(count):
            audit = Audit(experts)
            with watching(audit):
                grouped_forward(_rows(num_rows, experts[0], scale=(1e-2, 1.0, 1e2)[number % 3]), experts, [num_rows // len(experts)] * len(experts))
            alarms += bool(audit.faults)
        found.append({"dtype": dtype, "frames": count, "rows": num_rows, "sums": count * num_rows * blocks, "alarms": alarms})
    return found


def _cost_table(costs: Sequence[dict[str, Any]]) -> Table:
    rows = [
        (
            str(cost["rows"]),
            f"{1e3 * cost['plain_s']:.2f}",
            f"{cost['full']:.3f} ({cost['full_spread'][0]:.2f}-{cost['full_spread'][1]:.2f})",
            f"{cost['sampled']:.3f}",
        )
        for cost in costs
    ]
    columns = ("rows", "plain ms", f"every frame (goal: {FULL_GOAL})", f"1 in {round(1 / FRACTION)} (goal: {SAMPLED_GOAL})")
    note = (
        "One thread, bf16; throughput of the forward alone beside the plain one, medians of rounds, extremes in brackets; sampled: computed from every frame."
    )
    return Table("checksums: what a frame's forward costs", columns, rows, note)


def _catch_table(caught: dict[str, list[Caught]]) -> Table:
    rows = [
        (
            f"{dtype}, {one.kind}, {one.bits}",
            str(one.num_flips),
            str(one.num_harmful),
            f"{100 * one.num_caught / one.num_harmful:.2f} %" if one.num_harmful else "-",
            f"{max(one.missed, default=0.0):.3f}",
        )
        for dtype, own in caught.items()
        for one in own
    ]
    rows += [_total(kind, [one for one in chain(*caught.values()) if one.kind == kind]) for kind in KINDS]
    sizes = " or ".join(map(str, FLIPPED_ROWS))
    note = f"One bit at a time, in a checked frame of {sizes} rows. Harmful: a row of the output moves by more than {HARMFUL} of its norm."
    return Table("checksums: what is caught", ("flipped", "flips", "harmful", "of those caught", "worst missed"), rows, note)


def _total(kind: str, found: Sequence[Caught]) -> tuple[str, ...]:
    harmful, worst = sum(one.num_harmful for one in found), max(chain.from_iterable(one.missed for one in found), default=0.0)
    share = f"{100 * sum(one.num_caught for one in found) / harmful:.2f} %" if harmful else "-"
    return (f"all types, {kind}", str(sum(one.num_flips for one in found)), str(harmful), share, f"{worst:.3f}")


def _alarm_table(alarms: Sequence[dict[str, Any]]) -> Table:
    rows = [(one["dtype"], f"{one['frames']:,}", str(one["rows"]), f"{one['sums']:,}", str(one["alarms"])) for one in alarms]
    rows.append(("all", f"{sum(one['frames'] for one in alarms):,}", "", f"{sum(one['sums'] for one in alarms):,}", str(sum(one["alarms"] for one in alarms))))
    return Table("checksums: false alarms on healthy weights", ("type", "frames", "rows", "sums checked", "false alarms"), rows, "Goal: none.")


def _bound_table(bounds: Sequence[dict[str, Any]]) -> Table:
    names = ("kind", "rows", "flips", "harmful", "not_finite", "beyond_reach", "grave", "unseen")
    rows = [(*(str(one[name]) for name in names), f"{100 * one['look_share']:.2f} %") for one in bounds]
    columns = (
        "flipped exponents",
        "rows",
        "flips",
        f"harm > {HARMFUL}",
        "not finite",
        "beyond reach",
        f"harm > {GRAVE:g}",
        "of those neither",
        "cost of the look",
    )
    return Table("the bound on outputs, without checksums", columns, rows, "bf16; the cost is the look's processor time beside the forward's.")
