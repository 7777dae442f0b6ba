"""Inputs whose answers are known: the twin computes them in this process from the model's own folder, before any load begins.

Shape legend: N inputs, T tokens, D model width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cluster.core.descriptors import DType
from cluster.core.errors import ConfigError
from cluster.core.spec import ModelSpec

NUM_INPUTS = 8


def write_known_answers(path: Path, model: ModelSpec, layer: int, num_tokens: int, *, seed: int, num_inputs: int = NUM_INPUTS) -> Path:
    """Write `inputs` and `answers` [N, T, D], the bits of bf16 rows. Raises ConfigError for a model of another dtype, CheckpointError."""
    import torch

    from router_service.twin import Twin

    torch.set_num_threads(1)
    twin = Twin.from_folder(model.path, model.dtype)
    served = twin.model.layer(layer)
    if served.dtype is not DType.BF16:
        reason = "known answers are compared bit for bit, and merged rows of any other type differ too often in their last bit"
        message = f"load.model: {model.name} is served in {served.dtype.value}; {reason}; set models[].dtype to bf16"
        raise ConfigError(message)
    dice = torch.Generator().manual_seed(seed)
    inputs_NTD = torch.randn((num_inputs, num_tokens, served.descriptor.expert.hidden_size), generator=dice).bfloat16()
    answers_NTD = torch.stack([twin.layer(layer, rows_TD).hidden_states for rows_TD in inputs_NTD])
    np.savez(path, inputs=inputs_NTD.view(torch.uint16).numpy(), answers=answers_NTD.view(torch.uint16).numpy())
    return path
