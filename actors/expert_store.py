"""The node-local expert store: what actors and routers serve from, never the user's file.

A checkpoint is read while it is imported and never again; each expert and gate is converted once to compute layout and named by its SHA-256
(`blob_files`, `expert_blob`). A manifest says which digests make a model:

    ROOT/manifests/<sha256>.json   canonical JSON of a Manifest

A ladder file beside the checkpoint (`cluster.registry.ladder_file`) is imported with it: its fallbacks and shadows become blobs too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from actors.blob_files import BlobFiles, Parts, StoredBlob, write_all
from actors.expert_blob import Array, digest_of, encode
from actors.ladder_blobs import LadderBlobs
from actors.shadow_making import make_shadows, remake_shadow
from cluster.core.descriptors import DType, LayerDescriptor, Manifest, ModelDescriptor
from cluster.core.errors import CheckpointError, NotFound
from cluster.core.ids import ExpertId
from cluster.core.spec import ShadowSpec
from cluster.registry.checkpoint import MANIFEST_FILE, Checkpoint
from cluster.registry.ladder_file import LADDER_FILE, Ladder
from cluster.registry.tensor_files import read_json

__all__ = ["ExpertStore", "StoredBlob", "write_manifest"]

Progress = Callable[[int, int], None]


class ExpertStore:
    """The store under one folder. Methods block on the disk; none belongs on an event loop."""

    def __init__(self, root: Path, *, max_bytes: int | None = None) -> None:
        """`max_bytes` limits what blobs may take; what does not fit is refused with both numbers."""
        self._blobs = BlobFiles(root, max_bytes=max_bytes)
        self._manifests = root / "manifests"
        self._manifests.mkdir(exist_ok=True)

    def import_model(
        self,
        source: Path,
        *,
        name: str,
        dtype: DType | Literal["checkpoint"] = "checkpoint",
        expected: Manifest | None = None,
        shadow: ShadowSpec | None = None,
        progress: Progress | None = None,
    ) -> Manifest:
        """Read a whole checkpoint into the store, one expert at a time, and say what it holds. `progress(done, total)` counts blobs.

        With `shadow`, shadows are planned and made of the experts as stored, and listed in the manifest; each counts as a blob more. What a ladder file
        beside the checkpoint offers is taken: fallbacks, shadows, and the damage that each codec does.
        Raises CheckpointError, naming the expert or gate, when something is missing, damaged or differs from `expected` or from a manifest that the
        checkpoint ships; ConfigError when there is no room.
        """
        self._blobs.sweep()
        with Checkpoint.open(source) as checkpoint:
            model = checkpoint.descriptor(name, dtype)
            self._blobs.check_room(sum(entry.num_experts * entry.expert.num_bytes for entry in model.layers), f"model {name}")
            references = [*_shipped(checkpoint)]
            if expected is not None:
                references.append(_Reference(expected, "the expected manifest", checkpoint))
            num_shadows = 0 if shadow is None else sum(entry.num_experts for entry in model.layers)
            manifest = _digest_model(checkpoint, model, references, self._blobs.put, progress, num_more=num_shadows)
        with _opened_ladder(source, manifest) as ladder:
            if shadow is not None:
                num_blobs = len(manifest.experts) + len(manifest.gates)
                told = progress and partial(_report_later, progress, num_blobs, num_blobs + num_shadows)
                made = make_shadows(manifest, shadow, partial(self._primary, manifest), self._blobs.put, told or (lambda _done: None), ladder)
                manifest = manifest.model_copy(update={"shadows": made})
            manifest = manifest.model_copy(update={"ladder": self._put_fallbacks(ladder)})
        self.put_manifest(manifest)
        return manifest

    def import_experts(
        self,
        source: Path,
        *,
        manifest: Manifest,
        experts: Collection[tuple[int, int]],
        shadows: Collection[tuple[int, int]] = (),
        progress: Progress | None = None,
    ) -> None:
        """Make sure that these experts ((layer, index)), these experts' shadows, all gates and all fallbacks of a manifest lie verified in the store.

        What is there is neither read nor made again. Raises CheckpointError, naming the expert, when the source no longer has the bytes of the
        manifest, or a shadow does not come out as listed; NotFound for a place it does not list.
        """
        self._blobs.sweep()
        _refuse_unlisted(manifest, experts, shadows)
        wanted = [place for place in _places(manifest.model) if place.index is None or (place.layer, place.index) in experts]
        missing: list[_Place | ExpertId] = [place for place in wanted if not self._blobs.is_whole(_listed(manifest, place))]
        names = [ExpertId(manifest.model.name, layer, index) for layer, index in sorted(set(shadows))]
        missing += [expert for expert in names if not self._blobs.is_whole(manifest.shadows[f"{expert.layer}/{expert.index}"].version)]
        num_wanted = len(wanted) + len(names)
        lacks_fallbacks = not all(self._blobs.is_whole(digest) for digest in manifest.ladder.values())
        if missing or lacks_fallbacks:
            with Checkpoint.open(source) as checkpoint, _opened_ladder(source, manifest) as ladder:
                reference = _Reference(manifest, "the manifest", checkpoint)
                for done, one in enumerate(missing, start=num_wanted - len(missing)):
                    _report(progress, done, num_wanted)
                    if isinstance(one, _Place):
                        self._blobs.put(*_checked(checkpoint, manifest, reference, one))
                    else:
                        shadow = remake_shadow(manifest, one, partial(self._primary, manifest, checkpoint=checkpoint, reference=reference), ladder)
                        self._blobs.put(shadow.digest, shadow.parts)
                if lacks_fallbacks:
                    _refuse_other_ladder(manifest, self._put_fallbacks(ladder))
        _report(progress, num_wanted, num_wanted)
        self.put_manifest(manifest)

    def _put_fallbacks(self, ladder: LadderBlobs | None) -> dict[str, str]:
        """Keep every fallback of a ladder; their digests as a manifest lists them."""
        listed = {}
        for blob in () if ladder is None else ladder.fallbacks():
            self._blobs.put(blob.digest, blob.parts)
            listed[blob.key] = blob.digest
        return listed

    def _primary(self, manifest: Manifest, expert: ExpertId, checkpoint: Checkpoint | None = None, reference: _Reference | None = None) -> Mapping[str, Array]:
        """An expert's tensors: as stored here, else from the checkpoint, verified; a node that holds only the shadow does not keep them."""
        place = _Place(expert.layer, expert.index)
        digest = _listed(manifest, place)
        if checkpoint is None or reference is None or self._blobs.is_whole(digest):
            return self._blobs.open(digest).tensors
        _checked(checkpoint, manifest, reference, place)
        return checkpoint.expert(expert.layer, expert.index, manifest.model.dtype)

    def put_manifest(self, manifest: Manifest) -> str:
        """Keep a manifest; returns its digest."""
        digest = manifest.digest
        try:
            self.manifest(digest)
        except (NotFound, CheckpointError):
            with self._blobs.writing(self._manifests / f"{digest}.json") as file:
                write_all(file, manifest.model_dump_json().encode())
        return digest

    def manifest(self, digest: str) -> Manifest:
        """A manifest by digest. Raises NotFound when the store lacks it, CheckpointError when it is not what its name says."""
        path = self._manifests / f"{digest}.json"
        if path.parent != self._manifests or not path.exists():
            message = f"the store of this node has no manifest {digest[:12]}; import the model"
            raise NotFound(message, resource="manifest", name=digest[:64])
        try:
            manifest = Manifest.model_validate(read_json(path))
        except ValidationError as error:
            message = f"manifest {digest[:12]} of the store is damaged; import the model again"
            raise CheckpointError(message) from error
        if manifest.digest != digest:
            message = f"manifest {digest[:12]} of the store was changed; import the model again"
            raise CheckpointError(message)
        return manifest

    def has(self, digest: str) -> bool:
        """Whether a blob of this name is there; whether its bytes are right is `open`'s to say."""
        return self._blobs.has(digest)

    def distrust(self, digest: str) -> None:
        """Have a blob digested again before it is opened next; nothing happens when there is none."""
        self._blobs.distrust(digest)

    def num_bytes(self, digest: str) -> int:
        """Size of a blob in bytes, before anybody reads it. Raises NotFound."""
        return self._blobs.num_bytes(digest)

    def expert_bytes(self, digest: str) -> int:
        """Bytes of the expert that a blob holds, or stands for as its shadow, by its header. Raises NotFound, or CheckpointError for a header that is wrong."""
        return self._blobs.expert_bytes(digest)

    def open(self, digest: str) -> StoredBlob:
        """Map a blob, verified once on this node. Raises NotFound, or CheckpointError when a byte is wrong."""
        return self._blobs.open(digest)

    @property
    def used_bytes(self) -> int:
        """Bytes of all blobs."""
        return self._blobs.used_bytes


