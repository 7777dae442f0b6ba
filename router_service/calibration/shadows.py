"""Every shadow that an expert could have, made and measured on calibration rows, and the plan that the budget allows.

Damage is the squared error that a shadow adds to its layer's outputs, each choice with the weight it was used with, as a share of the outputs' power over
all rows: usage and importance are in it. It is measured on rows that nothing was fitted to.
Shape legend: N rows of one expert, D model width, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from actors.core.codecs import CODECS, FITTED_CODECS, InputRows, PackedExpert, decode, encode, stored_descriptor
from actors.core.fidelity import Fidelity, fidelity
from actors.core.plain_forward import Array, inner_rows
from actors.expert_layouts import expert_forward
from cluster.core.descriptors import CodecRecord, ExpertDescriptor
from cluster.core.ids import ExpertId
from cluster.core.shadow_plan import ShadowCandidate, ShadowOption, ShadowPlan, plan_shadows
from cluster.registry.convert import as_dtype
from router_service.calibration.fitting import Training, distilled, narrow_start
from router_service.calibration.subject import LayerRows, Place, Subject, wide_weights

COMPENSATED = " compensated"
_RANDOM_ROWS = 64
_NARROW_TRAINING = Training(steps=1000, batch=256, rate=2e-3)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertRows:
    """The rows [N, D] that a gate sent to one expert, and the weights [N] of its outputs."""

    x_ND: torch.Tensor
    weights_N: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class MadeShadow:
    """One shadow as it was measured. `is_fitted`: its bytes cannot be made again from its primary alone."""

    packed: PackedExpert
    fidelity: Fidelity
    damage: float
    is_fitted: bool


@dataclass(frozen=True, slots=True, eq=False)
class ExpertShadows:
    """One expert: `without`, the damage while it is gone and nothing stands in; its shadows by name, those with error compensation marked so."""

    place: Place
    usage: float
    without: float
    shadows: Mapping[str, MadeShadow]


def rows_of(rows: LayerRows, index: int) -> ExpertRows:
    """The rows that chose an expert."""
    chosen_TK = rows.ids_TK == index
    is_mine_T = chosen_TK.any(dim=1)
    return ExpertRows(rows.x_TD[is_mine_T], (rows.weights_TK * chosen_TK).sum(dim=1)[is_mine_T])


def make_all(
    subject: Subject, fitted: Mapping[int, LayerRows], judged: Mapping[int, LayerRows], power: Mapping[int, float], *, without: Collection[Place] = ()
) -> Iterator[ExpertShadows]:
    """Every shadow of every expert but those of `without`. `power`: the summed squares of each layer's outputs on the judged rows."""
    for layer, index in subject.primaries:
        if (layer, index) in without:
            continue
        own, other = rows_of(fitted[layer], index), rows_of(judged[layer], index)
        yield make_shadows_of(subject, (layer, index), own, other, power[layer], len(judged[layer].x_TD))


def make_shadows_of(subject: Subject, place: Place, fitted: ExpertRows, judged: ExpertRows, layer_power: float, num_tokens: int) -> ExpertShadows:
    """The shadows of one expert, fitted to some rows and measured on others; the fitted ones only where it has rows of both kinds.

    An expert that the text never reached does no damage, but gets its rounded shadows, measured on random rows, so that a plan can cover it.
    """
    layer = subject.descriptor.layer(place[0])
    assert layer is not None  # noqa: S101  (places come from the descriptor)
    primary, wide = subject.primaries[place], wide_weights(subject, place, subject.primaries[place])
    exact_ND = expert_forward(judged.x_ND, wide)

    def damage_of(found_ND: torch.Tensor) -> float:
        return float((judged.weights_N[:, None] * (found_ND - exact_ND)).double().square().sum()) / layer_power

    def measured(packed: PackedExpert, *, is_fitted: bool) -> MadeShadow:
        restored = decode(packed)
        shadow = wide_weights(subject, place, restored)
        made = fidelity(rows, primary, restored, partial(_forward, subject, place))
        return MadeShadow(packed, made, damage_of(expert_forward(judged.x_ND, shadow)), is_fitted)

    is_reached = len(judged.x_ND) > 0 and len(fitted.x_ND) > 0
    rows = judged.x_ND.numpy() if is_reached else _random_rows(layer.expert)
    shadows = {name: measured(encode(layer.expert, primary, codec), is_fitted=False) for name, codec in CODECS.items()}
    if is_reached:
        for name, codec in CODECS.items():
            packed = encode(layer.expert, primary, codec, inputs_of(layer.expert, fitted.x_ND.numpy()))
            shadows[name + COMPENSATED] = measured(packed, is_fitted=True)
        for name, codec in FITTED_CODECS.items():
            shadows[name] = measured(_fitted(subject, place, layer.expert, codec, fitted), is_fitted=True)
    usage = len(judged.x_ND) / max(num_tokens, 1)
    return ExpertShadows(place, usage, damage_of(torch.zeros_like(exact_ND)), shadows)


def _random_rows(expert: ExpertDescriptor) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((_RANDOM_ROWS, expert.hidden_size)).astype(np.float32)


def inputs_of(expert: ExpertDescriptor, rows_ND: Array) -> InputRows:
    """The rows that reach each matrix of an expert whose first matrix is already packed."""

    def inputs(name: str, before: Mapping[str, Array]) -> Array:
        if name != "down":
            return rows_ND
        first = next(key for key in before if not key.endswith("_bias"))
        # The bias of the first matrix is stored after `down`; what compensation needs of its inputs hardly depends on it.
        biases = {f"{first}_bias": before[f"{first}_bias"]} if f"{first}_bias" in before else {}
        narrow = expert.model_copy(update={"intermediate_size": before[first].shape[0] // (2 if expert.gated else 1)})
        return inner_rows(narrow, rows_ND, {first: before[first], **biases})

    return inputs


def _fitted(subject: Subject, place: Place, expert: ExpertDescriptor, codec: CodecRecord, rows: ExpertRows) -> PackedExpert:
    tensors = subject.primaries[place]
    if codec.inner_percent:
        wide = wide_weights(subject, place, tensors)
        narrow = stored_descriptor(expert, codec)
        start = narrow_start(wide.descriptor, wide.tensors, rows.x_ND, narrow.intermediate_size)
        trained = distilled(wide.descriptor, start, rows.x_ND, expert_forward(rows.x_ND, wide), rows.weights_N.square(), _NARROW_TRAINING)
        tensors = {name: as_dtype(tensor.numpy(), expert.dtype, name) for name, tensor in trained.items()}
    return encode(expert, tensors, codec, inputs_of(expert, rows.x_ND.numpy()))


def _forward(subject: Subject, place: Place, rows: Array, tensors: Mapping[str, Array]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = expert_forward(torch.from_numpy(rows), wide_weights(subject, place, tensors)).numpy()
    return found


def planned(made: Sequence[ExpertShadows], descriptor_of: Callable[[Place], ExpertDescriptor], memory_fraction: float, names: Sequence[str]) -> ShadowPlan:
    """The best of these shadows for each expert within the budget."""
    candidates = []
    for expert in made:
        options = [ShadowOption(name, shadow.packed.num_bytes, shadow.damage) for name, shadow in expert.shadows.items() if name in names]
        finite = tuple(option for option in options if np.isfinite(option.damage))
        candidates.append(ShadowCandidate(ExpertId("calibrated", *expert.place), descriptor_of(expert.place).num_bytes, 1.0, expert.without, finite))
    return plan_shadows(candidates, memory_fraction)
