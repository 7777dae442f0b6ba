"""Chaos on real Ray: one actor is really killed and one is really stopped, under load whose every answer is checked. Times are recorded, not asserted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from chaos.campaign import Campaign, Outcome, run
from chaos.core.run_machine import Ending
from chaos.target import LocalTarget
from cluster.core.descriptors import DType
from cluster.core.spec import ActorsSpec, ClusterSpec, ModelSpec, RouterSpec, ShadowSpec
from cluster.local.cluster import LocalCluster
from kit.chaos import action, scenario_file
from kit.deployments import Deployment, is_alive
from kit.models import save_custom
from kit.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
LOAD = {"rate": 10.0, "tokens": 8, "timeout_s": 20.0}
SOUND = ("failed", "late", "wrong", "unchecked", "unaccounted", "stale", "epoch_regressions")


@pytest.fixture(scope="module")
def deployment(deploy: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    model = save_custom(tmp_path_factory.mktemp("model") / "struck")
    spec = ClusterSpec(
        name="struck",
        models=(ModelSpec(name="m", path=model, dtype=DType.BF16, shadow=ShadowSpec()),),
        actors=ActorsSpec(count=4, num_gpus=0.25, free_slots=8),
        router=RouterSpec(port=0),
        chaos="allowed",
    )
    with deploy(spec) as made:
        yield made


async def strike(deployment: Deployment, cluster: LocalCluster, folder: Path, **parts: Any) -> Outcome:
    target = LocalTarget(cluster.folder, deployment.connection)
    file = scenario_file(load=LOAD, control_s=1.0, observe_s=2.0, recover_s=60.0, affected_s=1.0, **parts)
    try:
        return await run(Campaign(file, folder, 1, seed=1), target, lambda _record: None)
    finally:
        target.close()


async def test_a_killed_actor_costs_no_request_and_comes_back(deployment: Deployment, shared_cluster: LocalCluster, tmp_path: Path) -> None:
    pid = deployment.pid_of("actor-0")
    found = await strike(deployment, shared_cluster, tmp_path, method=[action("kill_actor")])
    assert found.ending is Ending.PASSED, found.journal
    assert not is_alive(pid)
    assert deployment.pid_of("actor-0") != pid
    assert {name: found.summary[name] for name in SOUND} == dict.fromkeys(SOUND, 0)
    assert found.records[0].metrics["degraded"]  # shadows answered: the fault was felt
    assert found.records[0].metrics["exact_again_s"]


async def test_a_stopped_actor_costs_no_request_and_goes_on(deployment: Deployment, shared_cluster: LocalCluster, tmp_path: Path) -> None:
    found = await strike(deployment, shared_cluster, tmp_path, method=[action("stop_actor", seconds=1.0)])
    assert found.ending is Ending.PASSED, found.journal
    assert found.records[0].actions[0].injected_s is not None
    assert {name: found.summary[name] for name in SOUND} == dict.fromkeys(SOUND, 0)
    wait_until(lambda: bool(deployment.actors()), "the controller answers")
    states = {actor["actor_id"]: psutil.Process(actor["pid"]).status() for actor in deployment.actors().values()}
    assert psutil.STATUS_STOPPED not in states.values()
