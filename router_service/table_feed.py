"""The router's end of the control service: the routing table as it changes, and what the router sees, reported back.

A feed that breaks is reconnected with backoff; until then the router keeps the table it has. Older epochs and older controllers are refused.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final

import grpc

from cluster.core.errors import MoeError, StaleTable
from cluster.core.ids import ExpertId, Role
from cluster.core.routing_table import RoutingTable, newer
from cluster.core.table_codec import from_proto
from protos.moelastic.control.v1 import control_pb2, control_pb2_grpc
from router_service.core.trust import Accusation
from router_service.core.verdicts import State
from router_service.lanes import LinkState
from router_service.link_client import LinkPhase

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 2.0
REPORT_TIMEOUT_S: Final = 2.0
MAX_TABLE_BYTES: Final = 64 << 20
MAX_EVIDENCE_CHARACTERS: Final = 200
Adopt = Callable[[RoutingTable], Awaitable[None]]


class TableFeed:
    """Follows the table of one controller address. `adopt` is awaited with each newer table before it counts as current."""

    def __init__(self, address: str, control_token: bytes, *, router_id: str, adopt: Adopt, rng: random.Random) -> None:
        self.table: RoutingTable | None = None
        self.is_connected = False
        self.router_generation = 0
        self.controller_generation = 0
        self._address = address
        self._metadata = (("authorization", f"Bearer {control_token.hex()}"),)
        self._router_id = router_id
        self._adopt = adopt
        self._rng = rng
        self._heard_s = time.monotonic()
        self._channel: grpc.aio.Channel | None = None

    @property
    def table_age_s(self) -> float:
        """Seconds since the controller last stood behind the table: 0 while it is connected."""
        return 0.0 if self.is_connected else time.monotonic() - self._heard_s

    async def run(self) -> None:
        """Follow until cancelled."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            epoch = self._epoch
            try:
                await self._watch()
            except grpc.aio.AioRpcError as error:
                logger.info("table feed from %s broke (%s); the table of epoch %d stays in use", self._address, error.code().name, self._epoch)
            except MoeError as error:
                logger.warning("table feed from %s refused: %s", self._address, error)
            finally:
                self._lost()
            backoff_s = FIRST_BACKOFF_S if self._epoch > epoch else min(2 * backoff_s, MAX_BACKOFF_S)
            await asyncio.sleep(backoff_s * self._rng.uniform(0.5, 1.0))

    async def report(self, links: Iterable[LinkState], loads: Mapping[ExpertId, int], window_s: float, wrong: Mapping[Accusation, int]) -> bool:
        """Tell the controller what is seen; False when it could not be reached in time."""
        request = control_pb2.ReportHealthRequest(
            router_id=self._router_id,
            router_generation=self.router_generation,
            epoch=self._epoch,
            links=[_link_message(link) for link in links],
            loads=[control_pb2.ExpertLoad(model=expert.model, layer=expert.layer, index=expert.index, tokens=tokens) for expert, tokens in loads.items()],
            window_s=window_s,
            wrong_numbers=[_wrong_message(accusation, count) for accusation, count in wrong.items()],
        )
        try:
            await self._stub().ReportHealth(request, timeout=REPORT_TIMEOUT_S, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            logger.debug("health report to %s failed (%s)", self._address, error.code().name)
            return False
        return True

    async def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            await self._channel.close()

    @property
    def _epoch(self) -> int:
        return 0 if self.table is None else self.table.epoch

    async def _watch(self) -> None:
        request = control_pb2.WatchTableRequest(router_id=self._router_id, router_generation=self.router_generation, last_epoch=self._epoch)
        call = self._stub().WatchTable(request, metadata=self._metadata)
        try:
            async for message in call:
                await self._take(message)
        finally:
            call.cancel()

    async def _take(self, message: control_pb2.WatchTableResponse) -> None:
        if message.controller_generation < self.controller_generation:
            text = f"controller generation {message.controller_generation} is older than {self.controller_generation}, which was heard before; it must stop"
            raise StaleTable(text)
        table = newer(self.table, from_proto(message))
        self.controller_generation = message.controller_generation
        self.router_generation = message.router_generation or self.router_generation
        if self.table is None or table.epoch > self.table.epoch:
            await self._adopt(table)
            self.table = table
        self.is_connected = True
        self._heard_s = time.monotonic()

    def _lost(self) -> None:
        if self.is_connected:
            self._heard_s = time.monotonic()
        self.is_connected = False

    def _stub(self) -> control_pb2_grpc.ControlServiceStub:
        if self._channel is None:
            options = (
                ("grpc.max_receive_message_length", MAX_TABLE_BYTES),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 2000),
                ("grpc.keepalive_time_ms", 10_000),
                ("grpc.keepalive_timeout_ms", 5_000),
            )
            self._channel = grpc.aio.insecure_channel(self._address, options=options)
        return control_pb2_grpc.ControlServiceStub(self._channel)  # type: ignore[no-untyped-call]


def _link_message(link: LinkState) -> control_pb2.LinkHealth:
    # A link that has not failed yet counts as connected: the controller acts on those that are not.
    incarnation = link.endpoint.incarnation
    return control_pb2.LinkHealth(
        actor_id=incarnation.actor_id,
        generation=incarnation.generation,
        connected=link.phase is not LinkPhase.CLOSED,
        evidence=(link.evidence or link.reason)[:MAX_EVIDENCE_CHARACTERS],
        oldest_age_s=link.oldest_age_s,
        ejected=link.standing is State.EJECTED,
        suspected=link.standing is State.SUSPECTED,
        queued_tokens=link.queued_tokens,
    )


def _wrong_message(accusation: Accusation, count: int) -> control_pb2.WrongNumbers:
    expert, copy, kind = accusation
    return control_pb2.WrongNumbers(
        actor_id=copy.incarnation.actor_id,
        generation=copy.incarnation.generation,
        model=expert.model,
        layer=expert.layer,
        index=expert.index,
        version=bytes.fromhex(copy.version),
        role=control_pb2.ROLE_REPLICA if copy.role is Role.REPLICA else control_pb2.ROLE_SHADOW,
        kind=kind,
        count=count,
    )
