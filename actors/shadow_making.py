"""Shadows as the store makes them: planned once, where a model is imported, and packed again to the same bytes on every node that is to hold some.

Those made here round each weight to the nearest: nothing is fitted to anybody's data, so the primary's bytes and the codec alone decide the shadow's. Better
ones, fitted to calibration rows, come ready in a ladder file, with the damage that each codec does to each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from actors.core.codecs import CODECS, PackedExpert, decode, encode
from actors.core.fidelity import Fidelity, fidelity
from actors.core.plain_forward import plain_forward
from actors.expert_blob import Array, digest_of, encode_shadow
from actors.ladder_blobs import LadderBlobs
from cluster.core.descriptors import ExpertDescriptor, Manifest, ShadowRecord
from cluster.core.errors import CheckpointError
from cluster.core.ids import ExpertId
from cluster.core.ladder_record import SHIPPED, WITHOUT
from cluster.core.shadow_plan import ShadowCandidate, ShadowOption, plan_shadows
from cluster.core.spec import ShadowSpec

Tensors = Mapping[str, Array]
ReadExpert = Callable[[ExpertId], Tensors]
Parts = tuple[bytes | memoryview, ...]

MEASURED_ROWS = 64
KEPT_BYTES = 256 << 20
"""Candidates are kept up to here until the plan is made; those beyond it that the plan picks are packed a second time."""
_ROWS_SEED = 20_25
_MEASURED_DIGITS = 6
_REMEDY = "give every node the same release, numpy and checkpoint folder with its ladder file, or import the model again"


class _Measured(Protocol):
    """How well a shadow stands for its primary, whoever measured it."""

    @property
    def relative_error(self) -> float: ...

    @property
    def cosine(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Shadow:
    """One shadow, ready to be stored under its digest."""

    digest: str
    parts: Parts
    num_bytes: int


def make_shadows(
    manifest: Manifest,
    spec: ShadowSpec,
    read: ReadExpert,
    put: Callable[[str, Parts], None],
    progress: Callable[[int], None],
    ladder: LadderBlobs | None = None,
) -> dict[str, ShadowRecord]:
    """Measure every codec on every expert, plan within the budget, store what the plan picks; the records by `LAYER/INDEX`.

    Damage is what the ladder's calibration measured, with the usage in it; without a ladder, the share of an expert's output that is lost on random rows, and
    usage is taken as uniform. `progress` is told how many experts are measured.
    Raises CheckpointError, naming the expert, when one cannot be packed; ConfigError for a budget that cannot be planned with.
    """
    kept: dict[tuple[ExpertId, str], PackedExpert] = {}
    measured: dict[tuple[ExpertId, str], _Measured] = {}
    candidates = []
    room = KEPT_BYTES
    for done, (expert, descriptor) in enumerate(_experts(manifest), start=1):
        damages = {} if ladder is None else ladder.record.damage.get(_key(expert), {})
        without = damages.get(WITHOUT, 1.0)
        options = []
        for codec, (packed, found) in _candidates(expert, descriptor, read, spec, ladder).items():
            measured[expert, codec] = found
            if np.isfinite(found.relative_error):
                options.append(ShadowOption(codec, packed.num_bytes, damages.get(codec, without * found.relative_error**2)))
            if packed.num_bytes <= room:
                kept[expert, codec], room = packed, room - packed.num_bytes
        candidates.append(ShadowCandidate(expert, descriptor.num_bytes, 1.0, without, tuple(options)))
        progress(done)
    plan = plan_shadows(candidates, spec.memory_fraction, spec.cover)
    records = {}
    for expert, descriptor in _experts(manifest):
        picked = plan.codecs[expert]
        if picked is not None:
            again = kept.pop((expert, picked), None) or _again(expert, descriptor, read, ladder, picked)
            shadow = _stored_form(again, manifest.experts[_key(expert)])
            put(shadow.digest, shadow.parts)
            records[_key(expert)] = _record(shadow, again.codec.name, measured[expert, picked])
    return records


def _candidates(
    expert: ExpertId, descriptor: ExpertDescriptor, read: ReadExpert, spec: ShadowSpec, ladder: LadderBlobs | None
) -> dict[str, tuple[PackedExpert, _Measured]]:
    """The shadows that an expert may get, and how they were measured: one of each codec that is asked for, and the ladder's."""
    tensors = read(expert)
    found: dict[str, tuple[PackedExpert, _Measured]] = {}
    for codec in spec.codecs:
        if codec in CODECS:
            packed = _pack(expert, descriptor, tensors, codec)
            found[codec] = packed, _measure(descriptor, tensors, packed)
    shipped = ladder and ladder.shadow(_key(expert), descriptor)
    if shipped and shipped[0].codec.name in spec.codecs:
        found[SHIPPED] = shipped[1], shipped[0]
    return found


