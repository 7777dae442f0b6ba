"""The twin: transformers' own layer within rounding, and the pipeline bit for bit."""

import math
import random
from pathlib import Path

import pytest
import torch

from actors.expert_layouts import expert_forward, load_weights
from actors.expert_store import ExpertStore
from cluster.core.errors import InvalidRequest, NotFound
from cluster.core.ids import ExpertId
from kit.lanes import FakeLanes, copy_on, table_of
from kit.models import CUSTOM, FAMILIES, HIDDEN, NUM_EXPERTS, TOP_K, save_custom, save_tiny, tiny_model
from router_service.models import load_model
from router_service.pipeline import GateChoice, LayerCall, Overflow, Pipeline, TopK
from router_service.twin import Twin

T = 48
CPU = torch.device("cpu")


def rows(seed: int, dtype: torch.dtype, num_tokens: int = T) -> torch.Tensor:
    return torch.randn((num_tokens, HIDDEN), generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExpertStore, str]:
    """A bf16 Mixtral in a folder and in a store."""
    folder = save_tiny("mixtral", tmp_path_factory.mktemp("twin") / "mixtral", torch.bfloat16)
    store = ExpertStore(tmp_path_factory.mktemp("store"))
    return folder, store, store.put_manifest(store.import_model(folder, name="mixtral"))


def _experts_of(model: torch.nn.Module) -> dict[int, tuple[torch.nn.Module, torch.nn.Module]]:
    """Router and experts module by decoder layer."""
    named = dict(model.named_modules())
    found = {}
    for name, module in named.items():
        if type(module).__name__.endswith("Experts"):
            block = named[name.rpartition(".")[0]]
            router = next(child for child in block.children() if type(child).__name__.lower().endswith("topkrouter"))
            found[int(name.split(".")[2])] = (router, module)
    return found


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_layers_agree_with_transformers(family: str, dtype: torch.dtype, limit: float, tmp_path: Path) -> None:
    twin = Twin.from_folder(save_tiny(family, tmp_path / family, dtype, seed=7))
    blocks = _experts_of(tiny_model(family, dtype, seed=7))
    assert set(twin.model.layers) == set(blocks)
    for layer, (router, experts) in blocks.items():
        x_TD = rows(layer, dtype)
        with torch.no_grad():
            _, weights_TK, ids_TK = router(x_TD)
            theirs = experts(x_TD, ids_TK, weights_TK)
        own_choice = twin.layer(layer, x_TD).hidden_states
        same_choice = twin.layer(layer, x_TD, TopK(ids_TK.to(torch.int32), weights_TK.float())).hidden_states
        assert _worst_row(same_choice, theirs) < limit
        # A row tied at its last place may be served by another expert; at 8 experts that is rare.
        assert (_row_errors(own_choice, theirs) < limit).float().mean() > 0.95


def _row_errors(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return (ours.double() - theirs.double()).norm(dim=1) / theirs.double().norm(dim=1)


def _worst_row(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(_row_errors(ours, theirs).max())


ROUTINGS = {
    "gate": GateChoice(),
    "drop": GateChoice(None, Overflow.DROP, 0.5),
    "next best": GateChoice(None, Overflow.NEXT_BEST, 0.75),
    "top-k": TopK(torch.tensor([[3, -1, 1]] * T, dtype=torch.int32), torch.tensor([[0.3, 9.0, 0.9]] * T)),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
async def test_the_pipeline_equals_the_twin_bit_for_bit(stored: tuple[Path, ExpertStore, str], routing: str, dtype: torch.dtype) -> None:
    _, store, digest = stored
    model = load_model(store, digest)

    def forward(_: ExpertId, version: str, rows_ND: torch.Tensor) -> torch.Tensor:
        return expert_forward(rows_ND, load_weights(store.open(version), CPU))

    places = [tuple(map(int, key.split("/"))) for key in model.manifest.experts]
    table = table_of("mixtral", {place: [copy_on(f"a{place[1] % 3}", model.manifest.experts[f"{place[0]}/{place[1]}"])] for place in places})
    pipeline = Pipeline(FakeLanes(forward), {"mixtral": model}, lambda: table, random.Random(0))
    x_TD = rows(1, dtype)
    reply = await pipeline.run(LayerCall("r", "mixtral", 1, x_TD, ROUTINGS[routing], math.inf, want_plan=True))
    twin = Twin.from_store(store, digest).layer(1, x_TD, ROUTINGS[routing], want_plan=True)
    assert reply.hidden_states.dtype == dtype
    assert torch.equal(reply.hidden_states, twin.hidden_states)
    assert reply.report.counts == twin.report.counts
    assert (reply.report.plan.expert_ids == twin.report.plan.expert_ids).all()
    assert reply.report.plan.versions == twin.report.plan.versions


def test_a_twin_of_a_folder_equals_a_twin_of_the_store_versions_included(stored: tuple[Path, ExpertStore, str]) -> None:
    folder, store, digest = stored
    x_TD = rows(2, torch.bfloat16)
    from_folder = Twin.from_folder(folder).layer(0, x_TD, want_plan=True)
    from_store = Twin.from_store(store, digest).layer(0, x_TD, want_plan=True)
    assert torch.equal(from_folder.hidden_states, from_store.hidden_states)
    assert from_folder.report.plan.versions == from_store.report.plan.versions


@pytest.mark.parametrize("kind", ["linear", "mlp_tanh", "position"])
def test_custom_models_have_a_twin(kind: str, tmp_path: Path) -> None:
    twin = Twin.from_folder(save_custom(tmp_path / kind, gate={"kind": kind, "normalize": True}, gated=kind == "linear"))
    positions = torch.arange(T) % 64 if kind == "position" else None
    reply = twin.layer(2, rows(3, torch.float32), GateChoice(positions))
    assert reply.report.exact == T * TOP_K
    assert torch.isfinite(reply.hidden_states).all()
    assert set(twin.model.layers) == {0, 2}


def test_a_twin_in_another_type_than_the_checkpoints_is_near(tmp_path: Path) -> None:
    folder = save_tiny(CUSTOM, tmp_path / "custom", torch.float32)
    x_TD = rows(4, torch.float32)
    every = TopK(torch.arange(NUM_EXPERTS, dtype=torch.int32).repeat(T, 1), torch.full((T, NUM_EXPERTS), 1 / NUM_EXPERTS))
    exact, rounded = Twin.from_folder(folder).layer(0, x_TD, every), Twin.from_folder(folder, "bf16").layer(0, x_TD, every)
    assert _worst_row(rounded.hidden_states, exact.hidden_states) < 3e-2
    assert not torch.equal(rounded.hidden_states, exact.hidden_states)


def test_bad_calls_are_refused_as_the_router_refuses_them(stored: tuple[Path, ExpertStore, str]) -> None:
    twin = Twin.from_store(stored[1], stored[2])
    with pytest.raises(NotFound, match="those are 0, 1, 2"):
        twin.layer(9, rows(0, torch.bfloat16))
    with pytest.raises(InvalidRequest, match="width 32"):
        twin.layer(0, torch.ones(2, HIDDEN + 1))
