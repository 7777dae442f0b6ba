"""Ours, as a user calls it: the shipped clients against a router, blocking for one caller and async for many."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc

from bench.layer import Rows
from bench.settings import LAYER, Sizes
from cluster.scheduling import SHORT_SLICE_NS, ask_for_slices
from router_service.client import AsyncRouterClient, RouterClient
from router_service.client_request import ROUTER_PATH, DispatchMessages

ENDINGS = {grpc.StatusCode.RESOURCE_EXHAUSTED: "refused", grpc.StatusCode.DEADLINE_EXCEEDED: "late"}


class Peer:
    """Clients of one router; `address` and `token_file` as told. `short_slices`: its threads wait for their turn as short as a router's."""

    def __init__(self, folders: Mapping[str, Path], sizes: Sizes, options: Mapping[str, str]) -> None:  # noqa: ARG002  (every peer is made alike)
        if "short_slices" in options:
            ask_for_slices(SHORT_SLICE_NS)
        settings: dict[str, Any] = {"token": Path(options["token_file"]).read_text().strip(), "timeout_s": 30.0}
        self._blocking = RouterClient(options["address"], **settings)
        self._num_calls = 0
        self._async = AsyncRouterClient(options["address"], **settings)

    def call(self, rows: Rows, model: str) -> Rows:
        """One request; `MODEL@N` asks for N layers in turn."""
        name, _, layers = model.partition("@")
        self._num_calls += 1
        return self._blocking.dispatch(rows, model=name, layer=self._num_calls % int(layers) if layers else LAYER).hidden_states

    async def acall(self, rows: Rows, model: str) -> Rows:
        """One request."""
        return (await self._async.dispatch(rows, model=model, layer=LAYER)).hidden_states

    def message(self, rows: Rows, model: str) -> bytes:
        """What `attempt` sends."""
        return DispatchMessages(rows, {"model": model, "layer": LAYER}).whole

    async def attempt(self, message: bytes, timeout_s: float) -> str:
        """One attempt, without the client's retries and its work on tensors, which would be counted against who serves: answered, refused, late or failed."""
        call = self._async._opened().unary_unary(f"{ROUTER_PATH}/Dispatch", None, None)
        try:
            await call(message, timeout=timeout_s, metadata=self._async._core.metadata(len(message)))
        except grpc.RpcError as failure:
            return ENDINGS.get(failure.code(), "failed")
        return "answered"
