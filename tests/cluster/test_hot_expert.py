"""A hot expert on real Ray: while traffic flows it gets a further replica in a free slot, rows reach both, and once it is cold the replica is taken back."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import pytest
import torch

from cluster.core.descriptors import DType
from cluster.core.errors import MoeError
from cluster.core.spec import ActorsSpec, ClusterSpec, LivenessSpec, ModelSpec, ReplicationSpec, RouterSpec
from kit.deployments import Deployment
from kit.models import HIDDEN, NUM_EXPERTS, save_custom
from kit.waiting import wait_until
from router_service.client_types import ActorPlace, Reply
from router_service.core.layer_call import TopK
from router_service.twin import Twin

pytestmark = pytest.mark.cluster
LAYER, HOT = 0, 3
NUM_TOKENS, K = 256, 2
NUM_CALLERS = 3
NUM_INPUTS = 4
LIMIT_S = 60.0
ROUNDING = 2.0**-8
# Any queue counts, since so small an expert is never behind for long; one window less than the default, and much sooner cold.
REPLICATION = ReplicationSpec(window_s=0.5, max_replicas=2, hot_queue_s=1e-4, hot_windows=2, cold_share=1.9, cold_windows=4)


def skewed() -> TopK:
    """Each token chooses the hot expert and one of the others: half of all rows, four times an even share."""
    others = [index for index in range(NUM_EXPERTS) if index != HOT]
    ids_TK = torch.tensor([[HOT, others[token % len(others)]] for token in range(NUM_TOKENS)], dtype=torch.int32)
    return TopK(ids_TK, torch.full((NUM_TOKENS, K), 0.5))


def even() -> TopK:
    """Every expert, the hot one too, gets as many rows as any other."""
    ids_TK = (torch.arange(NUM_TOKENS)[:, None] + torch.tensor([0, HOT])) % NUM_EXPERTS
    return TopK(ids_TK.to(torch.int32), torch.full((NUM_TOKENS, K), 0.5))


@dataclass
class Traffic:
    """Callers that ask one request after the other until told to stop, each reply compared with the twin's; `turn` changes what they ask for."""

    deployment: Deployment
    twin: Twin
    routing: TopK = field(default_factory=skewed)
    failures: list[str] = field(default_factory=list)
    num_sent: int = 0
    num_ok: int = 0
    hot_rows: Counter[int] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        dice = torch.Generator().manual_seed(5)
        self._inputs = [torch.randn((NUM_TOKENS, HIDDEN), generator=dice).bfloat16() for _ in range(NUM_INPUTS)]
        self.turn(self.routing)

    def turn(self, routing: TopK) -> None:
        """From here on callers choose these experts; the answers are computed before anybody asks."""
        self._asked = routing, [self.twin.layer(LAYER, rows_TD, routing).hidden_states for rows_TD in self._inputs]

    @contextmanager
    def flowing(self) -> Iterator[Self]:
        """Callers run for the length of the block."""
        threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(NUM_CALLERS)]
        with ExitStack() as stack:
            for thread in threads:
                stack.callback(thread.join, LIMIT_S)
                thread.start()
            stack.callback(self._is_over.set)
            yield self
        assert not any(thread.is_alive() for thread in threads)

    def hot_rows_from_now(self) -> Counter[int]:
        """Rows of the hot expert by the generation that answers, of replies that come from here on."""
        with self._lock:
            self.hot_rows = Counter()
            return self.hot_rows

    def until(self, condition: Any, what: str) -> None:
        """Wait, but not once a request has failed."""
        wait_until(lambda: bool(self.failures) or condition(), what, timeout_s=LIMIT_S)
        assert self.failures == []

    def _ask(self) -> None:
        with self.deployment.client(timeout_s=LIMIT_S) as client:
            turn = 0
            while not self._is_over.is_set() and not self.failures:
                turn = (turn + 1) % NUM_INPUTS
                routing, answers = self._asked
                with self._lock:
                    self.num_sent, hot_rows = self.num_sent + 1, self.hot_rows
                top_k = (routing.expert_ids_TK, routing.weights_TK)
                try:
                    reply = client.dispatch(self._inputs[turn], model="m", layer=LAYER, top_k=top_k, report="plan")
                except MoeError as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                    return
                self._note(reply, answers[turn], hot_rows)

    def _note(self, reply: Reply, answer: torch.Tensor, hot_rows: Counter[int]) -> None:
        plan, outcomes = reply.report.plan, reply.report.outcomes
        assert plan is not None
        # Not bit for bit: callers' rows are merged, which may round a row otherwise.
        if (reply.hidden_states.float() - answer.float()).norm() > ROUNDING * answer.float().norm():
            self.failures.append("an answer is far from the twin's")
        if not sum(outcomes.values()) == outcomes["exact"] == NUM_TOKENS * K:
            self.failures.append(f"choices do not add up to exact ones: {outcomes}")
        with self._lock:
            hot_rows.update(plan.generations[plan.expert_ids == HOT].tolist())
            self.num_ok += 1


