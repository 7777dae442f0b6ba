"""The twin: a model's MoE layers in one process with the cluster's own gate, order, experts and combine. For tests, demos and doubt.

A reply equals the twin's bit for bit where an actor computed each expert's rows of the call by themselves, as it does for a single caller. Merged with
rows of others they are more to a matrix kernel, which may then sum in another order: last bits differ often in fp32 and seldom in bf16, mostly of small
experts. `actors.deterministic` makes a cluster's answers independent of that, in tiles of rows; the twin's kernels are the plain ones.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch

from actors.expert_blob import digest_of, encode
from actors.expert_layouts import ExpertWeights, expert_forward, load_weights
from actors.expert_store import ExpertStore
from cluster.core.descriptors import DType, Manifest
from cluster.core.errors import CheckpointError, ExpertUnavailable
from cluster.core.ids import Role
from cluster.registry.checkpoint import Checkpoint
from router_service.core.choose import Chosen, choose
from router_service.core.combine import finish
from router_service.core.ladder import stand_in
from router_service.core.layer_call import GateChoice, LayerCall, LayerReply, TopK
from router_service.core.outcomes import Answer, Ledger
from router_service.core.reference import degraded_output, experts_output
from router_service.core.validate import check_call
from router_service.fallbacks import Fallbacks, usable_rungs
from router_service.models import ServedLayer, ServedModel, as_tensor, load_model, make_model

VersionedExpert = tuple[str, ExpertWeights]
LoadExpert = Callable[[int, int], VersionedExpert]


class Twin:
    """One model in this process. `load_expert(layer, index)` gives version and weights; it is called once for each expert that is used.

    `shadowed` experts ((layer, index)) are answered by their shadows, and reported so; `lost` ones by nobody, so that what `ladder` names stands in.
    """

    def __init__(
        self,
        model: ServedModel,
        load_expert: LoadExpert,
        shadowed: Collection[tuple[int, int]] = (),
        *,
        lost: Collection[tuple[int, int]] = (),
        ladder: tuple[str, ...] = (),
    ) -> None:
        self.model = model
        self._expert = cache(load_expert)
        self._shadowed = frozenset(shadowed)
        self._lost = frozenset(lost)
        self._ladder = ladder

    @classmethod
    def from_folder(cls, path: Path, dtype: DType | Literal["checkpoint"] = "checkpoint", *, name: str = "twin") -> Self:
        """From a checkpoint folder, without a store; each expert is read when it is first used and gets the version a store would give it.

        The folder must stay as it is meanwhile. Raises CheckpointError.
        """
        checkpoint = Checkpoint(path)
        descriptor = checkpoint.descriptor(name, dtype)
        gates = {entry.layer: checkpoint.gate(entry.layer, descriptor.dtype) for entry in descriptor.layers}
        model = make_model(Manifest(model=descriptor, experts={}, gates={}), "", gates)

        def load(layer: int, index: int) -> VersionedExpert:
            expert = model.layer(layer).descriptor.expert
            arrays = checkpoint.expert(layer, index, expert.dtype)
            tensors = {key: as_tensor(array) for key, array in arrays.items()}
            return digest_of(encode(expert, arrays)), ExpertWeights(expert, tensors, expert.num_bytes, expert.num_bytes)

        return cls(model, load)

    @classmethod
    def from_store(
        cls,
        store: ExpertStore,
        digest: str,
        *,
        shadowed: Collection[tuple[int, int]] = (),
        lost: Collection[tuple[int, int]] = (),
        ladder: tuple[str, ...] = (),
    ) -> Self:
        """From a node-local store, by the digest of the model's manifest: the very bytes that actors serve.

        With `shadowed` it computes what the cluster answers while these experts have a shadow only, with `lost` and `ladder` while they have no copy at all.
        Raises CheckpointError, also for a shadowed expert without a shadow.
        """
        model = load_model(store, digest)
        manifest = model.manifest
        if lacking := [f"{layer}/{index}" for layer, index in shadowed if f"{layer}/{index}" not in manifest.shadows]:
            message = f"model {model.name} has no shadow of expert {lacking[0]}; import it with a shadow section that covers it"
            raise CheckpointError(message)

        def load(layer: int, index: int) -> VersionedExpert:
            key = f"{layer}/{index}"
            version = manifest.shadows[key].version if (layer, index) in shadowed else manifest.experts[key]
            return version, load_weights(store.open(version), torch.device("cpu"))

        return cls(model, load, shadowed, lost=lost, ladder=ladder)

    def layer(self, layer: int, hidden_states: torch.Tensor, routing: GateChoice | TopK | None = None, *, want_plan: bool = False) -> LayerReply:
        """What the cluster answers to a call: [T, D] in, [T, D] out in the same dtype.

        Raises NotFound, InvalidRequest, DataLoss and ExpertUnavailable like the pipeline.
        Without `routing` the layer's gate chooses. In the report every served choice is exact or, of a shadowed expert, shadow; generation and attempt are 0.
        """
        served = self.model.layer(layer)
        call = LayerCall("twin", self.model.name, layer, hidden_states, routing or GateChoice(), math.inf, want_plan=want_plan)
        x_TD = check_call(call, served.descriptor, served.dtype, max_tokens=sys.maxsize, num_positions=served.gate.num_positions)
        chosen = choose(call.routing, served.gate, x_TD)
        ledger = Ledger(chosen.ids_TK, chosen.weights_TK.numpy(), chosen.dropped_TK)
        total_TD = self._output(served, x_TD, chosen, ledger)
        for index in np.unique(chosen.ids_TK[chosen.ids_TK >= 0]).tolist():
            if (layer, index) not in self._lost:
                role = Role.SHADOW if (layer, index) in self._shadowed else Role.REPLICA
                ledger.answered(index, Answer(self._expert(layer, index)[0], 0, role, 0))
        return LayerReply(finish(total_TD, hidden_states.dtype), ledger.report(epoch=0, want_plan=want_plan))

    def _output(self, served: ServedLayer, x_TD: torch.Tensor, chosen: Chosen, ledger: Ledger) -> torch.Tensor:
        layer = served.descriptor.layer

        def forward(index: int, rows_ND: torch.Tensor) -> torch.Tensor:
            return expert_forward(rows_ND, self._expert(layer, index)[1])

        lost = {index for place, index in self._lost if place == layer}
        if not np.isin(chosen.ids_TK, [*lost]).any():
            return experts_output(x_TD, chosen.ids_TK, chosen.weights_TK, forward)
        degraded = stand_in(chosen.ids_TK, chosen.weights_TK, lost, usable_rungs(self._ladder, served.fallbacks))
        if degraded.unserved_tokens.size:
            message = f"layer {layer}: {degraded.unserved_tokens.size} rows have choices of experts that nothing of the ladder stands in for"
            raise ExpertUnavailable(message, failed_rows=tuple(degraded.unserved_tokens.tolist()))
        fallbacks = served.fallbacks or Fallbacks({}, {})
        ledger.stood_in(degraded.outcomes_TK, degraded.weights_TK.numpy(), fallbacks.versions_by_outcome)
        return degraded_output(x_TD, chosen.ids_TK, degraded, lost, forward, fallbacks.compute)
