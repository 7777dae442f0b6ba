"""A control service that says what a test tells it to, and keeps what routers report."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from cluster.core.routing_table import RoutingTable
from cluster.core.table_codec import to_proto
from protos.moelastic.control.v1 import control_pb2 as pb
from protos.moelastic.control.v1 import control_pb2_grpc

CONTROL_TOKEN = b"control-token-of-the-tests"


class FakeControl(control_pb2_grpc.ControlServiceServicer):
    """Sends `messages` to every watcher, in order, then what `publish` adds."""

    def __init__(self) -> None:
        self.messages: list[pb.WatchTableResponse] = []
        self.watches: list[pb.WatchTableRequest] = []
        self.reports: list[pb.ReportHealthRequest] = []
        self.tokens: set[str] = set()
        self.address = ""
        self._changed = asyncio.Condition()
        self._ends = 0

    async def publish(self, table: RoutingTable, *, controller_generation: int = 1, router_generation: int = 5) -> None:
        """Send a table to all who watch, now and later."""
        self.messages.append(to_proto(table, router_generation=router_generation, controller_generation=controller_generation))
        await self._wake()

    async def end_watches(self) -> None:
        """End the streams of all who watch now; what was sent before is forgotten."""
        self.messages = self.messages[-1:]
        self._ends += 1
        await self._wake()

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def WatchTable(self, request: pb.WatchTableRequest, context: Any) -> AsyncIterator[pb.WatchTableResponse]:  # noqa: N802
        self.watches.append(request)
        self.tokens.update(str(value) for key, value in context.invocation_metadata() if key == "authorization")
        ends, sent = self._ends, 0
        while ends == self._ends:
            while sent < len(self.messages):
                yield self.messages[sent]
                sent += 1
            async with self._changed:
                while ends == self._ends and sent >= len(self.messages):
                    await self._changed.wait()

    async def ReportHealth(self, request: pb.ReportHealthRequest, context: Any) -> pb.ReportHealthResponse:  # noqa: N802, ARG002
        self.reports.append(request)
        return pb.ReportHealthResponse()


@asynccontextmanager
async def control(port: int = 0, servicer: FakeControl | None = None) -> AsyncIterator[FakeControl]:
    """A listening FakeControl."""
    made = servicer or FakeControl()
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    control_pb2_grpc.add_ControlServiceServicer_to_server(made, server)
    made.address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    await server.start()
    try:
        yield made
    finally:
        await server.stop(0)
