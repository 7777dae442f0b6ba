"""What a router itself computes for lost experts: the generalist and the dense matrix of a layer, from the ladder blobs in the node-local store.

Both are small (neither is larger than D x D weights), so every router holds them: they survive the loss of every actor and cost no hop. The arithmetic is the
experts' own, in the layer's element type on the CPU; twin and replay call the same functions, so what stands in can be recomputed bit for bit.
Shape legend: N rows, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from actors.blob_files import StoredBlob
from actors.expert_layouts import ExpertWeights, expert_forward, load_weights
from cluster.core.descriptors import DenseDescriptor, LayerDescriptor, Manifest, ladder_key
from cluster.core.errors import CheckpointError
from router_service.core.ladder import FALLBACK_OUTCOMES
from router_service.core.outcomes import Outcome
from router_service.core.tensors import as_tensor

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class DenseWeights:
    """One matrix [D, D] that stands for a whole layer of experts."""

    descriptor: DenseDescriptor
    weight: torch.Tensor


FallbackWeights = ExpertWeights | DenseWeights


@dataclass(frozen=True, slots=True, eq=False)
class Fallbacks:
    """The fallbacks of one layer. `versions`: the SHA-256 of each rung's blob, as a PLAN names it."""

    weights: Mapping[str, FallbackWeights]
    versions: Mapping[str, str]

    @property
    def versions_by_outcome(self) -> dict[Outcome, str]:
        """The versions as an account of choices wants them."""
        return {FALLBACK_OUTCOMES[rung]: version for rung, version in self.versions.items()}

    def can(self, rung: str) -> bool:
        """Whether this rung can compute here."""
        return rung in self.weights

    def compute(self, rung: str, x_ND: torch.Tensor) -> torch.Tensor:
        """What stands for a lost expert's outputs [N, D]; rows of the layer's element type."""
        return forward(x_ND, self.weights[rung])

    def generalist(self, x_ND: torch.Tensor) -> torch.Tensor:
        """The outputs [N, D] of the layer's narrow expert."""
        return self.compute("generalist", x_ND)

    def dense(self, x_ND: torch.Tensor) -> torch.Tensor:
        """The outputs [N, D] of the layer's matrix."""
        return self.compute("dense", x_ND)


def usable_rungs(ladder: tuple[str, ...], fallbacks: Fallbacks | None) -> tuple[str, ...]:
    """The rungs below the copies that a layer can stand on: a fallback that the model has no weights for is passed over."""
    return tuple(rung for rung in ladder if rung == "fewer_experts" or (fallbacks is not None and fallbacks.can(rung)))


@torch.no_grad()
def forward(x_ND: torch.Tensor, weights: FallbackWeights) -> torch.Tensor:
    """Outputs [N, D] of an expert, a generalist or a dense matrix, for rows [N, D] of its own element type."""
    if isinstance(weights, DenseWeights):
        return torch.nn.functional.linear(x_ND, weights.weight)
    return expert_forward(x_ND, weights)


def load_fallback(blob: StoredBlob) -> FallbackWeights:
    """Weights of a stored expert, shadow, generalist or dense matrix, on the CPU. Raises CheckpointError for a gate."""
    if isinstance(blob.descriptor, DenseDescriptor):
        return DenseWeights(blob.descriptor, as_tensor(blob.tensors["weight"]))
    return load_weights(blob, CPU)


def layer_fallbacks(manifest: Manifest, layer: LayerDescriptor, blobs: Mapping[str, StoredBlob]) -> Fallbacks | None:
    """The fallbacks of one layer from their opened blobs by rung; None where it has none. Raises CheckpointError when one is of other sizes than the layer."""
    weights = {rung: load_fallback(blob) for rung, blob in blobs.items()}
    for rung, found in weights.items():
        wanted = DenseWeights if rung == "dense" else ExpertWeights
        own = found.descriptor
        if not isinstance(found, wanted) or own.hidden_size != layer.expert.hidden_size or own.dtype is not layer.expert.dtype:
            message = f"the {rung} of layer {layer.layer} in the ladder of {manifest.model.name} does not fit the layer; calibrate and import the model again"
            raise CheckpointError(message)
    return Fallbacks(weights, {rung: blob.digest for rung, blob in blobs.items()}) if weights else None


def listed_fallbacks(manifest: Manifest, layer: int) -> dict[str, str]:
    """The digest of each fallback blob that a manifest lists for a layer, by rung."""
    keys = {rung: ladder_key(rung, layer) for rung in FALLBACK_OUTCOMES}
    return {rung: manifest.ladder[key] for rung, key in keys.items() if key in manifest.ladder}
