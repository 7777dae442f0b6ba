"""A Python gRPC service that returns the bytes it is given: what any Python gRPC service costs before it does anything. Run as a module it is the server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from bench.layer import Rows
from bench.settings import Sizes

METHOD = "/bench.Echo/Echo"


class Peer:
    """A client of the echo service at `address`."""

    def __init__(self, folders: Mapping[str, Path], sizes: Sizes, options: Mapping[str, str]) -> None:  # noqa: ARG002  (every peer is made alike)
        self._address = options["address"]
        self._call = grpc.insecure_channel(self._address).unary_unary(METHOD)
        self._acall: Any = None

    def call(self, rows: Rows, model: str) -> Rows:  # noqa: ARG002
        """There and back."""
        return np.frombuffer(self._call(rows.tobytes(), timeout=30.0), rows.dtype).reshape(rows.shape)

    async def acall(self, rows: Rows, model: str) -> Rows:  # noqa: ARG002
        """There and back."""
        if self._acall is None:
            self._acall = grpc.aio.insecure_channel(self._address).unary_unary(METHOD)
        return np.frombuffer(await self._acall(rows.tobytes(), timeout=30.0), rows.dtype).reshape(rows.shape)


class _Echo(grpc.GenericRpcHandler):
    def service(self, handler_call_details: Any) -> Any:  # noqa: ARG002  (one method is all there is)
        async def echo(request: bytes, _: Any) -> bytes:
            return request

        return grpc.unary_unary_rpc_method_handler(echo)


async def serve() -> None:
    """Serve until stdin ends; the port is printed."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(serve())
