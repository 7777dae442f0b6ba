"""Shadows on real Ray: an actor dies under load, shadows answer until its experts are loaded elsewhere, and then all is exact again."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.core.descriptors import DType
from cluster.core.ids import Role
from cluster.core.spec import ActorsSpec, ClusterSpec, ModelSpec, RouterSpec, ShadowSpec
from kit.deployments import Deployment, kill
from kit.models import HIDDEN, NUM_EXPERTS, save_custom
from kit.waiting import wait_until
from router_service.client import RouterClient
from router_service.twin import Twin

pytestmark = pytest.mark.cluster
NUM_TOKENS = 24
NUM_LOADS = 2
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_custom(tmp_path_factory.mktemp("model") / "shadowed")


@pytest.fixture(scope="module")
def deployment(deploy: Any, model: Path) -> Iterator[Deployment]:
    spec = ClusterSpec(
        name="shadowed",
        models=(ModelSpec(name="m", path=model, dtype=DType.BF16, shadow=ShadowSpec()),),
        actors=ActorsSpec(count=4, num_gpus=0.25, free_slots=8),
        router=RouterSpec(port=0),
    )
    with deploy(spec) as made:
        yield made


def _rows(seed: int) -> torch.Tensor:
    return torch.randn((NUM_TOKENS, HIDDEN), generator=torch.Generator().manual_seed(seed)).bfloat16()


def _every_expert() -> tuple[torch.Tensor, torch.Tensor]:
    ids_TK = (torch.arange(NUM_TOKENS)[:, None] + torch.tensor([0, 3])) % NUM_EXPERTS
    return ids_TK.to(torch.int32), torch.full(ids_TK.shape, 0.5)


def _outcomes(client: RouterClient, seed: int, fidelity: str = "any") -> dict[str, int]:
    return client.dispatch(_rows(seed), model="m", layer=0, top_k=_every_expert(), fidelity=fidelity).report.outcomes


def _slot_bytes(deployment: Deployment) -> dict[Role, int]:
    """What the slots take, by role, as the controller tells it; it may miss a question on a busy machine."""
    found: list[dict[str, dict[str, Any]]] = []
    wait_until(lambda: found.append(deployment.actors()) or bool(found[-1]), "the controller answers", timeout_s=LIMIT_S)
    slots = [slot for actor in found[-1].values() for slot in actor["slots"]]
    return {role: sum(int(slot["bytes"]) for slot in slots if slot["role"] == role) for role in Role}


def test_every_expert_has_a_shadow_on_another_node_within_the_budget(deployment: Deployment) -> None:
    with deployment.client() as client:
        table = client.routing_table()
    assert len(table.experts) % NUM_EXPERTS == 0
    for expert in table.experts:
        assert len(expert.replicas) == len(expert.shadows) == 1
        assert expert.shadows[0].node_id != expert.replicas[0].node_id
    taken = _slot_bytes(deployment)
    assert 0 < taken[Role.SHADOW] <= 0.15 * taken[Role.REPLICA]


def test_an_actor_dies_under_load_and_no_request_fails(deployment: Deployment, model: Path) -> None:
    answered: Counter[str] = Counter()
    is_over = threading.Event()

    def ask(number: int) -> None:
        with deployment.client(timeout_s=LIMIT_S) as client:
            seed = number
            while not is_over.is_set():
                seed += NUM_LOADS
                answered.update(_outcomes(client, seed))

    with ThreadPoolExecutor(NUM_LOADS) as threads:
        asking = [threads.submit(ask, number) for number in range(NUM_LOADS)]
        try:
            wait_until(lambda: answered["exact"] > 0, "the load runs", timeout_s=LIMIT_S)
            assert answered["shadow"] == 0
            kill(deployment.pid_of("actor-2"))
            wait_until(lambda: answered["shadow"] > 0 or any(future.done() for future in asking), "shadows answer", timeout_s=LIMIT_S)
            with deployment.client() as client:
                wait_until(lambda: _outcomes(client, 0)["shadow"] == 0, "replicas answer again", timeout_s=LIMIT_S)
            deployment.until_serving()
        finally:
            is_over.set()
        for future in asking:
            future.result()
    assert answered["shadow"] > 0
    assert answered.total() == answered["exact"] + answered["shadow"]
    sent, twin = _rows(7), Twin.from_folder(model, DType.BF16)
    with deployment.client() as client:
        reply = client.dispatch(sent, model="m", layer=0, fidelity="exact")
    assert torch.equal(reply.hidden_states, twin.layer(0, sent).hidden_states)
