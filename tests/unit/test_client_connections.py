"""How many connections a client keeps."""

from __future__ import annotations

import asyncio

import psutil
import pytest

from cluster.core.errors import ConfigError
from kit.router import LAYER, EchoPipeline, router
from router_service.client import RouterClient


def num_connected(address: str) -> int:
    """Connections of this process to an address."""
    port = int(address.rpartition(":")[2])
    mine = psutil.Process().net_connections("tcp")
    return sum(entry.status == psutil.CONN_ESTABLISHED and bool(entry.raddr) and entry.raddr.port == port for entry in mine)


@pytest.mark.parametrize("connections", [1, 3])
async def test_calls_take_turns_over_as_many_connections_as_were_asked_for(connections: int) -> None:
    async with router(EchoPipeline()) as rig, rig.client(connections=connections) as client:
        for _ in range(2 * connections):
            await client.dispatch(rig.rows(), layer=LAYER)
        assert num_connected(rig.address) == connections
    async with router(EchoPipeline()) as rig:
        with rig.blocking_client(connections=connections) as blocking:
            for _ in range(2 * connections):
                await asyncio.to_thread(blocking.dispatch, rig.rows(), layer=LAYER)
            assert num_connected(rig.address) == connections


@pytest.mark.parametrize("connections", [0, 257])
def test_a_number_of_connections_that_cannot_be_is_refused(connections: int) -> None:
    with pytest.raises(ConfigError, match="connections must be between 1 and 256"):
        RouterClient("127.0.0.1:1", connections=connections)
