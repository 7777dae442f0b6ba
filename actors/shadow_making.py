"""Shadows as the store makes them: planned once, where a model is imported, and packed again to the same bytes on every node that is to hold some.

Each weight is rounded to the nearest: nothing is fitted to anybody's data, so the primary's bytes and the codec alone decide the shadow's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from actors.core.codecs import CODECS, PackedExpert, decode, encode
from actors.core.fidelity import Fidelity, fidelity
from actors.core.plain_forward import plain_forward
from actors.expert_blob import Array, digest_of, encode_shadow
from cluster.core.descriptors import ExpertDescriptor, Manifest, ShadowRecord
from cluster.core.errors import CheckpointError
from cluster.core.ids import ExpertId
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


@dataclass(frozen=True, slots=True)
class Shadow:
    """One shadow, ready to be stored under its digest."""

    digest: str
    parts: Parts
    num_bytes: int


def make_shadows(
    manifest: Manifest, spec: ShadowSpec, read: ReadExpert, put: Callable[[str, Parts], None], progress: Callable[[int], None]
) -> dict[str, ShadowRecord]:
    """Measure every codec on every expert, plan within the budget, store what the plan picks; the records by `LAYER/INDEX`.

    Usage is taken as uniform, and damage as the share of an expert's output that is lost on random rows. `progress` is told how many experts are measured.
    Raises CheckpointError, naming the expert, when one cannot be packed; ConfigError for a budget that cannot be planned with.
    """
    kept: dict[tuple[ExpertId, str], PackedExpert] = {}
    measured: dict[tuple[ExpertId, str], Fidelity] = {}
    candidates = []
    room = KEPT_BYTES
    for done, (expert, descriptor) in enumerate(_experts(manifest), start=1):
        tensors = read(expert)
        options = []
        for codec in spec.codecs:
            packed = _pack(expert, descriptor, tensors, codec)
            found = measured[expert, codec] = _measure(descriptor, tensors, packed)
            if np.isfinite(found.relative_error):
                options.append(ShadowOption(codec, packed.num_bytes, found.relative_error**2))
            if packed.num_bytes <= room:
                kept[expert, codec], room = packed, room - packed.num_bytes
        candidates.append(ShadowCandidate(expert, descriptor.num_bytes, 1.0, 1.0, tuple(options)))
        progress(done)
    plan = plan_shadows(candidates, spec.memory_fraction, spec.cover)
    records = {}
    for expert, descriptor in _experts(manifest):
        picked = plan.codecs[expert]
        if picked is not None:
            again = kept.pop((expert, picked), None) or _pack(expert, descriptor, read(expert), picked)
            shadow = _stored_form(again, manifest.experts[_key(expert)])
            put(shadow.digest, shadow.parts)
            records[_key(expert)] = _record(shadow, picked, measured[expert, picked])
    return records


def remake_shadow(manifest: Manifest, expert: ExpertId, tensors: Tensors) -> Shadow:
    """The shadow that a manifest lists for an expert, from its primary's tensors. Raises CheckpointError when it does not come out as listed."""
    key = _key(expert)
    record, layer = manifest.shadows[key], manifest.model.layer(expert.layer)
    if layer is None or record.codec not in CODECS:
        message = f"the manifest of {manifest.model.name} lists a shadow of {key} that cannot be made here ({record.codec}); import the model again"
        raise CheckpointError(message)
    shadow = _stored_form(_pack(expert, layer.expert, tensors, record.codec), manifest.experts[key])
    if shadow.digest != record.version:
        message = (
            f"shadow of expert {key} ({record.codec}) has SHA-256 {shadow.digest[:12]} here, but the manifest says {record.version[:12]};"
            " run the same release with the same numpy on every node"
        )
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


def _record(shadow: Shadow, codec: str, measured: Fidelity) -> ShadowRecord:
    error, cosine = round(measured.relative_error, _MEASURED_DIGITS), round(measured.cosine, _MEASURED_DIGITS)
    return ShadowRecord(version=shadow.digest, codec=codec, num_bytes=shadow.num_bytes, relative_error=error, cosine=cosine)


def _key(expert: ExpertId) -> str:
    return f"{expert.layer}/{expert.index}"
