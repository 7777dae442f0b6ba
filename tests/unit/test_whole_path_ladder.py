"""The whole path below the copies, in one process: an expert that nobody holds is stood in for, as the ladder says, is counted, and replays bit for bit."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.core.errors import ExpertUnavailable
from kit.in_process import InProcessCluster, in_process_cluster
from kit.ladders import add_ladder
from kit.models import HIDDEN, NUM_EXPERTS, save_tiny
from router_service.core.layer_call import TopK
from router_service.replay import from_store, replay
from router_service.twin import Twin

T, K, LAYER, NUM_ACTORS = 40, 2, 1, 4
LOST = [index for index in range(NUM_EXPERTS) if index % NUM_ACTORS == 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_tiny("mixtral", tmp_path_factory.mktemp("models") / "mixtral", torch.bfloat16)
    add_ladder(made)
    return made


def _rows() -> torch.Tensor:
    return torch.randn((T, HIDDEN), generator=torch.Generator().manual_seed(4)).bfloat16()


def _choices() -> tuple[torch.Tensor, torch.Tensor]:
    """Every expert is met; the last tokens have two lost experts, the first ones at most one."""
    ids_TK = torch.stack([torch.arange(T) % NUM_EXPERTS, (torch.arange(T) + 3) % NUM_EXPERTS], dim=1).to(torch.int32)
    ids_TK[-3:] = torch.tensor(LOST[:2], dtype=torch.int32)
    return ids_TK, torch.rand((T, K), generator=torch.Generator().manual_seed(5)) + 0.1


@pytest.fixture(params=[("generalist",), ("dense",), ("fewer_experts", "dense"), ("shadow", "fewer_experts", "generalist")], ids="-".join)
def cluster(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Iterator[InProcessCluster]:
    with in_process_cluster({"m": folder}, tmp_path, num_actors=NUM_ACTORS, ladder=request.param) as made:
        yield made


def test_lost_experts_are_stood_in_for_counted_and_replayed_and_exact_calls_refuse(cluster: InProcessCluster) -> None:
    ladder = cluster.spec.models[0].ladder
    lost_TK = torch.isin(_choices()[0], torch.tensor(LOST, dtype=torch.int32))
    whole_T, gone_T = ~lost_TK.any(dim=1), lost_TK.all(dim=1)
    twin = Twin.from_store(cluster.store, cluster.manifests["m"].digest, lost=[(LAYER, index) for index in LOST], ladder=ladder)
    with cluster.client() as client:
        exact = client.dispatch(_rows(), model="m", layer=LAYER, top_k=_choices(), report="plan")
        cluster.kill("actor-1")
        for is_published in (False, True):
            if is_published:
                cluster.publish()
            reply = client.dispatch(_rows(), model="m", layer=LAYER, top_k=_choices(), report="plan")
            outcomes = reply.report.outcomes
            assert sum(outcomes.values()) == T * K
            assert outcomes["exact"] == T * K - int(lost_TK.sum())
            assert outcomes["omitted"] == (int(lost_TK.sum()) - K * int(gone_T.sum()) if "fewer_experts" in ladder else 0)
            last = ladder[-1]
            assert outcomes[last] == int(lost_TK.sum()) - outcomes["omitted"] > 0
            assert reply.report.degraded_tokens == int((~whole_T).sum())
            assert torch.equal(reply.hidden_states[whole_T], exact.hidden_states[whole_T])
            assert torch.isfinite(reply.hidden_states.float()).all()
            assert reply.report.plan is not None
            assert torch.equal(replay(_rows(), reply.report.plan, from_store(cluster.store)), reply.hidden_states)
            assert torch.equal(twin.layer(LAYER, _rows(), TopK(*_choices())).hidden_states, reply.hidden_states)
            with pytest.raises(ExpertUnavailable) as refused:
                client.dispatch(_rows(), model="m", layer=LAYER, top_k=_choices(), fidelity="exact", timeout_s=2.0)
            assert refused.value.failed_rows == tuple(torch.nonzero(~whole_T).flatten().tolist())


def test_tokens_that_no_rung_can_serve_fail_and_are_named(folder: Path, tmp_path: Path) -> None:
    with in_process_cluster({"m": folder}, tmp_path, num_actors=NUM_ACTORS, ladder=("fewer_experts",)) as cluster, cluster.client() as client:
        cluster.kill("actor-1")
        with pytest.raises(ExpertUnavailable) as refused:
            client.dispatch(_rows(), model="m", layer=LAYER, top_k=_choices(), timeout_s=2.0)
        assert refused.value.failed_rows == (T - 3, T - 2, T - 1)
