"""A router that cannot go on as it is: it keeps what still works, or ends so that its host starts another."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.core.errors import InvalidRequest, NotReady
from cluster.core.routing_table import RoutingTable, TableModel
from cluster.core.spec import AuthSpec
from cluster.core.status import ActorState
from kit.feed import CONTROL_TOKEN, control
from kit.link import SECRET, until
from kit.pipelines import NAME, D
from kit.router import LAYER, router
from kit.router_process import FakeStore, config, make, placed_on, running, store
from router_service.auth import operators_of
from router_service.hosting import FAULT_EXIT_CODE, RouterHost
from router_service.server import RouterSecrets
from router_service.wire_views import LinkView

ODD = "f" * 64


async def _fail(*_: object) -> None:
    message = "a bug"
    raise RuntimeError(message)


@pytest.mark.parametrize("broken", ["feed", "look"])
async def test_a_router_whose_feed_or_look_died_drains_and_ends_instead_of_serving_a_stale_table(tmp_path: Path, broken: str) -> None:
    ended = asyncio.Event()
    async with running(tmp_path) as rig:
        await rig.control.publish(placed_on(rig.actor))
        await rig.serving(1)
        rig.router._on_fault = ended.set
        rig.actor.compute.gate.clear()
        under_way = asyncio.create_task(rig.dispatch())
        await until(lambda: bool(rig.actor.compute.frames))
        if broken == "feed":
            rig.router._parts.lanes.apply = _fail
            await rig.control.publish(placed_on(rig.actor, epoch=2))
        else:
            rig.router._parts.measure_links = None
        await until(lambda: rig.router._parts.is_draining)
        with pytest.raises(NotReady):
            await rig.dispatch(timeout_s=0.05)
        rig.actor.compute.gate.set()
        assert (await under_way).report.outcomes["exact"] == 6
        async with asyncio.timeout(20):
            await ended.wait()
        seen = await rig.router.report()
        assert seen.state is ActorState.DEAD
        assert "ended with" in seen.reason


async def test_a_hosted_router_that_cannot_go_on_leaves_its_process(tmp_path: Path) -> None:
    left, codes = threading.Event(), []

    def leave(code: int) -> None:
        codes.append(code)
        left.set()

    async with control() as feed:
        hosted = RouterHost(config(tmp_path, feed.address), RouterSecrets(SECRET, CONTROL_TOKEN), store=store(), leave_process=leave)
        await hosted.start("node-1")
        hosted._router._parts.feed._adopt = _fail
        await feed.publish(RoutingTable(1))
        assert await asyncio.to_thread(left.wait, 20)
        await hosted.stop(1.0)
    assert codes == [FAULT_EXIT_CODE]


async def test_a_model_that_fails_to_load_in_any_way_leaves_the_others_served(tmp_path: Path) -> None:
    class Odd(FakeStore):
        def manifest(self, digest: str) -> Any:
            if digest == ODD:
                raise ZeroDivisionError
            return super().manifest(digest)

    async with running(tmp_path, Odd(store().manifests)) as rig:
        table = placed_on(rig.actor)
        await rig.control.publish(RoutingTable(1, table.actors, table.copies, {**table.models, "odd": TableModel("odd", ODD, 0, 0)}))
        await rig.serving(1)
        assert (await rig.dispatch(model=NAME)).report.outcomes["exact"] == 6
        assert (await rig.router.report()).reason == ""


async def test_a_request_at_the_advertised_limit_of_choices_is_served_and_one_above_it_is_refused_for_good(tmp_path: Path) -> None:
    async with running(tmp_path, max_queued_tokens=40) as rig:
        await rig.control.publish(placed_on(rig.actor))
        await rig.serving(1)
        limit = (await rig.client.model()).limits.max_choices_per_request
        assert limit == 40
        rows = np.ones((limit // 2 + 1, D), np.float32)
        assert (await rig.client.dispatch(rows[1:], layer=LAYER)).report.outcomes["exact"] == limit
        with pytest.raises(InvalidRequest, match=r"limit of 40 .*max_choices_per_request"):
            await rig.client.dispatch(rows, layer=LAYER)


async def test_a_model_without_a_copy_shows_no_replicas_in_the_metrics(tmp_path: Path) -> None:
    hosted = make(config(tmp_path, "127.0.0.1:1"))
    await hosted.start("node-1")
    parts = hosted._parts
    samples = []
    for missing in (0, 6):
        parts.measure_table(RoutingTable(1, {}, {}, {NAME: TableModel(NAME, "", 6, missing)}))
        samples.append(parts.metrics.registry.get_sample_value("moe_expert_replicas", {"model": NAME}))
    await hosted.stop(0.1)
    assert samples == [0.0, 0.0]


# Who sees the queues of single actors

LINK = LinkView("actor-3", 1, "node-1", "10.0.0.1:4711", "ready", queued_tokens=17, frames_in_flight=2, last_heard_age_s=0.1)


async def test_only_operators_see_the_queue_of_each_actor() -> None:
    tokens = {"default": "d" * 20, "other": "o" * 20}
    async with router(tokens=tokens, operators=frozenset({"default"})) as rig:
        rig.links = (LINK,)
        seen = {}
        for tenant, token in tokens.items():
            async with rig.client(token=token) as client:
                seen[tenant] = await client.status()
    assert [link.queued_tokens for link in seen["default"].links] == [17]
    assert seen["other"].links == ()
    assert seen["other"].state == seen["default"].state == "SERVING"


def test_the_only_tenant_is_an_operator_unless_others_are_named() -> None:
    path = Path("token")
    assert operators_of(AuthSpec(tokens={"default": path})) == {"default"}
    assert operators_of(AuthSpec(enabled=False)) == {"default"}
    assert operators_of(AuthSpec(tokens={"default": path, "b": path})) == frozenset()
    assert operators_of(AuthSpec(tokens={"a": path})) == frozenset()
    assert operators_of(AuthSpec(tokens={"default": path, "b": path}, operators=frozenset({"b"}))) == {"b"}
