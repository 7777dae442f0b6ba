"""What it costs to lose a GPU: held-out bits per byte of the shipped model with the experts of one GPU of four answered by their shadows, or by nobody.

    python -m examples.shadow_quality --text FILE...     calibrate on FILEs (training text, never the held-out one), score the committed held-out samples

GPU g of the four holds experts 2g and 2g + 1 of every layer. Beside every codec stand its memory and the error of its outputs; the rows "as shipped" are
what a node makes of the checkpoint and the ladder file beside it; below them are the lower rungs, and the controls: the experts dropped, and their tokens
sent to the next best. `--by-expert FOLDER` scores the loss of each single expert in each codec instead (`examples.shadow_experts`), and `--timings` measures
packing and expanding one 512x2048 gated expert, in processor time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from actors.core.codecs import CODECS, FITTED_CODECS, PackedExpert, decode, encode, packed_bytes
from actors.expert_layouts import ExpertWeights
from actors.expert_store import ExpertStore
from cluster.core.descriptors import ExpertDescriptor
from cluster.core.spec import ShadowSpec
from examples.shadow_experts import Progress, write_report
from examples.tiny_moe_lm.export import CHECKPOINT
from examples.tiny_moe_lm.scoring import heldout_texts
from router_service.calibration.lower_rungs import targets_of
from router_service.calibration.run import HELD_SHARE, NUM_GPUS
from router_service.calibration.shadows import ExpertShadows, inputs_of, make_all, planned
from router_service.calibration.subject import Loss, Place, Subject, wide_weights
from router_service.core.ladder import Compute
from router_service.models import load_model

Weights = Mapping[Place, ExpertWeights]
Result = TypeVar("Result")

FRACTIONS = (0.10, 0.15, 0.20, 0.25)
LADDERS = (
    ("fewer_experts",),
    ("fewer_experts", "generalist"),
    ("fewer_experts", "dense"),
    ("generalist",),
    ("dense",),
)
_TIMED_EXPERT = ExpertDescriptor(hidden_size=512, intermediate_size=2048)


@dataclass(frozen=True)
class Row:
    """One way to do without a GPU: memory in percent of the primaries', means over experts, and the rise of bits per byte by lost GPU."""

    name: str
    kind: str
    memory_percent: float
    relative_error: float | None
    cosine: float | None
    bits_per_byte_percent: tuple[float, ...]


def main() -> None:
    """Print one table, and write it as JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="text to calibrate on; without, only what is shipped is measured")
    parser.add_argument("--bytes", type=int, default=24_000, help="bytes of each held-out sample to score")
    parser.add_argument("--rows", type=int, default=24_576, help="tokens to calibrate on")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--by-expert", type=Path, metavar="FOLDER", help="lose one expert at a time instead, and write by_expert.* there; needs --text")
    parser.add_argument("--timings", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.timings:
        print_timings()
        return
    scored = [_start(text.encode(), arguments.bytes) for text in heldout_texts().values()]
    study = Study(Subject(arguments.checkpoint), scored)
    print(f"held-out bits per byte without a loss: {study.exact:.4f}")
    calibration = [_start(path.read_bytes()[: 8 * arguments.rows], 8 * arguments.rows) for path in arguments.text]
    scored_bytes = sum(len(text.encode()) for text in scored)
    if arguments.by_expert is not None:
        if not calibration:
            parser.error("--by-expert needs --text: most codecs are fitted to calibration rows")
        facts = {"bits_per_byte": study.exact, "scored_bytes": scored_bytes, "calibration_rows": arguments.rows}
        done = Progress(arguments.by_expert, facts)
        write_report(done, study, _made(study.subject, calibration, arguments.rows, without=done.usage))
        return
    rows = []
    for row in quality(study, arguments.checkpoint, calibration, arguments.rows):
        rows.append(asdict(row))
        rises = " ".join(f"{rise:+8.3f}" for rise in row.bits_per_byte_percent)
        print(f"{row.name:32s} {row.memory_percent:6.2f} %  {rises} %  mean {np.mean(row.bits_per_byte_percent):+8.3f} %", flush=True)
    if arguments.report:
        facts = {"bits_per_byte": study.exact, "scored_bytes": scored_bytes, "rows": rows}
        arguments.report.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


class Study:
    """A subject and what it is scored on."""

    def __init__(self, subject: Subject, scored: list[str]) -> None:
        self.subject = subject
        self._scored = scored
        self.exact = subject.bits_per_byte(scored)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all primaries."""
        sizes = {entry.layer: entry.expert.num_bytes for entry in self.subject.descriptor.layers}
        return sum(sizes[layer] for layer, _ in self.subject.primaries)

    def rises(self, loss_of: Callable[[list[Place]], Loss]) -> tuple[float, ...]:
        """How much more bits per byte, in percent, with each GPU lost in turn."""
        return tuple(self.rise(loss_of(self.subject.lost_with_gpu(gpu, NUM_GPUS))) for gpu in range(NUM_GPUS))

    def rise(self, loss: Loss) -> float:
        """How much more bits per byte, in percent, with one loss."""
        return 100 * (self.subject.bits_per_byte(self._scored, loss) / self.exact - 1)

    def shadowed(self, weights: Weights) -> tuple[float, ...]:
        """The same with shadows in the lost experts' places; an expert without one is left out, as the first lower rung does."""

        def loss_of(places: list[Place]) -> Loss:
            answered = {place: weights[place] for place in places if place in weights}
            return Loss(instead=answered, lost=[place for place in places if place not in answered], rungs=("fewer_experts",))

        return self.rises(loss_of)


