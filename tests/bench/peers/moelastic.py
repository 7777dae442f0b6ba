"""Ours, as a user calls it: the shipped clients against a router, blocking for one caller and async for many."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.layer import Rows
from bench.settings import LAYER, Sizes
from router_service.client import AsyncRouterClient, RouterClient


class Peer:
    """Clients of one router; `address` and `token_file` as told."""

    def __init__(self, folders: Mapping[str, Path], sizes: Sizes, options: Mapping[str, str]) -> None:  # noqa: ARG002  (every peer is made alike)
        settings: dict[str, Any] = {"token": Path(options["token_file"]).read_text().strip(), "timeout_s": 30.0}
        self._blocking = RouterClient(options["address"], **settings)
        self._async = AsyncRouterClient(options["address"], **settings)

    def call(self, rows: Rows, model: str) -> Rows:
        """One request."""
        return self._blocking.dispatch(rows, model=model, layer=LAYER).hidden_states

    async def acall(self, rows: Rows, model: str) -> Rows:
        """One request."""
        return (await self._async.dispatch(rows, model=model, layer=LAYER)).hidden_states
