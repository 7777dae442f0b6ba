"""The whole path with shadows, in one process: they answer when a replica is lost, are counted and replay, refuse EXACT, and give way to replicas again."""

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from actors.expert_store import ExpertStore
from cluster.core.errors import CheckpointError, ExpertUnavailable
from cluster.core.spec import HedgingSpec, ShadowSpec
from kit.in_process import InProcessCluster, in_process_cluster
from kit.models import HIDDEN, NUM_EXPERTS, save_tiny
from kit.waiting import wait_until
from router_service.client import RouterClient
from router_service.client_types import Reply
from router_service.core.layer_call import TopK
from router_service.replay import from_store, replay
from router_service.twin import Twin

T, K, NUM_LAYERS, NUM_ACTORS = 40, 2, 3, 4
LOST = "actor-1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("models") / "mixtral", torch.bfloat16)


@pytest.fixture
def cluster(folder: Path, tmp_path: Path) -> Iterator[InProcessCluster]:
    # Without hedging: one process holds actors, router and callers here, so that a busy machine makes healthy replicas late, and late rows reach shadows.
    hedging = HedgingSpec(enabled=False)
    with in_process_cluster({"m": folder}, tmp_path, num_actors=NUM_ACTORS, shadow=ShadowSpec(expanded_max=2), hedging=hedging) as made:
        yield made


@pytest.fixture
def client(cluster: InProcessCluster) -> Iterator[RouterClient]:
    with cluster.client() as made:
        yield made


def _rows(seed: int) -> torch.Tensor:
    return torch.randn((T, HIDDEN), generator=torch.Generator().manual_seed(seed)).bfloat16()


