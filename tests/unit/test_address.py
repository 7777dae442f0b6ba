"""Where routers listen: siblings on one port, never beside a stranger, and again where they were before."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import psutil
import pytest

from cluster.core.actor_config import RouterConfig
from cluster.core.errors import ConfigError, NotReady
from cluster.core.status import ActorState
from kit.feed import FakeControl, control
from kit.link import FakeActor, running_actor, until
from kit.router import LAYER, TOKEN, RouterRig
from kit.router_process import config, make, placed_on
from router_service.address import RouterAddress
from router_service.client import AsyncRouterClient
from router_service.server import RouterActor

HOST = "127.0.0.1"
NUM_CLIENTS = 12
STRANGER = """
import socket, sys
taken = socket.socket()
taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
taken.bind(("127.0.0.1", int(sys.argv[1])))
taken.listen()
print(taken.getsockname()[1], flush=True)
sys.stdin.read()
"""


SIBLING = """
import asyncio, socket, sys
from cluster.core.actor_config import RouterConfig
from router_service.address import RouterAddress

taken = socket.socket()

async def listen(port):
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    taken.bind(("127.0.0.1", port))
    taken.listen()
    return taken.getsockname()[1]

address = RouterAddress(RouterConfig.model_validate_json(sys.argv[1]))
print(asyncio.run(address.listen(listen, patience_s=0.0)), flush=True)
sys.stdin.read()
"""


@contextmanager
def listening(script: str, argument: str) -> Iterator[int]:
    """A process that prints the port it listens on, and is killed in the end; the port."""
    with subprocess.Popen([sys.executable, "-c", script, argument], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


def stranger(port: int = 0) -> AbstractContextManager[int]:
    """Another program, which would share its port with anybody."""
    return listening(STRANGER, str(port))


def sibling(settings: RouterConfig) -> AbstractContextManager[int]:
    """A router's process, as far as its address is concerned."""
    return listening(SIBLING, settings.model_dump_json())


class Listener:
    """A listening socket as a router has it."""

    def __init__(self, stack: ExitStack, *, shares: bool = True) -> None:
        self.stack, self.shares = stack, shares

    async def __call__(self, port: int) -> int:
        made = self.stack.enter_context(socket.socket())
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(self.shares))
        try:
            made.bind((HOST, port))
        except OSError as error:
            message = "taken"
            raise ConfigError(message) from error
        made.listen()
        return int(made.getsockname()[1])


def settings_of(folder: Path, place: int = 0, *, port: int = 0, count: int = 2, control_address: str = "127.0.0.1:1") -> RouterConfig:
    return config(folder, control_address, port=port, count=count).model_copy(update={"router_id": f"router-{place}"})


async def test_the_first_router_picks_a_port_and_those_that_start_with_it_follow(tmp_path: Path) -> None:
    with ExitStack() as stack:
        addresses = [RouterAddress(settings_of(tmp_path, place, count=4)) for place in range(4)]
        ports = await asyncio.gather(*(address.listen(Listener(stack), patience_s=0.0) for address in addresses))
        assert len(set(ports)) == 1
    with ExitStack() as stack:
        assert await RouterAddress(settings_of(tmp_path)).listen(Listener(stack), patience_s=0.0) == ports[0]


async def test_a_port_that_a_stranger_would_share_is_refused_by_name(tmp_path: Path) -> None:
    with stranger() as port, ExitStack() as stack:
        assert await Listener(stack)(port) == port  # nobody is told that the two get each other's callers
    with stranger() as port, ExitStack() as stack, pytest.raises(ConfigError, match=f"port {port}: .* no router of this deployment .* another router.port"):
        await RouterAddress(settings_of(tmp_path, port=port)).listen(Listener(stack), patience_s=0.0)
    with ExitStack() as stack:
        assert await RouterAddress(settings_of(tmp_path, port=port)).listen(Listener(stack), patience_s=0.0) == port


async def test_a_sibling_that_hangs_in_its_turn_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router_service.address.TURN_S", 0.2)
    hanging, waiting = RouterAddress(settings_of(tmp_path)), RouterAddress(settings_of(tmp_path, 1))
    with ExitStack() as stack:
        async with hanging._turn():
            with pytest.raises(NotReady, match="hangs; end its process"):
                await waiting.listen(Listener(stack), patience_s=0.0)
        assert await waiting.listen(Listener(stack), patience_s=0.0) > 0


async def test_elsewhere_than_on_linux_several_routers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    with ExitStack() as stack, pytest.raises(ConfigError, match=r"router\.count: only Linux"):
        await RouterAddress(settings_of(tmp_path)).listen(Listener(stack), patience_s=0.0)


