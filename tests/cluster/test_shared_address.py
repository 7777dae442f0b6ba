"""Two router processes behind one address on real Ray: callers reach both, and the death of one costs none of them an answer."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
import torch

from cluster.core.descriptors import DType
from cluster.core.errors import MoeError
from cluster.core.spec import ActorsSpec, ClusterSpec, ModelSpec, RouterSpec
from kit.deployments import Deployment, kill
from kit.models import HIDDEN, TOP_K, save_custom
from kit.waiting import wait_until
from router_service.twin import Twin

pytestmark = pytest.mark.cluster
NUM_TOKENS = 12
NUM_CALLERS = 4
NUM_CONNECTIONS = 16
NUM_PAYLOADS = 16
TIMEOUT_S = 60.0
# One bf16 rounding, of a whole answer: kernels of other sizes than the twin's sum in another order.
ROUNDING = 2.0**-8


def rows(seed: int) -> torch.Tensor:
    return torch.randn((NUM_TOKENS, HIDDEN), generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@dataclass
class Callers:
    """Requests from several threads, each over connections of its own, every answer compared with the expected one bit by bit, until told to stop."""

    deployment: Deployment
    expected: list[torch.Tensor]
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    num_ok: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._run, args=(place,), daemon=True) for place in range(NUM_CALLERS)]
        for thread in self._threads:
            thread.start()
        self.until_more(NUM_CALLERS)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * TIMEOUT_S)
            assert not thread.is_alive()

    def until_more(self, count: int) -> None:
        """Wait for this many further good answers."""
        wanted = self.num_ok + count
        wait_until(lambda: self.num_ok >= wanted or bool(self.failures), f"{count} more answers", timeout_s=2 * TIMEOUT_S)

    def _run(self, place: int) -> None:
        with self.deployment.client(timeout_s=TIMEOUT_S, connections=NUM_CONNECTIONS) as client:
            while not self._stop.is_set():
                place = (place + NUM_CALLERS + 1) % NUM_PAYLOADS
                try:
                    reply = client.dispatch(rows(place), model="random", layer=0, fidelity="exact")
                except MoeError as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                    return
                with self._lock:
                    if not torch.equal(reply.hidden_states, self.expected[place]):
                        self.failures.append(f"answer {place} is another one than before")
                        return
                    self.outcomes.update(reply.report.outcomes)
                    self.num_ok += 1


def checked_answers(deployment: Deployment, twin: Twin) -> list[torch.Tensor]:
    """What the cluster answers to each payload, none of which is far from what the twin computes."""
    with deployment.client(connections=NUM_CONNECTIONS) as client:
        answers = [client.dispatch(rows(seed), model="random", layer=0, fidelity="exact").hidden_states for seed in range(NUM_PAYLOADS)]
    for seed, answer in enumerate(answers):
        wanted = twin.layer(0, rows(seed)).hidden_states.float()
        assert (answer.float() - wanted).norm() <= ROUNDING * wanted.norm()
    return answers


def generations_reached(deployment: Deployment) -> set[int]:
    """The lives of routers that new connections to the one address end at."""
    with deployment.client(timeout_s=TIMEOUT_S, connections=NUM_CONNECTIONS) as client:
        return {client.status().router_generation for _ in range(NUM_CONNECTIONS)}


def routers_of(deployment: Deployment) -> dict[str, dict[str, Any]]:
    """The controller's view of them, by name."""
    return {router["router_id"]: router for router in deployment.control().get("routers", ())}


def has_another_life(deployment: Deployment, before: dict[str, Any]) -> bool:
    """Whether a router is ready in a later life than that one."""
    found = routers_of(deployment).get(before["router_id"])
    return found is not None and found["state"] == "ready" and found["generation"] > before["generation"]


@pytest.mark.timeout(600)
def test_two_routers_share_an_address_and_the_loss_of_one_fails_no_request(deploy: Any, tmp_path: Path) -> None:
    model = save_custom(tmp_path / "random")
    spec = ClusterSpec(
        name="two-routers",
        models=(ModelSpec(name="random", path=model, dtype=DType.BF16, replicas=2),),
        actors=ActorsSpec(count=2, num_gpus=0.25, deterministic=True),
        router=RouterSpec(port=0, count=2),
    )
    with deploy(spec) as deployment:
        before = routers_of(deployment)
        assert set(before) == {"router-0", "router-1"}
        assert {router["address"] for router in before.values()} == {deployment.connection.router_address}
        assert len({router["pid"] for router in before.values()}) == len({router["metrics_address"] for router in before.values()}) == 2
        assert generations_reached(deployment) == {router["generation"] for router in before.values()}
        with Callers(deployment, checked_answers(deployment, Twin.from_folder(model, DType.BF16))) as callers:
            callers.until_more(20)
            kill(int(before["router-1"]["pid"]))
            callers.until_more(20)
            wait_until(lambda: has_another_life(deployment, before["router-1"]), "the killed router is back", timeout_s=TIMEOUT_S)
            deployment.until_serving()
            after = routers_of(deployment)
            assert after["router-1"]["pid"] != before["router-1"]["pid"]
            assert {router["address"] for router in after.values()} == {deployment.connection.router_address}
            assert after["router-0"] == before["router-0"]
            assert generations_reached(deployment) == {router["generation"] for router in after.values()}
            callers.until_more(20)
        assert callers.failures == []
        assert callers.outcomes["exact"] == callers.outcomes.total() == callers.num_ok * NUM_TOKENS * TOP_K
