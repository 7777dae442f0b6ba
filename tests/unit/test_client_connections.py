"""How many connections a client keeps."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn

from cluster.core.errors import ConfigError
from kit.pipelines import NAME, E, K
from kit.router import LAYER, EchoPipeline, router
from router_service.client import RouterClient
from router_service.hf import register_cluster_experts


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


async def test_a_models_experts_keep_as_many_connections_as_their_registration_says() -> None:
    module = nn.Module()
    module.config, module.num_experts, module._moelastic_layer = SimpleNamespace(moelastic_model=NAME), E, LAYER
    ids = torch.zeros((5, K), dtype=torch.int32)
    async with router(EchoPipeline()) as rig:
        experts = register_cluster_experts(rig.address, token=rig.token, name="moelastic-three-lines", connections=3)
        rows = torch.from_numpy(rig.rows())
        for _ in range(6):
            assert torch.equal(await asyncio.to_thread(experts, module, rows, ids, ids.float()), rows)
        assert num_connected(rig.address) == 3
        experts.close()
    with pytest.raises(ConfigError, match="connections must be between 1 and 256"):
        register_cluster_experts("127.0.0.1:1", name="moelastic-no-line", connections=0)


@pytest.mark.parametrize("connections", [0, 257])
def test_a_number_of_connections_that_cannot_be_is_refused(connections: int) -> None:
    with pytest.raises(ConfigError, match="connections must be between 1 and 256"):
        RouterClient("127.0.0.1:1", connections=connections)
