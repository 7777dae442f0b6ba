"""What shadows cost: held-out bits per byte of the shipped model with the experts of one GPU of four answered by their shadows, codec by codec.

Run ``python -m examples.shadow_quality`` (some minutes on one core; ``--gpus 0`` for a quarter of it). Beside every codec stand its memory, the signal
to noise of its weights and the error of its outputs, and beside them all the controls: the experts dropped, and their tokens sent to the next best.
GPU g of the four holds experts 2g and 2g + 1 of every layer. Calibration and scored text are disjoint parts of the committed held-out samples.
``--timings`` measures packing and expanding one 512x2048 gated expert instead, in processor time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from actors.core.codecs import CODECS, PackedExpert, decode, encode, packed_bytes
from actors.core.fidelity import Fidelity, fidelity
from actors.expert_layouts import ExpertWeights, expert_forward
from cluster.core.descriptors import CodecRecord, DType, ExpertDescriptor
from cluster.core.ids import ExpertId
from cluster.core.shadow_plan import ShadowCandidate, ShadowOption, plan_shadows
from cluster.registry.checkpoint import Checkpoint
from examples.tiny_moe_lm.export import CHECKPOINT
from examples.tiny_moe_lm.scoring import bits_per_byte, heldout_texts

Array = NDArray[Any]
Tensors = Mapping[str, Array]
Result = TypeVar("Result")
Place = tuple[int, int]
"""Layer and index of an expert."""
Shadows = Mapping[Place, tuple[PackedExpert, Fidelity]]

NUM_GPUS = 4
MEMORY_FRACTION = 0.15
_CALIBRATION_START = 64 * 1024
_TIMED_EXPERT = ExpertDescriptor(hidden_size=512, intermediate_size=2048)


@dataclass(frozen=True)
class Row:
    """One way to do without a GPU: memory in percent of the primaries', means over experts, and the rise of bits per byte by lost GPU."""

    name: str
    memory_percent: float
    weight_snr_db: float
    relative_error: float
    cosine: float
    bits_per_byte_percent: tuple[float, ...]


