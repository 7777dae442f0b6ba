"""What is left below the shadows, and devices that are trusted no more, on real Ray.

Two models of one checkpoint, whose ladders end in the generalist and in the dense fallback. The controller is stopped, so that nothing repairs, and every
actor that holds a copy of one expert is killed: replies say truthfully who answered, and are what their plans say, bit for bit. EXACT fails by name.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from actors.expert_store import ExpertStore
from cluster.cli.gpu import release
from cluster.core.descriptors import DType
from cluster.core.errors import ExpertUnavailable
from cluster.core.spec import ActorsSpec, ClusterSpec, ModelSpec, RepairSpec, RouterSpec, ShadowSpec
from cluster.local.cluster import LocalCluster
from kit.deployments import Deployment, is_alive, kill
from kit.ladders import add_ladder
from kit.models import HIDDEN, NUM_EXPERTS, save_custom
from kit.waiting import wait_until
from router_service.client_types import ExpertPlace
from router_service.core.outcomes import Outcome
from router_service.fallbacks import FallbackWeights
from router_service.replay import from_store, replay

pytestmark = pytest.mark.cluster
LAYER, GONE = 0, 1
NUM_TOKENS, K = 24, 2
LIMIT_S = 60.0
EXACT_S = 2.0
RUNGS = {"generalist": Outcome.GENERALIST, "dense": Outcome.DENSE}


@pytest.fixture(scope="module")
def deployment(deploy: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = save_custom(tmp_path_factory.mktemp("model") / "laddered", dtype=torch.bfloat16)
    add_ladder(folder)
    spec = ClusterSpec(
        name="laddered",
        models=tuple(ModelSpec(name=rung, path=folder, dtype=DType.BF16, shadow=ShadowSpec(), ladder=("shadow", rung)) for rung in RUNGS),
        actors=ActorsSpec(count=4, num_gpus=0.25, free_slots=24),
        router=RouterSpec(port=0),
        repair=RepairSpec(quarantine_failures=2),
    )
    with deploy(spec) as made:
        yield made


def _rows() -> torch.Tensor:
    return torch.randn((NUM_TOKENS, HIDDEN), generator=torch.Generator().manual_seed(3)).bfloat16()


def _every_expert() -> tuple[torch.Tensor, torch.Tensor]:
    ids_TK = (torch.arange(NUM_TOKENS)[:, None] + torch.tensor([0, 3])) % NUM_EXPERTS
    return ids_TK.to(torch.int32), torch.rand((NUM_TOKENS, K), generator=torch.Generator().manual_seed(4)) + 0.1


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _expected(place: ExpertPlace, dead: set[str], rung: str) -> Outcome:
    """Who answers for an expert once these actors are dead."""
    if any(actor.actor_id not in dead for actor in place.replicas):
        return Outcome.EXACT
    return Outcome.SHADOW if any(actor.actor_id not in dead for actor in place.shadows) else RUNGS[rung]


def test_below_the_shadow_the_generalist_and_the_dense_fallback_answer_and_say_so(deployment: Deployment, shared_cluster: LocalCluster) -> None:
    folders = [folder for pattern in ("session_*", "n*/session_*") for folder in shared_cluster.state.temp_dir.glob(f"{pattern}/moelastic/store")]
    stores = [ExpertStore(folder) for folder in folders]

    def weights(version: str) -> FallbackWeights:
        return from_store(next(store for store in stores if store.has(version)))(version)

    with deployment.client(timeout_s=LIMIT_S) as client:
        table = {(place.model, place.index): place for place in client.routing_table().experts if place.layer == LAYER}
        holders = {actor.actor_id for rung in RUNGS for actor in (*table[rung, GONE].replicas, *table[rung, GONE].shadows)}
        assert len(holders) < len(deployment.told()["actors"])
        pids = [deployment.pid_of(holder) for holder in holders]
        with _stopped(deployment.controller_pid()):
            for pid in pids:
                kill(pid)
            for rung, last in RUNGS.items():
                expected = {index: _expected(table[rung, index], holders, rung) for index in range(NUM_EXPERTS)}
                reply = client.dispatch(_rows(), model=rung, layer=LAYER, top_k=_every_expert(), report="plan")
                plan, outcomes = reply.report.plan, reply.report.outcomes
                assert plan is not None
                assert expected[GONE] is last
                assert sum(outcomes.values()) == NUM_TOKENS * K
                assert plan.outcomes.tolist() == [[expected[index] for index in row] for row in _every_expert()[0].tolist()]
                assert outcomes[rung] == int((plan.outcomes == last).sum()) >= NUM_TOKENS * K // NUM_EXPERTS
                assert torch.equal(replay(_rows(), plan, weights), reply.hidden_states)
                with pytest.raises(ExpertUnavailable) as refused:
                    client.dispatch(_rows(), model=rung, layer=LAYER, top_k=_every_expert(), fidelity="exact", timeout_s=EXACT_S)
                lost_T = (plan.outcomes != Outcome.EXACT).any(axis=1)
                assert refused.value.failed_rows == tuple(lost_T.nonzero()[0].tolist())
        deployment.until_serving()
        for rung in RUNGS:
            again = client.dispatch(_rows(), model=rung, layer=LAYER, top_k=_every_expert(), fidelity="exact")
            assert again.report.outcomes["exact"] == NUM_TOKENS * K


def test_a_device_that_fails_again_and_again_is_quarantined_until_it_is_released(deployment: Deployment) -> None:
    deployment.until_serving()
    node_id = next(actor["node_id"] for actor in deployment.told()["actors"] if actor["actor_id"] == "actor-0")

    def is_quarantined() -> bool:
        """Until then whoever serves there is killed: what dies within moments is one failure."""
        told = deployment.control()
        for actor in told.get("actors", ()):
            if actor["node_id"] == node_id and actor["state"] == "ready" and is_alive(actor["pid"]) and not told["quarantined"]:
                kill(actor["pid"])
        return bool(told.get("quarantined"))

    def has_moved() -> bool:
        told = deployment.control()
        return told.get("state") == "SERVING" and all(actor["node_id"] != node_id for actor in told["actors"])

    wait_until(is_quarantined, "the device is quarantined", timeout_s=2 * LIMIT_S)
    wait_until(has_moved, "everybody serves from elsewhere", timeout_s=2 * LIMIT_S)
    (entry,) = deployment.told()["quarantined"]
    assert entry["device"] == f"{node_id}/cpu"
    assert entry["reason"].startswith("it failed 2 times")
    with deployment.client(timeout_s=LIMIT_S) as client:
        for rung in RUNGS:
            reply = client.dispatch(_rows(), model=rung, layer=LAYER, top_k=_every_expert(), fidelity="exact")
            assert reply.report.outcomes["exact"] == NUM_TOKENS * K
    assert release(deployment.connection, entry["device"]) == []
    wait_until(lambda: deployment.control().get("quarantined") == [], "it is trusted again")
    news = [decision["action"] for decision in deployment.told()["decisions"] if decision["target"] == entry["device"]]
    assert news == ["quarantine", "release_device"]
