"""The model under calibration: a transformers language model in fp32 whose MoE layers ask here what their experts answer.

So one forward pass can collect the rows that every layer sees, and another can show what the text costs while experts are lost and others stand in.
Shape legend: T tokens, D model width, K choices of a token.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from actors.expert_layouts import ExpertWeights, expert_forward
from cluster.core.descriptors import DType, ModelDescriptor
from cluster.core.errors import ConfigError
from cluster.registry.checkpoint import Checkpoint
from router_service.core.ladder import Compute, stand_in
from router_service.core.reference import degraded_output, experts_output
from router_service.core.tensors import as_tensor
from router_service.hf_loading import layer_of, stamp_layers

IMPLEMENTATION: Final = "moelastic_calibration"
Place = tuple[int, int]
"""Layer and index of an expert."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerRows:
    """What one layer saw: rows [T, D], choices int32 [T, K] and their weights fp32 [T, K]."""

    x_TD: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor

    def split(self, held_share: float) -> tuple[LayerRows, LayerRows]:
        """The first rows, to fit on, and the last, to judge on: they come from other text."""
        cut = int(len(self.x_TD) * (1.0 - held_share))
        return (
            LayerRows(self.x_TD[:cut], self.ids_TK[:cut], self.weights_TK[:cut]),
            LayerRows(self.x_TD[cut:], self.ids_TK[cut:], self.weights_TK[cut:]),
        )


@dataclass(frozen=True, slots=True)
class Loss:
    """What is gone: experts answered by others' weights (`instead`), and experts that nobody answers for (`lost`), whose choices `rungs` decide.

    `compute(layer)` gives the fallbacks of a layer. A choice that no rung serves adds nothing.
    """

    instead: Mapping[Place, ExpertWeights] = field(default_factory=dict)
    lost: Collection[Place] = ()
    rungs: Sequence[str] = ()
    compute: Mapping[int, Compute] = field(default_factory=dict)


class Subject:
    """A loaded checkpoint. One at a time in a process."""

    def __init__(self, folder: Path) -> None:
        """Load tokenizer, model and experts. Raises CheckpointError, or ConfigError for a model that transformers cannot run on text."""
        with Checkpoint.open(folder) as checkpoint:
            self.descriptor: ModelDescriptor = checkpoint.descriptor("calibrated", "checkpoint")
            self.primaries: dict[Place, dict[str, Any]] = {
                (entry.layer, index): checkpoint.expert(entry.layer, index, entry.expert.dtype)
                for entry in self.descriptor.layers
                for index in range(entry.num_experts)
            }
        self._weights = {place: wide_weights(self, place, tensors) for place, tensors in self.primaries.items()}
        self._loss = Loss()
        self._seen: dict[int, list[LayerRows]] | None = None
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, self._answer)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation=IMPLEMENTATION).eval()
        except (OSError, ValueError) as error:
            message = f"{folder.name} cannot be run on text; calibrate a folder that transformers loads as a language model, with its tokenizer"
            raise ConfigError(message) from error
        stamp_layers(self.model)

    def lost_with_gpu(self, gpu: int, num_gpus: int) -> list[Place]:
        """The experts that one of several GPUs holds, when each holds an equal run of indices of every layer."""
        return [(layer, index) for layer, index in self.primaries if index * num_gpus // self._num_experts(layer) == gpu]

    def _num_experts(self, layer: int) -> int:
        return next(entry.num_experts for entry in self.descriptor.layers if entry.layer == layer)

    def rows(self, texts: Sequence[str], max_rows: int, *, context: int) -> dict[int, LayerRows]:
        """The rows that each layer sees on these texts, at most `max_rows` of them, as many of each text."""
        self._seen = {entry.layer: [] for entry in self.descriptor.layers}
        share = max(1, max_rows // len(texts))
        try:
            for text in texts:
                tokens = self._tokens(text)[:share]
                with torch.no_grad():
                    for start in range(0, len(tokens) - 1, context):
                        self.model(input_ids=tokens[None, start : start + context])
            seen = self._seen
        finally:
            self._seen = None
        return {layer: LayerRows(*(torch.cat(parts) for parts in zip(*(_parts(rows) for rows in seen[layer]), strict=True))) for layer in seen}

    def bits_per_byte(self, texts: Sequence[str], loss: Loss | None = None, *, context: int = 256) -> float:
        """Bits for each UTF-8 byte of the texts, each cut into windows that see nothing before them."""
        self._loss = loss or Loss()
        nats, num_bytes = 0.0, 0
        try:
            with torch.no_grad():
                for text in texts:
                    tokens, num_bytes = self._tokens(text), num_bytes + len(text.encode())
                    for start in range(0, len(tokens) - 1, context):
                        window = tokens[start : start + context + 1]
                        logits = self.model(input_ids=window[None, :-1]).logits[0].float()
                        nats += float(cross_entropy(logits, window[1:], reduction="sum"))
        finally:
            self._loss = Loss()
        return nats / math.log(2.0) / max(num_bytes, 1)

    @contextmanager
    def losing(self, loss: Loss) -> Iterator[None]:
        """Experts are lost for a while, for whoever runs the model by another way."""
        self._loss = loss
        try:
            yield
        finally:
            self._loss = Loss()

    def _tokens(self, text: str) -> torch.Tensor:
        ids = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        if not ids or max(ids) >= self.model.get_input_embeddings().num_embeddings:
            message = "the tokenizer beside the checkpoint makes no tokens of this text that the model knows; calibrate a folder with the model's own tokenizer"
            raise ConfigError(message)
        start = self.tokenizer.bos_token_id
        return torch.tensor(ids if start is None else [start, *ids])

    def _answer(self, module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """The experts contract of transformers: [T, D], [T, K], [T, K] -> [T, D]."""
        layer, weights_TK = layer_of(module), top_k_weights.float()
        if self._seen is not None:
            self._seen[layer].append(LayerRows(hidden_states.clone(), top_k_index.to(torch.int32), weights_TK.clone()))
        ids_TK = top_k_index.to(torch.int32).numpy()
        loss = self._loss
        lost = {index for place, index in loss.lost if place == layer}

        def forward(index: int, rows_ND: torch.Tensor) -> torch.Tensor:
            return expert_forward(rows_ND, loss.instead.get((layer, index)) or self._weights[layer, index])

        if not lost:
            return experts_output(hidden_states, ids_TK, weights_TK, forward)
        degraded = stand_in(ids_TK, weights_TK, lost, loss.rungs)
        left_TK = np.isin(ids_TK, [*lost]) & (degraded.outcomes_TK == 0)
        ids_TK = np.where(left_TK, -1, ids_TK)
        return degraded_output(hidden_states, ids_TK, degraded, lost, forward, loss.compute.get(layer, _nothing))


def wide_weights(subject: Subject, place: Place, tensors: Mapping[str, Any]) -> ExpertWeights:
    """An expert's tensors in fp32, ready to compute in this process."""
    layer = subject.descriptor.layer(place[0])
    if layer is None:
        message = f"the model has no MoE layer {place[0]}"
        raise ConfigError(message)
    wide = {name: as_tensor(np.asarray(array, np.float32)) for name, array in tensors.items()}
    num_bytes = sum(tensor.nbytes for tensor in wide.values())
    return ExpertWeights(layer.expert.model_copy(update={"dtype": DType.FP32}), wide, num_bytes, num_bytes)


def _parts(rows: LayerRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return rows.x_TD, rows.ids_TK, rows.weights_TK


def _nothing(_rung: str, rows_ND: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(rows_ND)