def write_manifest(source: Path, name: str, dtype: DType | Literal["checkpoint"] = "checkpoint") -> Path:
    """Make `moelastic.manifest.json` beside a checkpoint's weights, in place of an older one; returns its path. Raises CheckpointError."""
    with Checkpoint.open(source) as checkpoint:
        manifest = _digest_model(checkpoint, checkpoint.descriptor(name, dtype), (), lambda _digest, _parts: None, None)
    path = source / MANIFEST_FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_text(manifest.model_dump_json(indent=1) + "\n")
    temporary.replace(path)
    return path


@dataclass(frozen=True, slots=True)
class _Place:
    """An expert of a layer, or, without an index, its gate."""

    layer: int
    index: int | None

    def __str__(self) -> str:
        return f"the gate of layer {self.layer}" if self.index is None else f"expert {self.layer}/{self.index}"


class _Reference:
    """A manifest that a checkpoint must agree with, whatever name and element type it is imported under."""

    def __init__(self, manifest: Manifest, origin: str, checkpoint: Checkpoint) -> None:
        self._manifest = manifest
        self._origin = origin
        self._checkpoint = checkpoint
        wanted = checkpoint.descriptor(manifest.model.name, manifest.model.dtype).layers
        if wanted != manifest.model.layers:
            message = f"config.json describes other layers than {origin}; one of the two belongs to another model"
            raise CheckpointError(message)
        places = [*_places(manifest.model)]
        listed = sum(1 for place in places if _find(manifest, place))
        if listed != len(places) or len(places) != len(manifest.experts) + len(manifest.gates):
            message = f"{origin} does not list exactly the experts and gates of its own layers; write it again with `moelastic checkpoint manifest`"
            raise CheckpointError(message)

    def check(self, model: ModelDescriptor, place: _Place, digest: str) -> None:
        """That a place of `model`, whose blob has this digest, is the one listed. Where the element types differ it is read again in the listed one."""
        own = self._manifest.model
        if model.layer(place.layer) != own.layer(place.layer):
            digest = digest_of(_encode(self._checkpoint, own, place))
        listed = _find(self._manifest, place)
        if digest != listed:
            message = f"{place} has SHA-256 {digest[:12]}, but {self._origin} says {(listed or 'none')[:12]}; the weights were changed, damaged or swapped"
            raise CheckpointError(message)