@pytest.fixture(scope="module")
def deployment(deploy: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    model = save_custom(tmp_path_factory.mktemp("model") / "skewed")
    spec = ClusterSpec(
        name="skewed",
        models=(ModelSpec(name="m", path=model, dtype=DType.BF16),),
        actors=ActorsSpec(count=4, num_gpus=0.25, free_slots=8),
        replication=REPLICATION,
        liveness=LivenessSpec(suspect_s=0.3, eject_s=0.6),  # calm: whom a busy machine alone makes late is not ejected
        router=RouterSpec(port=0),
    )
    with deploy(spec) as made:
        yield made


def test_a_hot_expert_gets_a_replica_under_traffic_and_loses_it_when_cold(deployment: Deployment) -> None:
    traffic = Traffic(deployment, Twin.from_folder(deployment.spec.models[0].path, DType.BF16))
    with deployment.client() as client:

        def places() -> tuple[ActorPlace, ...]:
            return next(place.replicas for place in client.routing_table().experts if (place.layer, place.index) == (LAYER, HOT))

        (home,) = places()
        with traffic.flowing():
            traffic.until(lambda: len(places()) > 1, "the hot expert has a further replica")
            first, further = sorted(places(), key=lambda place: place != home)
            assert first == home
            assert further.node_id != home.node_id
            both = traffic.hot_rows_from_now()
            traffic.until(lambda: {home.generation, further.generation} <= set(both), "rows reach both replicas")
            (hot,) = deployment.told()["hot"]
            assert (hot["layer"], hot["index"], hot["actor_id"]) == (LAYER, HOT, further.actor_id)
            assert hot["reason"].startswith("hot: ")
            traffic.turn(even())
            traffic.until(lambda: places() == (home,), "the further replica is taken back")
            alone = traffic.hot_rows_from_now()
            traffic.until(lambda: alone.total() > NUM_TOKENS, "the expert is asked for again")
        assert set(both) == {home.generation, further.generation}
        assert set(alone) == {home.generation}
        assert traffic.failures == []
        assert traffic.num_ok == traffic.num_sent
        assert client.status().requests_failed == 0
    wait_until(lambda: num_slots_of_the_hot_expert(deployment) == 1, "its slot is free again", timeout_s=LIMIT_S)
    assert deployment.told()["hot"] == []
    assume, drain, release = decided(deployment, f"{further.actor_id}/g{further.generation}")
    assert (assume["action"], drain["action"], release["action"]) == ("assume", "drain", "release")
    assert assume["reason"] == hot["reason"]
    assert drain["epoch"] >= assume["epoch"] + 2, "it was published and withdrawn between"


def num_slots_of_the_hot_expert(deployment: Deployment) -> int:
    return sum((slot["layer"], slot["index"]) == (LAYER, HOT) for actor in deployment.told()["actors"] for slot in actor["slots"])


def decided(deployment: Deployment, life: str) -> list[dict[str, Any]]:
    """What the controller decided about the hot expert alone on this actor, in order."""
    return [entry for entry in deployment.told()["decisions"] if entry["target"] == f"m:{LAYER}/{HOT} on {life}"]
