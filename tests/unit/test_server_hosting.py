from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.core.spec import SchedulingSpec
from cluster.core.status import ActorState
from cluster.scheduling import may_come_forward
from kit.feed import CONTROL_TOKEN
from kit.link import SECRET
from kit.router import TOKEN
from kit.router_process import config, store
from router_service.client import AsyncRouterClient
from router_service.hosting import RouterHost
from router_service.server import RouterSecrets

SCRIPT = """
import asyncio, sys
from cluster.core.actor_config import RouterConfig
from router_service.server import RouterActor, RouterSecrets

async def main():
    hosted = RouterActor(RouterConfig.model_validate_json(sys.argv[1]), RouterSecrets(b"link", b"control"))
    await hosted.start("node-1")
    print("ready", flush=True)
    await hosted.stopped.wait()
    print((await hosted.report()).state, flush=True)

asyncio.run(main())
"""


def test_sigterm_stops_a_router_in_order(tmp_path: Path) -> None:
    settings = config(tmp_path, "127.0.0.1:1").model_dump_json()
    with subprocess.Popen([sys.executable, "-c", SCRIPT, settings], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "dead\n"
        assert process.wait(20) == 0


# As Ray hosts it: the loop that started the router is gone, the main thread waits elsewhere, and SIGTERM ends in sys.exit.
HOSTED = """
import asyncio, atexit, signal, sys
from cluster.core.actor_config import RouterConfig
from router_service.server import RouterSecrets
from router_service.hosting import RouterHost

hosted = RouterHost(RouterConfig.model_validate_json(sys.argv[1]), RouterSecrets(b"link", b"control"))
atexit.register(lambda: print(hosted._router._observation.state, flush=True))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
seen = asyncio.run(hosted.start("node-1"))
print(seen.port, flush=True)
signal.pause()
"""


async def test_a_hosted_router_drains_when_its_process_is_told_to_exit(tmp_path: Path) -> None:
    settings = config(tmp_path, "127.0.0.1:1").model_dump_json()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", HOSTED, settings, stdout=asyncio.subprocess.PIPE)
    try:
        port = int(await process.stdout.readline())
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""), timeout=30)
            seen = [(await watch.read()).status]
            process.send_signal(signal.SIGTERM)
            seen.append((await watch.read()).status)
            watch.cancel()
        assert seen == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]
        assert await process.stdout.read() == b"dead\n"
        assert await process.wait() == 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


# A system that lets the process come back to normal priority and no further, as RLIMIT_NICE may.
LIMITED = """
import os
raised = os.setpriority

def limited(which, who, niceness):
    if niceness < 0:
        raise PermissionError
    raised(which, who, niceness)

os.setpriority = limited
os.nice(10)
"""


@pytest.mark.skipif(os.nice(0) != 0 or not may_come_forward(), reason="this user may not raise a priority (root may)")
def test_a_router_that_may_not_go_before_others_still_comes_forward(tmp_path: Path) -> None:
    settings = config(tmp_path, "127.0.0.1:1")
    settings = settings.model_copy(update={"spec": settings.spec.model_copy(update={"scheduling": SchedulingSpec()})})
    assert settings.spec.scheduling.answering_niceness < 0 == settings.spec.scheduling.niceness
    with subprocess.Popen([sys.executable, "-c", LIMITED + HOSTED, settings.model_dump_json()], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline())
        threads = [int(entry.name) for entry in Path(f"/proc/{process.pid}/task").iterdir()]
        found = {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}
        process.send_signal(signal.SIGTERM)
    assert found == {0}


async def test_a_hosted_router_serves_and_stops_from_any_loop(tmp_path: Path) -> None:
    hosted = RouterHost(config(tmp_path, "127.0.0.1:1"), RouterSecrets(SECRET, CONTROL_TOKEN), store=store())
    assert (await hosted.report()).state is ActorState.STARTING
    seen = await hosted.start("node-1")
    assert await asyncio.to_thread(lambda: asyncio.run(hosted.start("node-1"))) == seen == await hosted.report()
    async with AsyncRouterClient(f"{seen.host}:{seen.port}", token=TOKEN, timeout_s=20.0) as client:
        assert (await client.status()).state == "STARTING"
    await hosted.stop(1.0)
    assert not hosted._thread.is_alive()
    assert (await hosted.report()).state is ActorState.DEAD
    await hosted.stop(1.0)