def main() -> None:
    """Print one table, and write it as JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--bytes", type=int, default=6_000, help="bytes of each domain to score")
    parser.add_argument("--calibration-bytes", type=int, default=24_000, help="bytes of each domain to calibrate on")
    parser.add_argument("--gpus", type=int, nargs="*", default=list(range(NUM_GPUS)), help="GPUs to lose, one at a time")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--timings", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.timings:
        print_timings()
        return
    subject = Subject(arguments.checkpoint, arguments.bytes, arguments.calibration_bytes)
    print(f"held-out bits per byte without a loss: {subject.exact:.4f}")
    rows = []
    for row in quality(subject, arguments.gpus):
        rows.append(asdict(row))
        rises = " ".join(f"{rise:+8.3f}" for rise in row.bits_per_byte_percent)
        facts = f"{row.memory_percent:6.2f} %  {row.weight_snr_db:6.2f} dB  error {row.relative_error:.3f}  cosine {row.cosine:.4f}"
        print(f"{row.name:16s} {facts}  {rises} %", flush=True)
    if arguments.report:
        arguments.report.write_text(json.dumps({"bits_per_byte": subject.exact, "rows": rows}, indent=2) + "\n", encoding="utf-8")


class Subject:
    """The model in fp32, its experts in compute layout, what to score, and the rows that each expert sees on the calibration text."""

    def __init__(self, checkpoint: Path, scored_bytes: int, calibration_bytes: int) -> None:
        self.model = Qwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
        self._texts = [_cut(text, 0, scored_bytes) for text in heldout_texts().values()]
        source = Checkpoint(checkpoint)
        layers = source.descriptor("shipped", "checkpoint").layers
        self.expert = layers[0].expert
        self.primaries: dict[Place, Tensors] = {
            (layer.layer, index): source.expert(layer.layer, index, self.expert.dtype) for layer in layers for index in range(layer.num_experts)
        }
        self.num_experts = layers[0].num_experts
        self.rows = self._calibration_rows([_cut(text, _CALIBRATION_START, calibration_bytes) for text in heldout_texts().values()])
        self.exact = self.score()

    def score(self) -> float:
        """Bits per byte over all domains."""
        sizes = [len(text.encode()) for text in self._texts]
        bits = sum(bits_per_byte(self.model, self._tokenizer, text) * size for text, size in zip(self._texts, sizes, strict=True))
        return bits / sum(sizes)

    def lost(self, gpu: int) -> list[int]:
        """The expert indices that a GPU holds in every layer."""
        share = self.num_experts // NUM_GPUS
        return list(range(share * gpu, share * (gpu + 1)))

    @contextmanager
    def answering(self, shadows: Mapping[Place, Tensors]) -> Iterator[None]:
        """Experts answer with other weights for a while."""
        self._write(shadows)
        try:
            yield
        finally:
            self._write({place: self.primaries[place] for place in shadows})

    @contextmanager
    def gating(self, hook: Callable[..., object]) -> Iterator[None]:
        """Gates choose differently for a while: `hook(module, arguments, output)` of every gate."""
        handles = [layer.mlp.gate.register_forward_hook(hook) for layer in self.model.model.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _write(self, experts: Mapping[Place, Tensors]) -> None:
        for (layer, index), tensors in experts.items():
            experts_of_layer = self.model.model.layers[layer].mlp.experts
            experts_of_layer.gate_up_proj.data[index] = _torch(tensors["gate_up"])
            experts_of_layer.down_proj.data[index] = _torch(tensors["down"])

    def _calibration_rows(self, texts: list[str]) -> dict[Place, Array]:
        seen: dict[Place, list[Array]] = {place: [] for place in self.primaries}

        def watch(layer: int) -> Callable[..., None]:
            def hook(_: object, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
                hidden, chosen = arguments[0], arguments[1]
                for index in range(self.num_experts):
                    seen[layer, index].append(hidden[(chosen == index).any(dim=1)].numpy().copy())

            return hook

        handles = [layer.mlp.experts.register_forward_pre_hook(watch(number)) for number, layer in enumerate(self.model.model.layers)]
        for text in texts:
            bits_per_byte(self.model, self._tokenizer, text, stride=256)
        for handle in handles:
            handle.remove()
        return {place: np.concatenate(parts) for place, parts in seen.items()}


def quality(subject: Subject, gpus: list[int]) -> Iterator[Row]:
    """Measure every codec, plain and compensated, then the plan within the budget, then the controls."""
    measured: dict[str, Shadows] = {}
    for codec in CODECS.values():
        for name, is_compensated in ((codec.name, False), (f"{codec.name} compensated", True)):
            measured[name] = {place: _shadow(subject, place, codec, is_compensated=is_compensated) for place in subject.primaries}
            yield _row(subject, gpus, name, measured[name])
    yield _row(subject, gpus, f"plan {MEMORY_FRACTION:.0%}", _planned(subject, [f"{name} compensated" for name in CODECS], measured))
    for name, hook in (("dropped", _drop), ("next best", _take_next_best)):
        rises = []
        for gpu in gpus:
            with subject.gating(hook(subject.lost(gpu))):
                rises.append(_rise_percent(subject))
        yield Row(name, 0.0, 0.0, 1.0, 0.0, tuple(rises))


def _shadow(subject: Subject, place: Place, codec: CodecRecord, *, is_compensated: bool) -> tuple[PackedExpert, Fidelity]:
    rows, primary = subject.rows[place], subject.primaries[place]
    # What compensation is fitted to is not what fidelity is measured on.
    fitted, judged = rows[::2], rows[1::2]
    packed = encode(subject.expert, primary, codec, _inputs(fitted) if is_compensated else None)
    return packed, fidelity(judged, primary, decode(packed), _forward(subject.expert))


def _row(subject: Subject, gpus: list[int], name: str, shadows: Shadows) -> Row:
    found = [each for _, each in shadows.values()]
    rises = []
    for gpu in gpus:
        lost = {place: decode(packed) for place, (packed, _) in shadows.items() if place[1] in subject.lost(gpu)}
        with subject.answering(lost):
            rises.append(_rise_percent(subject))
    memory = sum(packed.num_bytes for packed, _ in shadows.values()) / (len(subject.primaries) * subject.expert.num_bytes)
    means = (float(np.mean([each.weight_snr_db for each in found])), float(np.mean([each.relative_error for each in found])))
    return Row(name, 100 * memory, *means, float(np.mean([each.cosine for each in found])), tuple(rises))


def _planned(subject: Subject, names: list[str], measured: Mapping[str, Shadows]) -> Shadows:
    """The best codec of each expert within the budget; damage is the share of the output's power that is lost, all of it without a shadow."""
    candidates = []
    for place in subject.primaries:
        options = tuple(ShadowOption(name, measured[name][place][0].num_bytes, measured[name][place][1].relative_error ** 2) for name in names)
        candidates.append(ShadowCandidate(ExpertId("shipped", *place), subject.expert.num_bytes, float(len(subject.rows[place])), 1.0, options))
    plan = plan_shadows(candidates, MEMORY_FRACTION)
    picked = {(expert.layer, expert.index): codec for expert, codec in plan.codecs.items()}
    return {place: measured[codec][place] for place, codec in picked.items() if codec is not None}


