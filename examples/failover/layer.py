"""`python -m examples.failover.layer`: the MoE layer that failover times are measured on: random weights in the custom layout, the size of the benchmark's."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from examples.custom_moe.tiny_moe import GatedExpert, LinearGate, save_experts

HIDDEN_SIZE = 512
INTERMEDIATE_SIZE = 2048
NUM_EXPERTS = 8
TOP_K = 2
FOLDER = Path(__file__).resolve().parents[2] / "runs" / "failover" / "layer"


def save_layer(folder: Path = FOLDER, *, hidden_size: int = HIDDEN_SIZE, intermediate_size: int = INTERMEDIATE_SIZE, seed: int = 0) -> Path:
    """Write the layer, unless it is there already; the same seed always gives the same weights."""
    if not (folder / "config.json").exists():
        torch.manual_seed(seed)
        gate = LinearGate(hidden_size, NUM_EXPERTS).to(torch.bfloat16)
        experts = [GatedExpert(hidden_size, intermediate_size).to(torch.bfloat16) for _ in range(NUM_EXPERTS)]
        save_experts(folder, gate, experts, num_experts_per_token=TOP_K)
    return folder


if __name__ == "__main__":
    sys.stdout.write(f"{save_layer()}\n")
