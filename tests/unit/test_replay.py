"""Replay: from rows and PLAN alone the same bits; a plan that was touched is refused or shows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.expert_store import ExpertStore
from cluster.core.errors import InvalidRequest, NotFound
from kit.models import HIDDEN, save_tiny
from router_service.core.layer_call import GateChoice, LayerReply, Overflow, TopK
from router_service.core.outcomes import Outcome
from router_service.replay import from_store, replay
from router_service.twin import Twin

T = 32
ROUTINGS = [GateChoice(), GateChoice(None, Overflow.DROP, 0.4), TopK(torch.tensor([[1, -1, 6]] * T, dtype=torch.int32), torch.ones(T, 3))]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExpertStore, Twin]:
    store = ExpertStore(tmp_path_factory.mktemp("store"))
    folder: Path = save_tiny("qwen3_moe", tmp_path_factory.mktemp("replay") / "model", torch.bfloat16)
    return store, Twin.from_store(store, store.put_manifest(store.import_model(folder, name="m")))


def _asked(twin: Twin, routing: GateChoice | TopK, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[torch.Tensor, LayerReply]:
    x_TD = torch.randn((T, HIDDEN), generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x_TD, twin.layer(0, x_TD, routing, want_plan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("routing", ROUTINGS, ids=["gate", "drop", "top-k"])
def test_a_reply_is_recomputed_bit_for_bit_from_its_plan(stored: tuple[ExpertStore, Twin], routing: GateChoice | TopK, dtype: torch.dtype) -> None:
    store, twin = stored
    x_TD, reply = _asked(twin, routing, dtype)
    assert torch.equal(replay(x_TD, reply.report.plan, from_store(store)), reply.hidden_states)


def test_versions_in_another_order_give_the_same_bits(stored: tuple[ExpertStore, Twin]) -> None:
    store, twin = stored
    x_TD, reply = _asked(twin, GateChoice())
    plan = reply.report.plan
    last = len(plan.versions) - 1
    turned = replace(plan, versions=plan.versions[::-1], version_index=(last - plan.version_index).astype(np.int32))
    assert torch.equal(replay(x_TD, turned, from_store(store)), reply.hidden_states)


@pytest.mark.parametrize("what", ["version", "weight", "row"])
def test_a_reply_that_is_not_what_its_plan_says_is_found(stored: tuple[ExpertStore, Twin], what: str) -> None:
    store, twin = stored
    x_TD, reply = _asked(twin, GateChoice())
    plan = reply.report.plan
    if what == "version":
        plan = replace(plan, versions=(plan.versions[1], plan.versions[0], *plan.versions[2:]))
    elif what == "weight":
        plan = replace(plan, weights=plan.weights * np.float32(1.01))
    else:
        x_TD = x_TD.clone()
        x_TD[3] += 1
    assert not torch.equal(replay(x_TD, plan, from_store(store)), reply.hidden_states)


def test_a_version_that_no_store_holds_is_named(stored: tuple[ExpertStore, Twin]) -> None:
    store, twin = stored
    x_TD, reply = _asked(twin, GateChoice())
    plan = replace(reply.report.plan, versions=(bytes(32), *reply.report.plan.versions[1:]))
    with pytest.raises(NotFound):
        replay(x_TD, plan, from_store(store))


def test_a_plan_without_any_answer_replays_to_zeros(stored: tuple[ExpertStore, Twin]) -> None:
    store, twin = stored
    x_TD, reply = _asked(twin, TopK(torch.full((T, 2), -1, dtype=torch.int32), torch.ones(T, 2)))
    assert reply.report.plan.versions == ()
    assert torch.equal(replay(x_TD, reply.report.plan, from_store(store)), torch.zeros_like(x_TD))


def test_plans_that_contradict_themselves_are_refused_by_field(stored: tuple[ExpertStore, Twin]) -> None:
    store, twin = stored
    x_TD, reply = _asked(twin, GateChoice())
    plan = reply.report.plan
    damaged = {
        "plan.expert_ids": (x_TD[1:], plan),
        "plan.weights": (x_TD, replace(plan, weights=plan.weights[:, :1])),
        "plan.outcomes": (x_TD, replace(plan, outcomes=np.full_like(plan.outcomes, Outcome.GENERALIST))),
        "plan.version_index": (x_TD, replace(plan, version_index=plan.version_index + 100)),
    }
    for field, (hidden, broken) in damaged.items():
        with pytest.raises(InvalidRequest) as refused:
            replay(hidden, broken, from_store(store))
        assert refused.value.field == field
