"""Ours, as a user calls it: the shipped clients against a router, blocking for one caller and async for many."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc

from bench.layer import Rows
from bench.settings import LAYER, Sizes
from cluster.core.errors import DeadlineExceeded, Overloaded
from router_service.client import AsyncRouterClient, RouterClient
from router_service.client_errors import error_of
from router_service.client_request import DispatchMessages


class Peer:
    """Clients of one router; `address` and `token_file` as told."""

    def __init__(self, folders: Mapping[str, Path], sizes: Sizes, options: Mapping[str, str]) -> None:  # noqa: ARG002  (every peer is made alike)
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

    async def attempt(self, rows: Rows, model: str, timeout_s: float) -> str:
        """One attempt, without the client's retries: answered, refused, late or failed."""
        messages = DispatchMessages(rows, {"model": model, "layer": LAYER})
        try:
            await self._async._send_whole(messages, timeout_s, "")
        except grpc.RpcError as failure:
            match error_of(failure, address=""):
                case Overloaded():
                    return "refused"
                case DeadlineExceeded():
                    return "late"
            return "failed"
        return "answered"
