"""The whole path in one process: client, router, links, actors, store. Replies replay from their plans; requests outlive actors and routers.

Shape legend: T rows, D model width, K choices per row.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, StoppingCriteriaList
from transformers.utils import logging

from cluster.core.errors import ExpertUnavailable, InvalidRequest
from examples.custom_moe.tiny_moe import GatedExpert, LinearGate, MlpTanhGate, PositionGate, TinyMoE, save_experts
from kit.in_process import InProcessCluster, in_process_cluster
from kit.models import HIDDEN, NUM_EXPERTS, TOP_K, VOCAB, save_tiny
from kit.waiting import wait_until
from router_service.client import RouterClient
from router_service.core.layer_call import TopK
from router_service.hf import REFERENCE, ClusterExperts, register_cluster_experts
from router_service.replay import from_store, replay
from router_service.twin import Twin

REMOTE = "moelastic-whole-path"
MODELS = {"mixtral": torch.bfloat16, "deepseek_v3": torch.bfloat16, "qwen3_moe": torch.float32}
MAX_MESSAGE_BYTES = 32 << 10
GATES: dict[str, Callable[[], torch.nn.Module]] = {
    "linear": lambda: LinearGate(48, 6),
    "mlp_tanh": lambda: MlpTanhGate(48, 6, inner_size=20),
    "position": lambda: PositionGate(48, 6, num_positions=64),
}
T = 50

logging.disable_progress_bar()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family, dtype) for family, dtype in MODELS.items()}


@pytest.fixture(scope="module")
def customs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[int, TinyMoE]]]:
    """Two layers of plain PyTorch for each kind of gate, saved as the examples save them."""
    torch.manual_seed(3)
    made = {}
    for kind, gate in GATES.items():
        folder = tmp_path_factory.mktemp("custom") / kind
        layers = {layer: TinyMoE(gate(), [GatedExpert(48, 24) for _ in range(6)], num_experts_per_token=3) for layer in (0, 1)}
        for layer, moe in layers.items():
            save_experts(folder, moe.gate, list(moe.experts), num_experts_per_token=3, layer=layer)
        made[kind] = (folder, layers)
    return made


@pytest.fixture(scope="module")
def cluster(
    folders: dict[str, Path], customs: dict[str, tuple[Path, dict[int, TinyMoE]]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[InProcessCluster]:
    models = folders | {kind: folder for kind, (folder, _) in customs.items()}
    with in_process_cluster(models, tmp_path_factory.mktemp("cluster"), num_actors=3, router={"max_message_bytes": MAX_MESSAGE_BYTES}) as made:
        yield made


@pytest.fixture(scope="module")
def client(cluster: InProcessCluster) -> Iterator[RouterClient]:
    with cluster.client() as made:
        yield made


@pytest.fixture
def experts(client: RouterClient) -> ClusterExperts:
    return register_cluster_experts(client=client, name=REMOTE)


def _load(folder: Path, implementation: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation=implementation)


def _rows(seed: int, dtype: torch.dtype, num_rows: int = T, width: int = HIDDEN) -> torch.Tensor:
    return torch.randn((num_rows, width), generator=torch.Generator().manual_seed(seed)).to(dtype)


def _choices(seed: int, num_rows: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand((num_rows, NUM_EXPERTS), generator=generator).argsort(dim=1)[:, :TOP_K].to(torch.int32)
    ids_TK[::7, 0] = -1
    return ids_TK, torch.rand((num_rows, TOP_K), generator=generator)


@pytest.mark.parametrize("num_rows", [1, T, 700])
@pytest.mark.parametrize("routing", ["gate", "drop", "top-k"])
def test_replies_over_the_link_replay_bit_for_bit_from_their_plans(cluster: InProcessCluster, client: RouterClient, routing: str, num_rows: int) -> None:
    """700 rows are more than one message holds: they travel in chunks."""
    x_TD = _rows(num_rows, torch.bfloat16, num_rows)
    options: dict[str, Any] = {"gate": {}, "drop": {"overflow": "drop", "capacity_factor": 0.5}, "top-k": {"top_k": _choices(1, num_rows)}}[routing]
    reply = client.dispatch(x_TD, model="mixtral", layer=1, report="plan", **options)
    plan = reply.report.plan
    assert plan is not None
    assert plan.versions
    assert torch.equal(replay(x_TD, plan, from_store(cluster.store)), reply.hidden_states)
    damaged = replace(plan, weights=plan.weights * np.float32(1.5))
    assert not torch.equal(replay(x_TD, damaged, from_store(cluster.store)), reply.hidden_states)


def test_two_models_answer_two_threads_each_its_own(folders: dict[str, Path], experts: ClusterExperts) -> None:
    ids = torch.randint(2, VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))
    names = ["mixtral", "deepseek_v3", "mixtral", "deepseek_v3"]
    models = [_load(folders[name], REMOTE) for name in names]
    expected = [_load(folders[name], REFERENCE).generate(ids, max_new_tokens=12, do_sample=False) for name in names]
    experts.start_usage()
    with ThreadPoolExecutor(len(models)) as threads:
        found = list(threads.map(lambda model: model.generate(ids, max_new_tokens=12, do_sample=False), models))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    # 2 prompts x (12 + 11 more tokens) x (3 or 2 layers) x 2 models of each.
    assert experts.usage().tokens == 2 * (12 + 11) * (3 + 2) * 2


def test_a_prefill_over_the_message_limit_is_split_and_gives_what_the_twin_gives(folders: dict[str, Path], experts: ClusterExperts) -> None:
    ids = torch.randint(2, VOCAB, (2, 450), generator=torch.Generator().manual_seed(3))
    remote, twin = _load(folders["mixtral"], REMOTE), _load(folders["mixtral"], REFERENCE)
    experts.start_usage()
    with torch.no_grad():
        found, expected = remote(ids).logits.float(), twin(ids).logits.float()
    # Not bit for bit: each message brings an expert fewer rows than the twin gives it at once, and kernels may sum in another order for them.
    assert float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max()) < 0.02
    per_message = int(MAX_MESSAGE_BYTES * 0.9) // (HIDDEN * 2 + TOP_K * 8)
    usage = experts.usage()
    assert usage.requests == 3 * -(-900 // per_message) > 3
    assert (usage.tokens, usage.outcomes["exact"]) == (3 * 900, 3 * 900 * TOP_K)
    assert sum(usage.choices.values()) == 3 * 900 * TOP_K


@pytest.mark.usefixtures("experts")
def test_gradients_may_be_on(folders: dict[str, Path]) -> None:
    model = _load(folders["qwen3_moe"], REMOTE)
    ids = torch.arange(2, 20)[None]
    logits = model(ids).logits
    assert logits.requires_grad
    with torch.no_grad():
        assert torch.equal(logits.detach(), _load(folders["qwen3_moe"], "eager")(ids).logits)
    with pytest.raises(InvalidRequest, match="inference only"):
        logits.sum().backward()


@pytest.mark.parametrize("kind", GATES)
def test_gates_and_experts_of_ones_own_are_served_as_they_compute(client: RouterClient, customs: dict[str, tuple[Path, dict[int, TinyMoE]]], kind: str) -> None:
    for layer, moe in customs[kind][1].items():
        x_TD = _rows(layer, torch.float32, width=48)
        positions = torch.randperm(64, generator=torch.Generator().manual_seed(layer))[:T] if kind == "position" else None
        with torch.no_grad():
            expected = moe(x_TD, positions)
        reply = client.dispatch(x_TD, model=kind, layer=layer, positions=positions)
        assert float(((reply.hidden_states - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 1e-5
        assert reply.report.outcomes["exact"] == T * 3


def test_a_position_gate_needs_positions_and_minds_them(client: RouterClient) -> None:
    x_TD = _rows(0, torch.float32, width=48)
    with pytest.raises(InvalidRequest, match=r"gate\.positions is missing"):
        client.dispatch(x_TD, model="position", layer=0)
    there, elsewhere = (client.dispatch(x_TD, model="position", layer=0, positions=torch.arange(T) + start) for start in (0, 14))
    assert not torch.equal(there.hidden_states, elsewhere.hidden_states)


def test_numpy_and_torch_rows_get_the_same_answer(client: RouterClient) -> None:
    x_TD = _rows(5, torch.float32)
    ids_TK, weights_TK = _choices(5)
    by_torch = client.dispatch(x_TD, model="qwen3_moe", layer=2, top_k=(ids_TK, weights_TK)).hidden_states
    by_numpy = client.dispatch(x_TD.numpy(), model="qwen3_moe", layer=2, top_k=(ids_TK.numpy(), weights_TK.numpy())).hidden_states
    assert np.array_equal(by_torch.numpy(), by_numpy)


class _At:
    """Does something while `generate` runs: `events` by number of new tokens."""

    def __init__(self, prompt_length: int, events: dict[int, Callable[[], None]]) -> None:
        self._prompt_length = prompt_length
        self.events = events

    def __call__(self, input_ids: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
        event = self.events.pop(input_ids.shape[1] - self._prompt_length, None)
        if event is not None:
            event()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def test_generation_goes_on_unchanged_when_actors_and_routers_die(folders: dict[str, Path], tmp_path: Path) -> None:
    """With two copies of each expert: an actor dies, the table follows, the router is replaced, and no token differs from the twin's."""
    ids = torch.randint(2, VOCAB, (2, 10), generator=torch.Generator().manual_seed(4))
    expected = _load(folders["mixtral"], REFERENCE).generate(ids, max_new_tokens=60, do_sample=False)
    with in_process_cluster({"mixtral": folders["mixtral"]}, tmp_path, num_actors=3, replicas=2) as cluster, cluster.client() as client:
        experts = register_cluster_experts(client=client, name="moelastic-mortal")
        model = _load(folders["mixtral"], "moelastic-mortal")
        at = _At(10, {12: lambda: cluster.kill("actor-1"), 24: cluster.publish, 36: cluster.restart_router})
        experts.start_usage()
        found = model.generate(ids, max_new_tokens=60, do_sample=False, stopping_criteria=StoppingCriteriaList([at]))
        assert torch.equal(found, expected)
        assert at.events == {}
        assert {name for name, count in experts.usage().outcomes.items() if count} == {"exact"}


