"""Build a small custom MoE with each kind of gate, run it, and save it as a folder that the cluster can serve.

Run ``python -m examples.custom_moe.example FOLDER``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from examples.custom_moe.tiny_moe import GatedExpert, LinearGate, MlpTanhGate, PositionGate, TinyMoE, save_experts

HIDDEN_SIZE = 64
INTERMEDIATE_SIZE = 128
NUM_EXPERTS = 8
NUM_EXPERTS_PER_TOKEN = 2
NUM_POSITIONS = 256


def main() -> None:
    """Save FOLDER/{linear,mlp_tanh,position}, two layers each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.manual_seed(0)
    for kind in ("linear", "mlp_tanh", "position"):
        for layer in (0, 1):
            moe = build(kind)
            rows = torch.randn(4, HIDDEN_SIZE)
            print(f"{kind} layer {layer}: rows {list(rows.shape)} -> {list(moe(rows).shape)}")
            save_experts(folder / kind, moe.gate, list(moe.experts), num_experts_per_token=NUM_EXPERTS_PER_TOKEN, layer=layer)
        print(f"saved {folder / kind}")


def build(kind: str) -> TinyMoE:
    """Return one random layer whose gate is of the given kind."""
    gates: dict[str, nn.Module] = {
        "linear": LinearGate(HIDDEN_SIZE, NUM_EXPERTS),
        "mlp_tanh": MlpTanhGate(HIDDEN_SIZE, NUM_EXPERTS, inner_size=32),
        "position": PositionGate(HIDDEN_SIZE, NUM_EXPERTS, NUM_POSITIONS),
    }
    experts = [GatedExpert(HIDDEN_SIZE, INTERMEDIATE_SIZE) for _ in range(NUM_EXPERTS)]
    return TinyMoE(gates[kind], experts, NUM_EXPERTS_PER_TOKEN)


if __name__ == "__main__":
    main()
