"""Clients that are not ours: buf, which knows nothing but the address and reflection, and the upstream health client."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.core.routing_table import TableCopy
from kit.pipelines import D, one_copy_each, table
from kit.router import LAYER, TOKEN, RouterRig, router
from router_service.front import may_reflect
from router_service.health import SERVICE

BUF = Path(sys.executable).parent / "buf"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def buf_curl(rig: RouterRig, method: str, request: Any, home: Path, *, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    command = [str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--reflect-protocol", "grpc-v1alpha"]
    if token is not None:
        command += ["--header", f"authorization: Bearer {token}", "--reflect-header", f"authorization: Bearer {token}"]
    command += ["--data", json.dumps(request), f"http://{rig.address}/{method}"]
    environment = {"HOME": str(home), "BUF_CACHE_DIR": str(home), "PATH": "/usr/bin:/bin"}
    return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, env=environment, check=False)


async def test_a_stranger_with_reflection_only_can_ask_what_to_send_and_send_it(tmp_path: Path) -> None:
    async with router(has_reflection=True) as rig:
        found = await buf_curl(rig, f"{SERVICE}/GetModel", {}, tmp_path)
        assert found.returncode == 0, found.stderr
        model = json.loads(found.stdout)
        assert model["layers"][-1]["hiddenSize"] == D
        rows = np.ones((2, D), np.float32)
        request = {
            "model": model["name"],
            "layer": model["layers"][-1]["layer"],
            "hiddenStates": {"dtype": "D_TYPE_FP32", "shape": ["2", str(D)], "data": base64.b64encode(rows.tobytes()).decode()},
        }
        replied = await buf_curl(rig, f"{SERVICE}/Dispatch", request, tmp_path)
        assert replied.returncode == 0, replied.stderr
        reply = json.loads(replied.stdout)
        async with rig.client() as client:
            own = await client.dispatch(rows, layer=LAYER)
    assert base64.b64decode(reply["hiddenStates"]["data"]) == own.hidden_states.tobytes()
    assert reply["report"]["exact"] == str(own.report.outcomes["exact"])


async def test_a_strangers_mistake_is_explained_in_words_that_stand_alone(tmp_path: Path) -> None:
    async with router(has_reflection=True) as rig:
        request = {"model": "tiny", "layer": LAYER, "hiddenStates": {"dtype": "D_TYPE_FP32", "shape": ["2", "3"], "data": ""}}
        failed = await buf_curl(rig, f"{SERVICE}/Dispatch", request, tmp_path)
    assert failed.returncode != 0
    assert "invalid_argument" in failed.stderr
    assert "hidden_states.shape needs 24 bytes of fp32 and hidden_states.data has 0; they must be equal" in failed.stderr


async def test_health_is_open_to_a_stranger_who_knows_its_name(tmp_path: Path) -> None:
    async with router(has_reflection=True) as rig:
        found = await buf_curl(rig, "grpc.health.v1.Health/Check", {"service": f"model/{rig.model}"}, tmp_path)
    assert json.loads(found.stdout) == {"status": "SERVING"}


async def test_without_a_token_a_stranger_learns_nothing(tmp_path: Path) -> None:
    async with router(has_reflection=True) as rig:
        failed = await buf_curl(rig, f"{SERVICE}/GetModel", {}, tmp_path, token=None)
    assert failed.returncode != 0
    assert "failed to find service" in failed.stderr
    assert "tiny" not in failed.stderr + failed.stdout


async def test_without_reflection_a_stranger_is_told_so(tmp_path: Path) -> None:
    async with router() as rig:
        failed = await buf_curl(rig, f"{SERVICE}/GetModel", {}, tmp_path)
    assert failed.returncode != 0
    assert "failed to find service" in failed.stderr


@pytest.mark.parametrize(
    ("setting", "host", "served"),
    [
        ("auto", "127.0.0.1", True),
        ("auto", "::1", True),
        ("auto", "localhost", True),
        ("auto", "0.0.0.0", False),  # noqa: S104  (nothing listens)
        ("auto", "10.1.2.3", False),
        ("auto", "node-7", False),
        ("on", "10.1.2.3", True),
        ("off", "127.0.0.1", False),
    ],
)
def test_reflection_is_on_for_loopback_only_unless_it_is_asked_for(setting: Any, host: str, served: bool) -> None:
    assert may_reflect(setting, host) is served


# Health


def no_copies(_layer: int, _index: int) -> list[TableCopy]:
    return []


async def status_of(rig: RouterRig, service: str) -> int:
    async with grpc.aio.insecure_channel(rig.address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    return int(answer.status)


async def test_health_follows_the_table_and_the_process_stays_up() -> None:
    names = (SERVICE, "model/tiny")
    async with router() as rig:
        assert [await status_of(rig, name) for name in names] == [SERVING, SERVING]
        await rig.show(table(lambda layer, index: [] if index == 1 else one_copy_each(layer, index)))
        assert [await status_of(rig, name) for name in names] == [NOT_SERVING, NOT_SERVING]
        await rig.show(table(epoch=9))
        assert [await status_of(rig, name) for name in names] == [SERVING, SERVING]
        await rig.show(None)
        assert [await status_of(rig, name) for name in names] == [NOT_SERVING, NOT_SERVING]
        assert await status_of(rig, "") == SERVING


async def test_an_unknown_model_is_not_found() -> None:
    async with router() as rig:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await status_of(rig, "model/other")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_watcher_sees_every_change_and_draining_is_the_last() -> None:
    async with router() as rig, grpc.aio.insecure_channel(rig.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="model/tiny"))
        seen = [(await watch.read()).status]
        await rig.show(table(no_copies))
        seen.append((await watch.read()).status)
        await rig.show(table(epoch=9))
        seen.append((await watch.read()).status)
        await rig.health.drain()
        seen.append((await watch.read()).status)
        assert seen == [SERVING, NOT_SERVING, SERVING, NOT_SERVING]
        await rig.show(table(epoch=10))
        assert await status_of(rig, "") == NOT_SERVING
        watch.cancel()