async def test_where_any_port_will_do_one_that_a_stranger_took_meanwhile_is_left_to_it(tmp_path: Path) -> None:
    with ExitStack() as stack:
        before = await RouterAddress(settings_of(tmp_path)).listen(Listener(stack), patience_s=0.0)
    with stranger(before), ExitStack() as stack:
        ports = await asyncio.gather(*(RouterAddress(settings_of(tmp_path, place)).listen(Listener(stack), patience_s=0.2) for place in (0, 1)))
    assert ports[0] == ports[1] != before


async def test_routers_do_not_part_when_a_stranger_joins_them(tmp_path: Path) -> None:
    following = RouterAddress(settings_of(tmp_path, 1))
    with sibling(settings_of(tmp_path)) as port, ExitStack() as stack:
        assert await following.listen(Listener(stack), patience_s=0.0) == port
        with stranger(port), pytest.raises(ConfigError, match="no router of this deployment"):
            await following.listen(Listener(stack), patience_s=0.2)


async def test_a_router_that_shares_with_nobody_asks_nobody(tmp_path: Path) -> None:
    with ExitStack() as stack:
        port = await RouterAddress(settings_of(tmp_path, count=1)).listen(Listener(stack, shares=False), patience_s=0.0)
        with pytest.raises(ConfigError, match="taken"):
            await RouterAddress(settings_of(tmp_path, count=1, port=port)).listen(Listener(stack), patience_s=0.0)
    assert {path.name for path in (tmp_path / "store" / "routers").iterdir()} == {"test-router-0.port"}


@asynccontextmanager
async def two_routers(folder: Path) -> AsyncIterator[tuple[list[RouterActor], str, FakeActor, FakeControl]]:
    """Two whole routers on one port, both with a table."""
    async with control() as feed, running_actor() as actor:
        await feed.publish(placed_on(actor))
        routers = [make(settings_of(folder, place, control_address=feed.address)) for place in (0, 1)]
        seen = await asyncio.gather(*(router.start("node-1") for router in routers))
        assert seen[0].port == seen[1].port != 0
        assert seen[0].metrics_port != seen[1].metrics_port
        try:
            yield routers, f"{HOST}:{seen[0].port}", actor, feed
        finally:
            await asyncio.gather(*(router.stop(1.0) for router in routers))


def answered(router: RouterActor) -> int:
    """Requests that it has answered."""
    parts = router._parts
    assert parts is not None
    return parts.counters.requests_total


def num_listening(address: str) -> int:
    """How many sockets of this process listen there."""
    mine = psutil.Process().net_connections("tcp")
    return sum(entry.status == psutil.CONN_LISTEN and address.endswith(f":{entry.laddr.port}") for entry in mine)


async def test_connections_of_one_client_reach_both_routers_which_answer_alike(tmp_path: Path) -> None:
    async with two_routers(tmp_path) as (routers, address, _, _):
        async with AsyncRouterClient(address, token=TOKEN, timeout_s=20.0, connections=32) as client:
            replies = [await client.dispatch(RouterRig.rows(), layer=LAYER) for _ in range(32)]
        assert all((reply.hidden_states == replies[0].hidden_states).all() for reply in replies)
        counts = [answered(router) for router in routers]
        assert min(counts) > 0
        assert sum(counts) == 32


async def test_a_router_that_drains_ends_what_it_has_and_new_callers_reach_its_sibling(tmp_path: Path) -> None:
    async with two_routers(tmp_path) as (routers, address, actor, _):
        actor.compute.gate.clear()
        async with AsyncRouterClient(address, token=TOKEN, timeout_s=20.0) as client:
            under_way = asyncio.create_task(client.dispatch(RouterRig.rows(), layer=LAYER))
            await until(lambda: bool(actor.compute.frames))
            leaving, staying = sorted(routers, key=lambda router: router._parts.servicer.num_in_flight, reverse=True)
            stopping = asyncio.create_task(leaving.stop(20.0))
            await until(lambda: num_listening(address) == 1)
            for _ in range(NUM_CLIENTS):
                async with AsyncRouterClient(address, token=TOKEN, timeout_s=20.0, connections=2) as other:
                    assert (await other.status()).state == "SERVING"
            actor.compute.gate.set()
            assert (await under_way).report.outcomes["exact"] == 10
            await stopping
            assert (await leaving.report()).state is ActorState.DEAD
            assert (await client.dispatch(RouterRig.rows(), layer=LAYER)).report.outcomes["exact"] == 10
            assert answered(staying) == 1


async def test_a_router_takes_callers_only_once_it_has_a_table(tmp_path: Path) -> None:
    async with control() as feed, running_actor() as actor:
        router = make(settings_of(tmp_path, control_address=feed.address))
        starting = asyncio.create_task(router.start("node-1"))
        await until(lambda: bool(feed.watches))
        assert (await router.report()).port == 0
        await feed.publish(placed_on(actor))
        seen = await starting
        async with AsyncRouterClient(f"{HOST}:{seen.port}", token=TOKEN, timeout_s=20.0) as client:
            assert (await client.status()).state == "SERVING"
        await router.stop(1.0)
