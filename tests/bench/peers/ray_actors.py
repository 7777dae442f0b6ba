"""A plain fan-out of Ray actor calls, as Ray's own guide to actors shows it: the gate in the caller, one call to each actor that holds a chosen expert.

As many actors as ours has, with as many experts each and one torch thread.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from bench.layer import BF16, Layer, Rows, groups_of, to_numpy, to_torch
from bench.settings import Sizes


class ExpertGroup:
    """Some experts of every model. Rows travel as uint16, which Ray sends without pickling elements."""

    def __init__(self, folders: Mapping[str, Path], sizes: Sizes, indices: Sequence[int]) -> None:
        torch.set_num_threads(1)
        self._layers = {name: Layer(folder, sizes, indices=indices) for name, folder in folders.items()}

    def forward(self, model: str, indices: Sequence[int], rows: Sequence[Rows]) -> list[Rows]:
        """Each expert's output for its rows."""
        with torch.inference_mode():
            experts = self._layers[model].experts
            return [to_numpy(experts[index](to_torch(np.array(part)))).view(np.uint16) for index, part in zip(indices, rows, strict=True)]


class Peer:
    """The caller: gate, fan-out, combine. `num_actors` as told; the cluster is that of the environment."""

    def __init__(self, folders: Mapping[str, Path], sizes: Sizes, options: Mapping[str, str]) -> None:
        torch.set_num_threads(1)
        ray.init(
            address=os.environ["RAY_ADDRESS"], runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"], "RAY_USE_UVLOOP": "1"}}, log_to_driver=False
        )
        self._count = int(options["num_actors"])
        homes = [range(first, sizes.num_experts, self._count) for first in range(self._count)]
        actor = ray.remote(num_cpus=0)(ExpertGroup)
        self._actors = [actor.remote(dict(folders), sizes, list(home)) for home in homes]
        self._gates = {name: Layer(folder, sizes, indices=()) for name, folder in folders.items()}

    def call(self, rows: Rows, model: str) -> Rows:
        """One layer, waiting for all actors at once."""
        with torch.inference_mode():
            groups, calls = self._send(rows, model)
            return self._combine(rows, groups, ray.get(calls, timeout=60.0))

    async def acall(self, rows: Rows, model: str) -> Rows:
        """As `call`, on the event loop."""
        with torch.inference_mode():
            groups, calls = self._send(rows, model)
        answers = await asyncio.gather(*calls)
        with torch.inference_mode():
            return self._combine(rows, groups, answers)

    def _send(self, rows: Rows, model: str) -> tuple[list[list[Any]], list[Any]]:
        x_TD = to_torch(rows)
        homes: dict[int, list[Any]] = {}
        for group in groups_of(*self._gates[model].choose(x_TD)):
            homes.setdefault(group[0] % self._count, []).append(group)
        calls = [
            self._actors[home].forward.remote(model, [index for index, _, _ in groups], [to_numpy(x_TD[token]).view(np.uint16) for _, token, _ in groups])
            for home, groups in homes.items()
        ]
        return list(homes.values()), calls

    def _combine(self, rows: Rows, groups: list[list[Any]], answers: Sequence[Sequence[Rows]]) -> Rows:
        total_TD = torch.zeros(rows.shape, dtype=torch.float32)
        for home, parts in zip(groups, answers, strict=True):
            for (_, token, weight), part in zip(home, parts, strict=True):
                total_TD.index_add_(0, token, to_torch(np.array(part).view(BF16)).float().mul_(weight))
        return to_numpy(total_TD.to(torch.bfloat16))
