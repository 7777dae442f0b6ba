"""The same experts in one process of its own: no wire, no queue, all callers' rows in one batch. What everything else is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from actors.widened_forward import MIN_ROWS, widened_linear
from bench.layer import BF16, Layer, Rows, to_numpy, to_torch
from bench.settings import WIDE_MODEL, Sizes

WIDENED = "widened"


def widened(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """bf16 by the hundred summed in fp32, where that is faster: what our actors do with `layout: widened`, so that nobody is ahead by arithmetic alone."""
    return widened_linear(x_TI, weight_OI) if len(x_TI) >= MIN_ROWS and x_TI.dtype is torch.bfloat16 else linear(x_TI, weight_OI)


class Peer:
    """The layer itself; `threads` as told. A model's name after `widened/` asks for that arithmetic, otherwise it is torch's own."""

    def __init__(self, folders: Mapping[str, Path], sizes: Sizes, options: Mapping[str, str]) -> None:
        torch.set_num_threads(int(options["threads"]))
        types = {name: torch.float32 if name == WIDE_MODEL else torch.bfloat16 for name in folders}
        self._layers = {name: Layer(folder, sizes, types[name]) for name, folder in folders.items()}
        self._layers |= {f"{WIDENED}/{name}": layer.multiplied_by(widened) for name, layer in self._layers.items()}

    def call(self, rows: Rows, model: str) -> Rows:
        """One forward of the layer."""
        with torch.inference_mode():
            if rows.dtype != BF16:
                return self._layers[model](torch.from_numpy(rows)).numpy()
            return to_numpy(self._layers[model](to_torch(rows)))

    async def acall(self, rows: Rows, model: str) -> Rows:
        """As `call`."""
        return self.call(rows, model)