def _digest_model(
    checkpoint: Checkpoint,
    model: ModelDescriptor,
    references: Sequence[_Reference],
    put: Callable[[str, Parts], None],
    progress: Progress | None,
    *,
    num_more: int = 0,
) -> Manifest:
    """`num_more` blobs will follow, as far as progress is concerned."""
    manifest = Manifest(model=model, experts={}, gates={})
    places = [*_places(model)]
    for done, place in enumerate(places, start=1):
        parts = _encode(checkpoint, model, place)
        digest = digest_of(parts)
        for reference in references:
            reference.check(model, place, digest)
        put(digest, parts)
        section, key = _entry(manifest, place)
        section[key] = digest
        _report(progress, done, len(places) + num_more)
    return manifest


def _checked(checkpoint: Checkpoint, manifest: Manifest, reference: _Reference, place: _Place) -> tuple[str, Parts]:
    """The digest and the parts of a place's blob, which is the one listed."""
    parts = _encode(checkpoint, manifest.model, place)
    digest = digest_of(parts)
    reference.check(manifest.model, place, digest)
    return digest, parts


def _encode(checkpoint: Checkpoint, model: ModelDescriptor, place: _Place) -> Parts:
    entry = _layer(model, place.layer)
    if place.index is None:
        return encode(entry.gate, checkpoint.gate(place.layer, model.dtype))
    return encode(entry.expert, checkpoint.expert(place.layer, place.index, model.dtype))


@contextmanager
def _opened_ladder(source: Path, manifest: Manifest) -> Iterator[LadderBlobs | None]:
    """What the ladder file beside a checkpoint offers to this model; None where there is no such file."""
    ladder = Ladder.find(source)
    if ladder is None:
        yield None
        return
    with ladder:
        yield LadderBlobs(ladder, manifest)


def _refuse_other_ladder(manifest: Manifest, found: Mapping[str, str]) -> None:
    if found != manifest.ladder:
        message = f"{LADDER_FILE} of the source is not the one that the manifest of {manifest.model.name} was made with; give every node the same folder"
        raise CheckpointError(message)


def _refuse_unlisted(manifest: Manifest, experts: Collection[tuple[int, int]], shadows: Collection[tuple[int, int]]) -> None:
    listed = {(place.layer, place.index) for place in _places(manifest.model) if place.index is not None}
    shadowed = {(layer, index) for layer, index in listed if f"{layer}/{index}" in manifest.shadows}
    for what, unlisted in (("expert", set(experts) - listed), ("shadow of expert", set(shadows) - shadowed)):
        if unlisted:
            layer, index = min(unlisted)
            message = f"the manifest of {manifest.model.name} lists no {what} {layer}/{index}"
            raise NotFound(message, resource="expert", name=f"{layer}/{index}")


def _shipped(checkpoint: Checkpoint) -> Iterator[_Reference]:
    manifest = checkpoint.shipped_manifest()
    if manifest is not None:
        yield _Reference(manifest, MANIFEST_FILE, checkpoint)


def _places(model: ModelDescriptor) -> Iterator[_Place]:
    for entry in model.layers:
        yield _Place(entry.layer, None)
        yield from (_Place(entry.layer, index) for index in range(entry.num_experts))


def _entry(manifest: Manifest, place: _Place) -> tuple[dict[str, str], str]:
    return (manifest.gates, str(place.layer)) if place.index is None else (manifest.experts, f"{place.layer}/{place.index}")


def _find(manifest: Manifest, place: _Place) -> str | None:
    section, key = _entry(manifest, place)
    return section.get(key)


def _listed(manifest: Manifest, place: _Place) -> str:
    digest = _find(manifest, place)
    if digest is None:
        message = f"the manifest of {manifest.model.name} lists no digest for {place}"
        raise CheckpointError(message)
    return digest


def _layer(model: ModelDescriptor, layer: int) -> LayerDescriptor:
    entry = model.layer(layer)
    if entry is None:
        message = f"model {model.name} has no layer {layer}"
        raise NotFound(message, resource="layer", name=str(layer))
    return entry


def _report_later(progress: Progress, num_before: int, total: int, done: int) -> None:
    progress(num_before + done, total)


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
