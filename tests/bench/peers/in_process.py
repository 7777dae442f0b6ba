"""The same experts in one process of its own: no wire, no queue, all callers' rows in one batch. What everything else is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from actors.packed_matrix import multiply_packed
from bench.layer import BF16, Layer, Rows, to_numpy, to_torch
from bench.settings import WIDE_MODEL, Sizes

PACKED = "packed"


class Peer:
    """The layer itself; `threads` as told.

    A model's name after `packed/` asks for its matrices packed, as our actors keep them with `layout: packed`, so that nobody is ahead by arithmetic
    alone; otherwise the arithmetic is torch's own.
    """

    def __init__(self, folders: Mapping[str, Path], sizes: Sizes, options: Mapping[str, str]) -> None:
        torch.set_num_threads(int(options["threads"]))
        types = {name: torch.float32 if name == WIDE_MODEL else torch.bfloat16 for name in folders}
        self._layers = {name: Layer(folder, sizes, types[name]) for name, folder in folders.items()}
        packed = {name: layer for name, layer in self._layers.items() if types[name] is torch.bfloat16}
        self._layers |= {f"{PACKED}/{name}": layer.packed(multiply_packed) for name, layer in packed.items()}

    def call(self, rows: Rows, model: str) -> Rows:
        """One forward of the layer."""
        with torch.inference_mode():
            if rows.dtype != BF16:
                return self._layers[model](torch.from_numpy(rows)).numpy()
            return to_numpy(self._layers[model](to_torch(rows)))

    async def acall(self, rows: Rows, model: str) -> Rows:
        """As `call`."""
        return self.call(rows, model)