def quality(study: Study, checkpoint: Path, texts: Sequence[str], num_rows: int) -> Iterator[Row]:
    """The controls, what is shipped, every codec, and plans within budgets."""
    yield Row("dropped", "control", 0.0, 1.0, 0.0, study.rises(lambda places: Loss(lost=places, rungs=("fewer_experts",))))
    yield Row("next best", "control", 0.0, None, None, _next_best_rises(study))
    yield from _shipped(study, checkpoint)
    if not texts:
        return
    made = list(_made(study.subject, texts, num_rows))
    names = [*(f"{name}{suffix}" for name in CODECS for suffix in ("", " compensated")), *FITTED_CODECS]
    for name in names:
        yield _codec_row(study, name, "codec", {expert.place: name for expert in made}, made)
    plain = [name for name in CODECS if name != "int8"]
    for kind, offered in (("plan", names), ("plan, nothing fitted", plain)):
        for fraction in FRACTIONS:
            plan = planned(made, lambda place: _expert_of(study.subject, place), fraction, offered)
            picks = {(expert.layer, expert.index): codec for expert, codec in plan.codecs.items() if codec is not None}
            yield _codec_row(study, f"{kind} {fraction:.0%}", kind, picks, made)


def _shipped(study: Study, checkpoint: Path) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        store = ExpertStore(Path(folder))
        manifest = store.import_model(checkpoint, name="shipped", shadow=ShadowSpec())
        weights: dict[Place, ExpertWeights] = {}
        for key, record in manifest.shadows.items():
            place = (int(key.split("/")[0]), int(key.split("/")[1]))
            weights[place] = wide_weights(study.subject, place, _restored(store, record.version))
        errors, cosines = ([getattr(record, name) for record in manifest.shadows.values()] for name in ("relative_error", "cosine"))
        memory = 100 * sum(record.num_bytes for record in manifest.shadows.values()) / study.memory_bytes
        yield Row("shadows as shipped, 15%", "shipped", memory, float(np.mean(errors)), float(np.mean(cosines)), study.shadowed(weights))
        layers = load_model(store, manifest.digest).layers
        compute: dict[int, Compute] = {layer: partial(_served, served.fallbacks) for layer, served in layers.items() if served.fallbacks}
        sizes = {rung: sum(store.num_bytes(digest) for key, digest in manifest.ladder.items() if key.startswith(rung)) for rung in ("generalist", "dense")}
        for rungs in LADDERS[1:] if compute else ():
            rises = study.rises(partial(_lost_to, rungs, compute))
            yield Row(", then ".join(rungs), "ladder", 100 * sizes[rungs[-1]] / study.memory_bytes, None, None, rises)


def _lost_to(rungs: tuple[str, ...], compute: Mapping[int, Compute], places: list[Place]) -> Loss:
    return Loss(lost=places, rungs=rungs, compute=compute)


def _served(fallbacks: Any, rung: str, x_ND: Tensor) -> Tensor:  # noqa: ANN401  (a layer's Fallbacks)
    """As a router computes it, in the served type."""
    output: Tensor = fallbacks.compute(rung, x_ND.bfloat16()).float()
    return output