def _rise_percent(subject: Subject) -> float:
    return 100 * (subject.score() / subject.exact - 1)


def _drop(lost: list[int]) -> Callable[..., object]:
    """The remaining weights rescaled to the sum the gate gave, as the ladder does."""

    def hook(_: object, __: object, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE, weights_TK, chosen_TK = output
        kept_TK = weights_TK * ~torch.isin(chosen_TK, torch.tensor(lost))
        scale_T1 = weights_TK.sum(dim=1, keepdim=True) / kept_TK.sum(dim=1, keepdim=True)
        return logits_TE, kept_TK * scale_T1.nan_to_num(posinf=0.0), chosen_TK

    return hook


def _take_next_best(lost: list[int]) -> Callable[..., object]:
    def hook(module: Any, _: object, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401  (a router of transformers)
        logits_TE = output[0].clone()
        logits_TE[:, lost] = -torch.inf
        weights_TK, chosen_TK = logits_TE.softmax(dim=-1).topk(module.top_k, dim=-1)
        return output[0], weights_TK / weights_TK.sum(dim=-1, keepdim=True), chosen_TK

    return hook


def _inputs(rows: Array) -> Callable[[str, Tensors], Array]:
    """The rows that reach each matrix of a SiLU-gated expert whose first matrix is already packed."""

    def inputs(name: str, before: Tensors) -> Array:
        if name == "gate_up":
            return rows
        gate, up = functional.linear(torch.from_numpy(rows), _torch(before["gate_up"])).chunk(2, dim=-1)
        hidden: Array = (functional.silu(gate) * up).numpy()
        return hidden

    return inputs


def _forward(descriptor: ExpertDescriptor) -> Callable[[Array, Tensors], Array]:
    """The cluster's own expert arithmetic, in fp32."""
    wide = descriptor.model_copy(update={"dtype": DType.FP32})

    def forward(rows: Array, tensors: Tensors) -> Array:
        weights = ExpertWeights(wide, {name: _torch(array) for name, array in tensors.items()}, 0, 0)
        output: Array = expert_forward(torch.from_numpy(rows), weights).numpy()
        return output

    return forward


def print_timings() -> None:
    """Processor time of packing and expanding one expert."""
    rng = np.random.default_rng(0)
    tensors = {name: (0.02 * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16) for name, shape in _TIMED_EXPERT.tensor_shapes().items()}
    rows = rng.standard_normal((2048, _TIMED_EXPERT.hidden_size)).astype(np.float32)
    for codec in CODECS.values():
        packed, pack_s = _timed(partial(encode, _TIMED_EXPERT, tensors, codec), 3)
        _, compensated_s = _timed(partial(encode, _TIMED_EXPERT, tensors, codec, _inputs(rows)), 1)
        _, expand_s = _timed(partial(decode, packed), 15)
        percent = 100 * packed_bytes(_TIMED_EXPERT, codec) / _TIMED_EXPERT.num_bytes
        print(f"{codec.name:5s} {percent:6.2f} %  pack {pack_s:.2f} s, compensated {compensated_s:.2f} s, expand {1e3 * expand_s:.1f} ms", flush=True)


def _timed(work: Callable[[], Result], repetitions: int) -> tuple[Result, float]:
    """The result, and the shortest processor time of some repetitions."""
    times = []
    for _ in range(repetitions):
        started_s = time.process_time()
        result = work()
        times.append(time.process_time() - started_s)
    return result, min(times)


def _cut(text: str, start: int, num_bytes: int) -> str:
    return text.encode()[start : start + num_bytes].decode(errors="ignore")


def _torch(array: Array) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))


if __name__ == "__main__":
    main()