def _all_experts(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choices that meet every expert."""
    ids_TK = torch.stack([torch.arange(T) % NUM_EXPERTS, (torch.arange(T) + 3) % NUM_EXPERTS], dim=1).to(torch.int32)
    return ids_TK, torch.rand((T, K), generator=torch.Generator().manual_seed(seed))


def _ask(client: RouterClient, layer: int, fidelity: str = "any") -> Reply:
    return client.dispatch(_rows(layer), model="m", layer=layer, top_k=_all_experts(layer), report="plan", fidelity=fidelity)


def _lost_choices(layer: int) -> torch.Tensor:
    return torch.isin(_all_experts(layer)[0] % NUM_ACTORS, torch.tensor([1]))


def test_shadows_answer_for_a_lost_actor_are_counted_replay_and_give_way_again(cluster: InProcessCluster, client: RouterClient, folder: Path) -> None:
    twin = Twin.from_folder(folder)
    exact = [_ask(client, layer) for layer in range(NUM_LAYERS)]
    assert all(reply.report.outcomes["exact"] == T * K for reply in exact)
    cluster.kill(LOST)
    lost = [(layer, index) for layer in range(NUM_LAYERS) for index in (1, 5)]
    degraded = Twin.from_store(cluster.store, cluster.manifests["m"].digest, shadowed=lost)
    for is_published in (False, True):
        if is_published:
            cluster.publish()
        for layer in range(NUM_LAYERS):
            reply, lost_TK = _ask(client, layer), _lost_choices(layer)
            assert (reply.report.outcomes["shadow"], reply.report.outcomes["exact"]) == (int(lost_TK.sum()), T * K - int(lost_TK.sum()))
            assert reply.report.degraded_tokens == int(lost_TK.any(dim=1).sum())
            plan = reply.report.plan
            assert plan is not None
            versions = {cluster.manifests["m"].shadows[f"{layer}/{index}"].version for index in (1, 5)}
            assert {plan.versions[index].hex() for index in plan.version_index[lost_TK.numpy()]} == versions
            assert torch.equal(replay(_rows(layer), plan, from_store(cluster.store)), reply.hidden_states)
            stand_in = degraded.layer(layer, _rows(layer), TopK(*_all_experts(layer)))
            assert torch.equal(stand_in.hidden_states, reply.hidden_states)
            assert stand_in.report.counts == reply.report.outcomes
            fine_T = ~lost_TK.any(dim=1)
            assert torch.equal(reply.hidden_states[fine_T], exact[layer].hidden_states[fine_T])
            assert 0.0 < float((reply.hidden_states - exact[layer].hidden_states).float().norm() / exact[layer].hidden_states.float().norm()) < 0.6
            with pytest.raises(ExpertUnavailable) as refused:
                client.dispatch(_rows(layer), model="m", layer=layer, top_k=_all_experts(layer), fidelity="exact", timeout_s=2.0)
            assert refused.value.failed_rows == tuple(torch.nonzero(~fine_T).flatten().tolist())
    cluster.start_again(LOST)
    cluster.publish()
    for layer in range(NUM_LAYERS):
        for fidelity in ("any", "exact"):
            reply = _ask(client, layer, fidelity)
            assert reply.report.outcomes["exact"] == T * K
            assert torch.equal(reply.hidden_states, exact[layer].hidden_states)

        assert torch.equal(twin.layer(layer, _rows(layer), TopK(*_all_experts(layer))).hidden_states, exact[layer].hidden_states)


def test_no_request_fails_when_an_actor_dies_under_load_and_shadows_stand_in(cluster: InProcessCluster, client: RouterClient) -> None:
    answered: Counter[str] = Counter()
    is_over = threading.Event()

    def ask(layer: int) -> None:
        while not is_over.is_set():
            answered.update(_ask(client, layer).report.outcomes)

    def wait_for(name: str) -> None:
        before = answered[name]
        wait_until(lambda: answered[name] > before + 50, f"more choices are {name}")

    with ThreadPoolExecutor(NUM_LAYERS) as threads:
        asking = [threads.submit(ask, layer) for layer in range(NUM_LAYERS)]
        try:
            wait_for("exact")
            assert answered["shadow"] == 0
            cluster.kill(LOST)
            wait_for("shadow")
            cluster.publish()
            wait_for("shadow")
            cluster.start_again(LOST)
            cluster.publish()
        finally:
            is_over.set()
        for future in asking:
            future.result()
    assert _ask(client, 0).report.outcomes["exact"] == T * K
    assert sum(answered.values()) == answered["exact"] + answered["shadow"]


def test_actors_report_what_shadows_take_packed_and_expanded(cluster: InProcessCluster, client: RouterClient) -> None:
    def reports() -> list[tuple[int, int]]:
        return [(report.used_bytes, report.expanded_bytes) for actor in cluster.actors.values() for report in [cluster._call(actor.report())]]

    manifest = cluster.manifests["m"]
    expert_bytes = manifest.model.layers[0].expert.num_bytes
    packed_bytes = sum(record.num_bytes for record in manifest.shadows.values())
    assert packed_bytes <= 0.15 * expert_bytes * len(manifest.experts)
    assert sum(expanded for _, expanded in reports()) == 0
    cluster.kill(LOST)
    for layer in range(NUM_LAYERS):
        _ask(client, layer)
    after = reports()
    assert 0 < max(expanded for _, expanded in after) <= 2 * expert_bytes


def test_shadows_that_stood_in_are_told_that_their_replicas_are_back(cluster: InProcessCluster, client: RouterClient) -> None:
    def told() -> int:
        workspaces = [actor._running.runtime._workspace for actor in cluster.actors.values() if actor._running is not None]
        return sum(copy in workspace._back_s for workspace in workspaces for copy in tuple(workspace._expanded))

    cluster.kill(LOST)
    cluster.publish()
    assert _ask(client, 0).report.outcomes["shadow"] > 0
    assert told() == 0
    cluster.start_again(LOST)
    cluster.publish()
    wait_until(lambda: told() > 0, "who holds an expanded shadow was told")
    assert _ask(client, 0).report.outcomes["exact"] == T * K


def test_without_the_section_there_are_no_shadows(folder: Path, tmp_path: Path) -> None:
    with in_process_cluster({"m": folder}, tmp_path, num_actors=2) as cluster, cluster.client() as client:
        assert cluster.manifests["m"].shadows == {}
        cluster.kill("actor-1")
        with pytest.raises(ExpertUnavailable):
            client.dispatch(_rows(0), model="m", layer=0, top_k=_all_experts(0), timeout_s=2.0)


def test_a_twin_of_a_shadow_that_was_never_made_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    store = ExpertStore(tmp_path)
    with pytest.raises(CheckpointError, match="no shadow of expert 0/3"):
        Twin.from_store(store, store.import_model(folder, name="m").digest, shadowed=[(0, 3)])