def _again(expert: ExpertId, descriptor: ExpertDescriptor, read: ReadExpert, ladder: LadderBlobs | None, picked: str) -> PackedExpert:
    shipped = ladder.shadow(_key(expert), descriptor) if ladder is not None and picked == SHIPPED else None
    return shipped[1] if shipped else _pack(expert, descriptor, read(expert), picked)


def remake_shadow(manifest: Manifest, expert: ExpertId, read: ReadExpert, ladder: LadderBlobs | None = None) -> Shadow:
    """The shadow that a manifest lists for an expert: the ladder's, if that is it, else made of the primary's tensors.

    Raises CheckpointError when it does not come out as listed.
    """
    key = _key(expert)
    layer_of_it = manifest.model.layer(expert.layer)
    shipped = ladder.shadow(key, layer_of_it.expert) if ladder is not None and layer_of_it is not None else None
    if shipped is not None:
        stored = _stored_form(shipped[1], manifest.experts[key])
        if stored.digest == manifest.shadows[key].version:
            return stored
    return _rounded_again(manifest, expert, key, read)


def _rounded_again(manifest: Manifest, expert: ExpertId, key: str, read: ReadExpert) -> Shadow:
    record, layer = manifest.shadows[key], manifest.model.layer(expert.layer)
    if layer is None or record.codec not in CODECS:
        message = f"the manifest of {manifest.model.name} lists a shadow of {key} that cannot be made here ({record.codec}); {_REMEDY}"
        raise CheckpointError(message)
    shadow = _stored_form(_pack(expert, layer.expert, read(expert), record.codec), manifest.experts[key])
    if shadow.digest != record.version:
        message = f"shadow of expert {key} ({record.codec}) has SHA-256 {shadow.digest[:12]} here, but the manifest says {record.version[:12]}; {_REMEDY}"
        raise CheckpointError(message)
    return shadow


def _experts(manifest: Manifest) -> Iterator[tuple[ExpertId, ExpertDescriptor]]:
    for layer in manifest.model.layers:
        for index in range(layer.num_experts):
            yield ExpertId(manifest.model.name, layer.layer, index), layer.expert


def _pack(expert: ExpertId, descriptor: ExpertDescriptor, tensors: Tensors, codec: str) -> PackedExpert:
    try:
        return encode(descriptor, tensors, CODECS[codec])
    except CheckpointError as error:
        message = f"shadow of expert {_key(expert)}: {error}"
        raise CheckpointError(message) from error


def _measure(descriptor: ExpertDescriptor, tensors: Tensors, packed: PackedExpert) -> Fidelity:
    rows_ND = np.random.default_rng(_ROWS_SEED).standard_normal((MEASURED_ROWS, descriptor.hidden_size)).astype(np.float32)
    return fidelity(rows_ND, tensors, decode(packed), lambda rows, weights: plain_forward(descriptor, rows, weights))


def _stored_form(packed: PackedExpert, primary: str) -> Shadow:
    parts = encode_shadow(packed, primary)
    return Shadow(digest_of(parts), parts, packed.num_bytes)


def _record(shadow: Shadow, codec: str, measured: _Measured) -> ShadowRecord:
    error, cosine = round(measured.relative_error, _MEASURED_DIGITS), round(measured.cosine, _MEASURED_DIGITS)
    return ShadowRecord(version=shadow.digest, codec=codec, num_bytes=shadow.num_bytes, relative_error=error, cosine=cosine)


def _key(expert: ExpertId) -> str:
    return f"{expert.layer}/{expert.index}"
