"""Models as a router serves them: the manifest from the node-local store, a gate for every layer, and what the ladder has. Experts stay with the actors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from actors.blob_files import StoredBlob
from cluster.core.descriptors import DType, LayerDescriptor, Manifest
from cluster.core.errors import NotFound
from router_service.core.gate import Gate
from router_service.core.tensors import as_tensor
from router_service.fallbacks import Fallbacks, layer_fallbacks, listed_fallbacks

__all__ = ["GateStore", "ServedLayer", "ServedModel", "as_tensor", "find_model", "load_model", "make_model"]

MAX_NAME_CHARACTERS = 128


class GateStore(Protocol):
    """What a router needs of the node-local store."""

    def manifest(self, digest: str) -> Manifest:
        """A manifest by its digest."""
        ...

    def open(self, digest: str) -> StoredBlob:
        """A blob by its digest. Raises CheckpointError when a byte is wrong."""
        ...


@dataclass(frozen=True, slots=True)
class ServedLayer:
    """One MoE layer with its gate. `dtype` is what experts compute in; `fallbacks` what stands in for lost experts, where the model has a ladder."""

    descriptor: LayerDescriptor
    dtype: DType
    gate: Gate
    fallbacks: Fallbacks | None = None

    @property
    def width(self) -> int:
        """D."""
        return self.descriptor.expert.hidden_size

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as experts get it."""
        return self.width * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that requests may name. `digest` is its manifest's; `layers` by decoder layer index."""

    manifest: Manifest
    digest: str
    layers: Mapping[int, ServedLayer]

    @property
    def name(self) -> str:
        """What requests call it."""
        return self.manifest.model.name

    def layer(self, index: int) -> ServedLayer:
        """A layer by decoder layer index. Raises NotFound, naming those there are."""
        found = self.layers.get(index)
        if found is None:
            message = f"layer {index} of model {self.name} is not an MoE layer; those are {', '.join(map(str, sorted(self.layers)))}"
            raise NotFound(message, resource="layer", name=f"{self.name}/{index}")
        return found


def load_model(store: GateStore, digest: str) -> ServedModel:
    """A model from its manifest's digest. Reads the disk; raises CheckpointError when a gate or fallback is missing, wrong or does not fit its layer."""
    manifest = store.manifest(digest)
    tensors = {entry.layer: store.open(manifest.gates[str(entry.layer)]).tensors for entry in manifest.model.layers}
    fallbacks = {}
    for entry in manifest.model.layers:
        blobs = {rung: store.open(listed) for rung, listed in listed_fallbacks(manifest, entry.layer).items()}
        fallbacks[entry.layer] = layer_fallbacks(manifest, entry, blobs)
    return make_model(manifest, digest, tensors, fallbacks)


def make_model(
    manifest: Manifest, digest: str, gate_tensors: Mapping[int, Mapping[str, NDArray[Any]]], fallbacks: Mapping[int, Fallbacks | None] | None = None
) -> ServedModel:
    """A model from its manifest, the tensors of each layer's gate, and each layer's fallbacks where there are any. Raises CheckpointError."""
    dtype = manifest.model.dtype
    layers = {}
    for entry in manifest.model.layers:
        tensors = {name: as_tensor(array) for name, array in gate_tensors[entry.layer].items()}
        layers[entry.layer] = ServedLayer(entry, dtype, Gate(entry.gate, tensors, dtype), (fallbacks or {}).get(entry.layer))
    return ServedModel(manifest, digest, layers)


def find_model(models: Mapping[str, ServedModel], name: str) -> ServedModel:
    """A served model by name. Raises NotFound, naming those there are."""
    found = models.get(name)
    if found is None:
        shown = name[:MAX_NAME_CHARACTERS]
        message = f"model {shown!r} is not served here; served: {', '.join(sorted(models)) or 'none yet'}"
        raise NotFound(message, resource="model", name=shown)
    return found