def _restored(store: ExpertStore, version: str) -> dict[str, Any]:
    blob = store.open(version)
    assert blob.codec is not None  # noqa: S101  (a shadow has one)
    assert isinstance(blob.descriptor, ExpertDescriptor)  # noqa: S101
    return decode(PackedExpert(blob.descriptor, blob.codec, blob.tensors))


def _made(subject: Subject, texts: Sequence[str], num_rows: int, without: Collection[Place] = ()) -> Iterator[ExpertShadows]:
    rows = subject.rows(texts, num_rows, context=256)
    fitted, judged = (dict(zip(rows, parts, strict=True)) for parts in zip(*(layer.split(HELD_SHARE) for layer in rows.values()), strict=True))
    power = {layer: float(targets_of(subject, layer, seen).output_TD.double().square().sum()) for layer, seen in judged.items()}
    return make_all(subject, fitted, judged, power, without=without)


def _codec_row(study: Study, name: str, kind: str, picks: Mapping[Place, str], made: Sequence[ExpertShadows]) -> Row:
    shadows = {expert.place: expert.shadows[picks[expert.place]] for expert in made if expert.place in picks}
    weights = {place: wide_weights(study.subject, place, decode(shadow.packed)) for place, shadow in shadows.items()}
    memory = 100 * sum(shadow.packed.num_bytes for shadow in shadows.values()) / study.memory_bytes
    errors = float(np.mean([shadow.fidelity.relative_error for shadow in shadows.values()]))
    return Row(name, kind, memory, errors, float(np.mean([shadow.fidelity.cosine for shadow in shadows.values()])), study.shadowed(weights))


def _next_best_rises(study: Study) -> tuple[float, ...]:
    rises = []
    for gpu in range(NUM_GPUS):
        indices = sorted({index for _, index in study.subject.lost_with_gpu(gpu, NUM_GPUS)})
        with _gating(study.subject.model, _take_next_best(indices)):
            rises.append(study.rise(Loss()))
    return tuple(rises)


@contextmanager
def _gating(model: Any, hook: Callable[..., object]) -> Iterator[None]:  # noqa: ANN401  (a model of transformers)
    """Gates choose differently for a while: `hook(module, arguments, output)` of every gate."""
    handles = [layer.mlp.gate.register_forward_hook(hook) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _take_next_best(lost: list[int]) -> Callable[..., object]:
    def hook(module: Any, _: object, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401  (a router of transformers)
        logits_TE = output[0].clone()
        logits_TE[:, lost] = -torch.inf
        weights_TK, chosen_TK = logits_TE.softmax(dim=-1).topk(module.top_k, dim=-1)
        return output[0], weights_TK / weights_TK.sum(dim=-1, keepdim=True), chosen_TK

    return hook


def _expert_of(subject: Subject, place: Place) -> ExpertDescriptor:
    return next(entry.expert for entry in subject.descriptor.layers if entry.layer == place[0])


def print_timings() -> None:
    """Processor time of packing and expanding one expert."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2048, _TIMED_EXPERT.hidden_size)).astype(np.float32)
    for codec in (*CODECS.values(), *(codec for codec in FITTED_CODECS.values() if not codec.inner_percent)):
        tensors = {name: (0.02 * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16) for name, shape in _TIMED_EXPERT.tensor_shapes().items()}
        packed, pack_s = _timed(partial(encode, _TIMED_EXPERT, tensors, codec), 2)
        _, compensated_s = _timed(partial(encode, _TIMED_EXPERT, tensors, codec, inputs_of(_TIMED_EXPERT, rows)), 1)
        _, expand_s = _timed(partial(decode, packed), 15)
        percent = 100 * packed_bytes(_TIMED_EXPERT, codec) / _TIMED_EXPERT.num_bytes
        print(f"{codec.name:12s} {percent:6.2f} %  pack {pack_s:.2f} s, fitted {compensated_s:.2f} s, expand {1e3 * expand_s:.1f} ms", flush=True)


def _timed(work: Callable[[], Result], repetitions: int) -> tuple[Result, float]:
    """The result, and the shortest processor time of some repetitions."""
    times = []
    for _ in range(repetitions):
        started_s = time.process_time()
        result = work()
        times.append(time.process_time() - started_s)
    return result, min(times)


def _start(raw: bytes, num_bytes: int) -> str:
    return raw[:num_bytes].decode(errors="ignore")


if __name__ == "__main__":
    main()
