"""The same experts in one process of its own: no wire, no queue, all callers' rows in one batch. What everything else is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from bench.layer import Layer, Rows, to_numpy, to_torch
from bench.settings import Sizes


class Peer:
    """The layer itself; `threads` as told."""

    def __init__(self, folders: Mapping[str, Path], sizes: Sizes, options: Mapping[str, str]) -> None:
        torch.set_num_threads(int(options["threads"]))
        self._layers = {name: Layer(folder, sizes) for name, folder in folders.items()}

    def call(self, rows: Rows, model: str) -> Rows:
        """One forward of the layer."""
        with torch.inference_mode():
            return to_numpy(self._layers[model](to_torch(rows)))

    async def acall(self, rows: Rows, model: str) -> Rows:
        """As `call`."""
        return self.call(rows, model)
