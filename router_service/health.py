"""grpc.health.v1 as probes read it: `""` = the process is up, the router service and `model/NAME` = every expert has a copy. Draining: all NOT_SERVING."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio

SERVICE: Final = "moelastic.router.v1.RouterService"


class HealthBoard:
    """Keeps the upstream health servicer in step with the routing table."""

    def __init__(self) -> None:
        self.servicer = aio.HealthServicer()
        self._named: set[str] = set()

    async def update(self, models: Collection[str], complete: Collection[str]) -> None:
        """Show which of the models can be served. One that is no longer named is NOT_SERVING: upstream cannot forget a name."""
        self._named |= set(models)
        for name in self._named:
            await self._set(f"model/{name}", serving=name in complete)
        await self._set(SERVICE, serving=bool(models) and set(models) <= set(complete))

    async def drain(self) -> None:
        """Everything is NOT_SERVING from now on."""
        await self.servicer.enter_graceful_shutdown()

    async def _set(self, service: str, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self.servicer.set(service, status)