def test_a_reply_after_a_loss_names_who_is_left_and_replays(folders: dict[str, Path], tmp_path: Path) -> None:
    x_TD, top_k = _rows(8, torch.bfloat16), _choices(8)
    with in_process_cluster({"mixtral": folders["mixtral"]}, tmp_path, num_actors=2, replicas=2) as cluster, cluster.client() as client:
        cluster.kill("actor-0")
        reply = client.dispatch(x_TD, model="mixtral", layer=0, top_k=top_k, report="plan", fidelity="exact")
        plan = reply.report.plan
        assert plan is not None
        assert torch.equal(replay(x_TD, plan, from_store(cluster.store)), reply.hidden_states)
        assert set(plan.generations[plan.expert_ids >= 0].tolist()) == {2}
        cluster.kill("actor-1")
        with pytest.raises(ExpertUnavailable) as lost:
            client.dispatch(x_TD, model="mixtral", layer=0, top_k=top_k, timeout_s=3.0)
        assert lost.value.failed_rows == tuple(range(T))


@pytest.mark.parametrize("end", [InProcessCluster.kill, InProcessCluster.stop_actor])
def test_no_request_fails_or_differs_while_an_actor_and_the_router_end_under_load(
    folders: dict[str, Path], tmp_path: Path, end: Callable[[InProcessCluster, str], None]
) -> None:
    twin = Twin.from_folder(folders["mixtral"])
    calls = [(_rows(seed, torch.bfloat16, 1 + 9 * seed), _choices(seed, 1 + 9 * seed)) for seed in range(4)]
    expected = [twin.layer(0, rows, TopK(*choices)).hidden_states for rows, choices in calls]
    answered: Counter[int] = Counter()
    is_over = threading.Event()
    with in_process_cluster({"mixtral": folders["mixtral"]}, tmp_path, num_actors=3, replicas=2) as cluster, cluster.client() as client:

        def ask(number: int) -> bool:
            rows, choices = calls[number]
            is_right = True
            while not is_over.is_set():
                reply = client.dispatch(rows, model="mixtral", layer=0, top_k=choices)
                is_right = is_right and torch.equal(reply.hidden_states, expected[number])
                answered[number] += 1
            return is_right

        def wait_for_more() -> None:
            before = answered.total()
            wait_until(lambda: answered.total() >= before + 20, "20 more answers")

        with ThreadPoolExecutor(len(calls)) as threads:
            asking = [threads.submit(ask, number) for number in range(len(calls))]
            try:
                for event in (lambda: end(cluster, "actor-2"), cluster.publish, cluster.restart_router):
                    wait_for_more()
                    event()
                wait_for_more()
            finally:
                is_over.set()
            assert all(future.result() for future in asking)
    assert min(answered.values()) > 0
