"""A ladder file as blobs of the store: fallbacks as their own digests, shadows as their manifest lists them. No torch; one tensor set at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from actors.core.codecs import PackedExpert, packed_layout
from actors.expert_blob import Array, Descriptor, digest_of, encode, encode_shadow
from cluster.core.descriptors import DenseDescriptor, DType, ExpertDescriptor, LayerDescriptor, Manifest, ladder_key
from cluster.core.errors import CheckpointError
from cluster.core.ladder_record import LadderShadow
from cluster.registry.convert import NUMPY_DTYPES, as_dtype
from cluster.registry.ladder_file import LADDER_FILE, Ladder

Parts = tuple[bytes | memoryview, ...]


@dataclass(frozen=True, slots=True)
class LadderBlob:
    """One fallback, ready to be stored under its digest and listed under its key."""

    key: str
    digest: str
    parts: Parts


class LadderBlobs:
    """What one ladder file offers to one model, whose experts the manifest names."""

    def __init__(self, ladder: Ladder, manifest: Manifest) -> None:
        """Raises CheckpointError when the ladder was calibrated for other weights; of a model in another element type only shapes can be compared."""
        self.record = ladder.record
        self._ladder = ladder
        self._manifest = manifest
        if self.record.dtype is manifest.model.dtype and self.record.experts != manifest.experts:
            message = f"{LADDER_FILE} was calibrated for other weights than those beside it; run `moelastic checkpoint calibrate` again, or remove it"
            raise CheckpointError(message)

    def fallbacks(self) -> Iterator[LadderBlob]:
        """Every generalist and dense matrix, in the model's element type. Raises CheckpointError when one does not fit its layer."""
        for layer in self._manifest.model.layers:
            own = self.record.generalists.get(str(layer.layer))
            if own is not None:
                yield self._fallback("generalist", layer, own.model_copy(update={"dtype": self.record.dtype}))
            if layer.layer in self.record.dense:
                yield self._fallback("dense", layer, DenseDescriptor(hidden_size=layer.expert.hidden_size, dtype=self.record.dtype))

    def shadow(self, key: str, expert: ExpertDescriptor) -> tuple[LadderShadow, PackedExpert] | None:
        """The shadow that the file holds of an expert as this model has it, or None."""
        found = self.record.shadows.get(key)
        if found is None or self.record.experts.get(key) != self._manifest.experts[key]:
            return None
        wanted = {name: (tensor.dtype, tensor.shape) for name, tensor in packed_layout(expert, found.codec).items()}
        tensors = self._ladder.read(f"shadow.{key.replace('/', '.')}", wanted)
        return found, PackedExpert(expert, found.codec, tensors)

    def shadow_parts(self, key: str, expert: ExpertDescriptor) -> Parts | None:
        """That shadow's blob, or None."""
        found = self.shadow(key, expert)
        return None if found is None else encode_shadow(found[1], self._manifest.experts[key])

    def _fallback(self, rung: str, layer: LayerDescriptor, own: ExpertDescriptor | DenseDescriptor) -> LadderBlob:
        if own.hidden_size != layer.expert.hidden_size:
            message = f"{LADDER_FILE}: the {rung} of layer {layer.layer} has width {own.hidden_size}, the layer {layer.expert.hidden_size}; calibrate again"
            raise CheckpointError(message)
        dtype = NUMPY_DTYPES[own.dtype]
        tensors = self._ladder.read(f"{rung}.{layer.layer}", {name: (dtype, shape) for name, shape in own.tensor_shapes().items()})
        served = layer.expert.dtype
        parts = encode(_in_dtype(own, served), _converted(tensors, served))
        return LadderBlob(ladder_key(rung, layer.layer), digest_of(parts), parts)


def _in_dtype(descriptor: ExpertDescriptor | DenseDescriptor, dtype: DType) -> Descriptor:
    return descriptor.model_copy(update={"dtype": dtype})


def _converted(tensors: Mapping[str, Array], dtype: DType) -> dict[str, Array]:
    found = {name: as_dtype(tensor, dtype, name) for name, tensor in tensors.items()}
    for name, tensor in found.items():
        if not np.isfinite(tensor.astype(np.float32)).all():
            message = f"{LADDER_FILE}: {name} of a fallback holds NaN or infinity; calibrate again"
            raise CheckpointError(message)
    return found
