"""Ray Serve in two shapes, as its documentation recommends for composed and for batched models: a deployment for each expert, and one with all experts.

The handle is called from the caller's own process, without HTTP, which is Serve's fastest way in. One torch thread in each replica of an expert; the replica
with all experts is there with one thread and with one for each core, and each case is measured on the one that suits it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import serve

from bench.layer import BF16, Layer, Rows, groups_of, to_numpy, to_torch
from bench.settings import Sizes

MAX_BATCH = 64
BATCH_WAIT_S = 0.002
ONGOING = 256
OPTIONS = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": ONGOING}


class OneExpert:
    """One expert of every model; requests that wait together are computed together."""

    def __init__(self, folders: Mapping[str, Path], sizes: Sizes, index: int) -> None:
        torch.set_num_threads(1)
        self._experts = {name: Layer(folder, sizes, indices=[index]).experts[index] for name, folder in folders.items()}

    async def __call__(self, model: str, rows: Rows) -> Rows:
        """The expert's output."""
        with torch.inference_mode():
            return to_numpy(self._experts[model](to_torch(np.array(rows)))).view(np.uint16)


class AllExperts:
    """The whole layer in one replica, batched by `serve.batch`."""

    def __init__(self, folders: Mapping[str, Path], sizes: Sizes, threads: int) -> None:
        torch.set_num_threads(threads)
        self._layers = {name: Layer(folder, sizes) for name, folder in folders.items()}

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _batched(self, models: list[str], rows: list[Rows]) -> list[Rows]:
        answers: dict[int, Rows] = {}
        with torch.inference_mode():
            for model in set(models):
                members = [number for number, name in enumerate(models) if name == model]
                parts = [np.array(rows[number]) for number in members]
                joined = to_numpy(self._layers[model](to_torch(np.concatenate(parts)))).view(np.uint16)
                cuts = np.cumsum([len(part) for part in parts])[:-1]
                answers |= dict(zip(members, np.split(joined, cuts), strict=True))
        return [answers[number] for number in range(len(models))]

    async def __call__(self, model: str, rows: Rows) -> Rows:
        """The layer's output."""
        return await self._batched(model, rows)


class Peer:
    """The caller; `shape` is `per_expert` (gate and combine here) or `all_in_one`."""

    def __init__(self, folders: Mapping[str, Path], sizes: Sizes, options: Mapping[str, str]) -> None:
        torch.set_num_threads(1)
        ray.init(
            address=os.environ["RAY_ADDRESS"], runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"], "RAY_USE_UVLOOP": "1"}}, log_to_driver=False
        )
        self._gates = {name: Layer(folder, sizes, indices=()) for name, folder in folders.items()}
        self._experts: list[Any] = []
        self._whole: Any = None
        serve.start(proxy_location="Disabled")
        if options["shape"] == "all_in_one":
            threads = int(options["threads"])
            app = serve.deployment(**OPTIONS)(AllExperts).bind(dict(folders), sizes, threads)
            self._whole = serve.run(app, name=f"all_in_one_{threads}", route_prefix=None)
            return
        apps = [serve.deployment(**OPTIONS)(OneExpert).bind(dict(folders), sizes, index) for index in range(sizes.num_experts)]
        self._experts = serve.run_many([serve.RunTarget(app, name=f"expert_{index}", route_prefix=None) for index, app in enumerate(apps)])

    def call(self, rows: Rows, model: str) -> Rows:
        """One layer."""
        if self._whole is not None:
            return self._whole.remote(model, rows.view(np.uint16)).result(timeout_s=60.0).view(BF16)
        groups = self._groups(rows, model)
        calls = [self._experts[index].remote(model, to_numpy(to_torch(rows)[token]).view(np.uint16)) for index, token, _ in groups]
        return _combine(rows, groups, [call.result(timeout_s=60.0) for call in calls])

    async def acall(self, rows: Rows, model: str) -> Rows:
        """As `call`, on the event loop."""
        if self._whole is not None:
            return (await self._whole.remote(model, rows.view(np.uint16))).view(BF16)
        groups = self._groups(rows, model)
        calls = [self._experts[index].remote(model, to_numpy(to_torch(rows)[token]).view(np.uint16)) for index, token, _ in groups]
        return _combine(rows, groups, await asyncio.gather(*calls))

    def _groups(self, rows: Rows, model: str) -> list[Any]:
        with torch.inference_mode():
            return groups_of(*self._gates[model].choose(to_torch(rows)))


def _combine(rows: Rows, groups: list[Any], parts: list[Rows]) -> Rows:
    total_TD = torch.zeros(rows.shape, dtype=torch.float32)
    for (_, token, weight), part in zip(groups, parts, strict=True):
        total_TD.index_add_(0, token, to_torch(np.array(part).view(BF16)).float().mul_(weight))
    return to_numpy(total_TD.to(torch.bfloat16))
