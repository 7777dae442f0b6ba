"""hivemind, as its documentation shows it: a `Server` whose experts are registered classes, called through `RemoteMixtureOfExperts`. In fp32.

Run as a module it is the server, with a DHT of its own on the loopback address and its weights from the same folder as everybody's.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hivemind
import torch
from hivemind.moe.server.layers.custom_experts import register_expert_class
from hivemind.proto.runtime_pb2 import CompressionType
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from bench.layer import Layer, Rows
from bench.settings import WIDE_MODEL, Sizes
from cluster.local.settings import PROJECT_ROOT

PREFIX = "bench."
# Its default is eight processes for each expert; on a machine of two cores they would fight.
HANDLERS = 2


class Gated(nn.Module):
    """The expert of every row, with the weights that `load` gives it."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(2, hidden_size))
        self.down = nn.Parameter(torch.zeros(hidden_size, 1))

    def forward(self, x_TD: Tensor) -> Tensor:
        """The expert's output."""
        gate_TF, up_TF = linear(x_TD, self.gate_up).chunk(2, dim=-1)
        return linear(silu(gate_TF) * up_TF, self.down)


register_expert_class("bench_gated", lambda batch_size, hidden_size: torch.empty((batch_size, hidden_size)))(Gated)


class Peer:
    """The client; its server is a process of its own."""

    def __init__(self, folders: Mapping[str, Path], sizes: Sizes, options: Mapping[str, str]) -> None:
        torch.set_num_threads(1)
        folder = folders[WIDE_MODEL]
        command = [sys.executable, "-m", "bench.peers.hivemind_peer", str(folder), json.dumps(asdict(sizes)), options["threads"]]
        self._server = subprocess.Popen(command, cwd=PROJECT_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._server.stdout is not None
        addresses = json.loads(self._server.stdout.readline())
        self._dht = hivemind.DHT(initial_peers=addresses, host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
        self._moe = hivemind.RemoteMixtureOfExperts(
            in_features=sizes.hidden_size, grid_size=(sizes.num_experts,), dht=self._dht, uid_prefix=PREFIX, k_best=sizes.top_k, k_min=sizes.top_k
        )
        gate = Layer(folder, sizes, torch.float32, indices=()).gate
        with torch.no_grad():
            self._moe.proj.weight.copy_(gate)
            self._moe.proj.bias.zero_()

    def call(self, rows: Rows, model: str) -> Rows:
        """One layer; served in fp32 alone."""
        assert model == WIDE_MODEL
        with torch.no_grad():
            output_TD: Tensor = self._moe(torch.from_numpy(rows))
        return output_TD.numpy()

    async def acall(self, rows: Rows, model: str) -> Rows:
        """As `call`, in a thread: hivemind's client blocks."""
        return await asyncio.to_thread(self.call, rows, model)

    def close(self) -> None:
        """End the server and this side's DHT."""
        self._dht.shutdown()
        self._server.communicate(timeout=20)


def serve(folder: Path, sizes: Sizes, threads: int) -> None:
    """Serve until stdin ends; the DHT's addresses are printed."""
    torch.set_num_threads(threads)
    server = hivemind.moe.Server.create(
        expert_uids=[f"{PREFIX}{index}" for index in range(sizes.num_experts)],
        expert_cls="bench_gated",
        hidden_dim=sizes.hidden_size,
        optim_cls=None,
        num_handlers=HANDLERS,
        max_batch_size=4096,
        device="cpu",
        compression=CompressionType.NONE,
        host_maddrs=["/ip4/127.0.0.1/tcp/0"],
        start=False,
    )
    layer = Layer(folder, sizes, torch.float32)
    for index, expert in layer.experts.items():
        module: Any = server.module_backends[f"{PREFIX}{index}"].module
        module.gate_up, module.down = nn.Parameter(expert.gate_up), nn.Parameter(expert.down)
    server.run_in_background(await_ready=True)
    sys.stdout.write(json.dumps([str(address) for address in server.dht.get_visible_maddrs()]) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    server.shutdown()
    server.dht.shutdown()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Sizes(**json.loads(sys.argv[2])), int(sys.argv[3]))
