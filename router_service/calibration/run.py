"""`moelastic checkpoint calibrate`: run a checkpoint on text, fit what stands in for its experts, measure every rung, write the ladder file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.expert_blob import digest_of, encode
from cluster.core.descriptors import ExpertDescriptor
from cluster.core.errors import ConfigError
from cluster.core.ids import ExpertId
from cluster.core.ladder_record import SHIPPED, WITHOUT, LadderRecord, LadderShadow, RungRecord
from cluster.core.shadow_plan import ShadowPlan
from cluster.registry.ladder_file import write_ladder
from router_service.calibration.fitting import Training
from router_service.calibration.lower_rungs import LowerRungs, fit_lower_rungs, targets_of
from router_service.calibration.shadows import ExpertShadows, make_all, planned
from router_service.calibration.subject import LayerRows, Loss, Subject

NUM_GPUS = 4
HELD_SHARE = 0.2
_DIGITS = 6
LOWER_RUNGS = ("fewer_experts", "generalist", "dense")

Say = Callable[[str], None]
Arrays = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Options:
    """Bounds of a calibration."""

    memory_fraction: float = 0.15
    max_rows: int = 16_384
    scored_bytes: int = 24_000
    context: int = 256
    training: Training = field(default_factory=lambda: Training(steps=3000))


@dataclass(frozen=True, slots=True, eq=False)
class Calibrated:
    """Everything that was fitted and measured, before it is written."""

    lower: Mapping[int, LowerRungs]
    shadows: Sequence[ExpertShadows]
    plan: ShadowPlan
    rungs: Mapping[str, RungRecord]
    bits_per_byte: float
    num_rows: int


def calibrate(folder: Path, texts: Sequence[str], options: Options, say: Say) -> Path:
    """Fit on the first part of each text, score on its end, write `moelastic.ladder.safetensors` beside the checkpoint; returns its path.

    Raises CheckpointError, or ConfigError for a model that cannot be run on text or text that is too short.
    """
    subject = Subject(folder)
    used, scored = split_texts(texts, options.scored_bytes)
    found = measure(subject, used, scored, options, say)
    record, tensors = _record(subject, found)
    path = write_ladder(folder, record, tensors)
    say(f"{path.name}: {path.stat().st_size} bytes; suggested ladder: shadow, {', '.join(record.order)}")
    return path


def measure(subject: Subject, used: Sequence[str], scored: Sequence[str], options: Options, say: Say) -> Calibrated:
    """Collect rows, fit, measure."""
    rows = subject.rows(used, options.max_rows, context=options.context)
    num_rows = min(len(layer.x_TD) for layer in rows.values())
    say(f"{num_rows} rows of each layer; the last {HELD_SHARE:.0%} judge what the others fit")
    fitted, judged = (dict(zip(rows, parts, strict=True)) for parts in zip(*(layer.split(HELD_SHARE) for layer in rows.values()), strict=True))
    lower, power = _lower_rungs(subject, fitted, judged, options, say)
    shadows = []
    for expert in make_all(subject, fitted, judged, power):
        shadows.append(expert)
        if expert.place[1] == 0:
            say(f"layer {expert.place[0]}: shadows of {_num_experts(subject, expert.place[0])} experts")
    names = sorted({name for expert in shadows for name in expert.shadows})
    plan = planned(shadows, lambda place: _expert_of(subject, place[0]), options.memory_fraction, names)
    share = plan.num_bytes / sum(_expert_of(subject, layer).num_bytes for layer, _ in subject.primaries)
    say(f"shadows within {options.memory_fraction:.0%}: {share:.2%}, damage {plan.damage:.4g} of {plan.damage_without:.4g}")
    exact = subject.bits_per_byte(scored, context=options.context)
    say(f"bits per byte of held-out text: {exact:.4f}")
    rungs = {name: _measured_rung(subject, scored, exact, lower, name, options) for name in LOWER_RUNGS}
    for name, record in rungs.items():
        rises = ", ".join(f"{rise:+.2f} %" for rise in record.rises_percent)
        say(f"{name}: {rises} with one GPU of {NUM_GPUS} lost; {record.num_bytes} bytes")
    return Calibrated(lower, shadows, plan, rungs, exact, num_rows)


def _lower_rungs(
    subject: Subject, fitted: Mapping[int, LayerRows], judged: Mapping[int, LayerRows], options: Options, say: Say
) -> tuple[dict[int, LowerRungs], dict[int, float]]:
    """The fallbacks of every layer, and the power of its outputs on the judged rows."""
    lower, power = {}, {}
    for entry in subject.descriptor.layers:
        targets = targets_of(subject, entry.layer, judged[entry.layer])
        lower[entry.layer] = fit_lower_rungs(entry, targets_of(subject, entry.layer, fitted[entry.layer]), targets, options.training)
        power[entry.layer] = float(targets.output_TD.double().square().sum()) or 1.0
        errors = ", ".join(f"{rung} {error:.3f}" for rung, error in lower[entry.layer].relative_errors.items())
        say(f"layer {entry.layer}: relative error of {errors}")
    return lower, power


def rung_loss(subject: Subject, lower: Mapping[int, LowerRungs], gpu: int, rungs: Sequence[str]) -> Loss:
    """One GPU of four is gone, its experts have no copy, and these rungs stand in."""
    return Loss(lost=subject.lost_with_gpu(gpu, NUM_GPUS), rungs=rungs, compute={layer: found.compute for layer, found in lower.items()})


def _measured_rung(subject: Subject, scored: Sequence[str], exact: float, lower: Mapping[int, LowerRungs], rung: str, options: Options) -> RungRecord:
    # Where a token lost all its choices, fewer experts fall to the better of the two others; alone they would be measured without an answer.
    rungs = (rung,) if rung != "fewer_experts" else (rung, "generalist")
    rises = []
    for gpu in range(NUM_GPUS):
        worse = subject.bits_per_byte(scored, rung_loss(subject, lower, gpu, rungs), context=options.context)
        rises.append(round(100 * (worse / exact - 1), _DIGITS))
    if rung == "fewer_experts":
        return RungRecord(rises_percent=tuple(rises))
    errors = [found.relative_errors[rung] for found in lower.values()]
    num_bytes = sum(array.nbytes for found in lower.values() for array in found.tensors[rung].values())
    return RungRecord(relative_error=round(float(np.mean(errors)), _DIGITS), num_bytes=num_bytes, rises_percent=tuple(rises))


def _record(subject: Subject, found: Calibrated) -> tuple[LadderRecord, Arrays]:
    tensors: Arrays = {}
    for layer, lower in found.lower.items():
        for rung, arrays in lower.tensors.items():
            tensors |= {f"{rung}.{layer}.{name}": array for name, array in arrays.items()}
    shipped, usage, damage = {}, {}, {}
    for expert in found.shadows:
        key, dotted = _key(expert.place), _key(expert.place).replace("/", ".")
        usage[key] = round(expert.usage, _DIGITS)
        table = {name: shadow.damage for name, shadow in expert.shadows.items() if not shadow.is_fitted}
        picked = found.plan.codecs[ExpertId("calibrated", *expert.place)]
        if picked is not None and expert.shadows[picked].is_fitted:
            shadow = expert.shadows[picked]
            table[SHIPPED] = shadow.damage
            error, cosine = round(shadow.fidelity.relative_error, _DIGITS), round(shadow.fidelity.cosine, _DIGITS)
            shipped[key] = LadderShadow(codec=shadow.packed.codec, relative_error=error, cosine=cosine)
            tensors |= {f"shadow.{dotted}.{name}": array for name, array in shadow.packed.tensors.items()}
        damage[key] = {name: _rounded(value) for name, value in {WITHOUT: expert.without, **table}.items()}
    record = LadderRecord(
        dtype=subject.descriptor.dtype,
        experts={_key(place): digest_of(encode(_expert_of(subject, place[0]), arrays)) for place, arrays in subject.primaries.items()},
        generalists={str(layer): lower.generalist for layer, lower in found.lower.items()},
        dense=tuple(found.lower),
        shadows=shipped,
        usage=usage,
        damage=damage,
        rungs=dict(found.rungs),
        order=tuple(sorted(found.rungs, key=lambda name: found.rungs[name].damage)),
        bits_per_byte=round(found.bits_per_byte, _DIGITS),
        num_rows=found.num_rows,
    )
    return record, tensors


def split_texts(texts: Sequence[str], scored_bytes: int) -> tuple[list[str], list[str]]:
    """What to run on, and the end of each text, to score. Raises ConfigError when nothing would be left."""
    share = scored_bytes // max(len(texts), 1)
    used, scored = [], []
    for text in texts:
        raw = text.encode()
        if len(raw) < 2 * share:
            message = f"--text: a file of {len(raw)} bytes is too short; {2 * share} are needed of each, half of them to score"
            raise ConfigError(message)
        used.append(raw[:-share].decode(errors="ignore"))
        scored.append(raw[-share:].decode(errors="ignore"))
    return used, scored


def _expert_of(subject: Subject, layer: int) -> ExpertDescriptor:
    return next(entry.expert for entry in subject.descriptor.layers if entry.layer == layer)


def _num_experts(subject: Subject, layer: int) -> int:
    return sum(1 for place, _ in subject.primaries if place == layer)


def _key(place: tuple[int, int]) -> str:
    return f"{place[0]}/{place[1]}"


def _rounded(value: float) -> float:
    """Six significant digits: the same file however sums were ordered."""
    return float(f"{value:.6g}")


def prepare_threads() -> None:
    """One torch thread: results do not depend on how many cores there are."""
    torch.set_num_threads(1)
