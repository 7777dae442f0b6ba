"""The checker of kept replies: what is right, what is wrong and why, and what cannot be said yet."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.expert_store import ExpertStore
from chaos.checker import Checker
from kit.models import HIDDEN, save_tiny
from router_service.core.layer_call import GateChoice, LayerReply
from router_service.core.outcomes import Plan
from router_service.twin import Twin

T = 8


class Kept:
    """A folder of kept replies to one input, and its checker."""

    def __init__(self, folder: Path) -> None:
        place = folder / "store"
        store = ExpertStore(place)
        model = save_tiny("qwen3_moe", folder / "model", torch.bfloat16)
        twin = Twin.from_store(store, store.put_manifest(store.import_model(model, name="m")))
        x_TD = torch.randn((T, HIDDEN), generator=torch.Generator().manual_seed(0)).bfloat16()
        self.reply: LayerReply = twin.layer(0, x_TD, GateChoice(), want_plan=True)
        self.folder = folder / "kept"
        self.folder.mkdir()
        np.savez(folder / "known.npz", inputs=x_TD.view(torch.uint16).numpy()[None])
        self.checker = Checker([folder / "empty", place], folder / "known.npz", self.folder)

    @property
    def plan(self) -> Plan:
        assert self.reply.report.plan is not None
        return self.reply.report.plan

    def keep(self, name: str, plan: Plan, *, wrong_row: int | None = None, wrong_bits: int = 1) -> None:
        rows = self.reply.hidden_states.view(torch.uint16).numpy().copy()
        if wrong_row is not None:
            rows[wrong_row, 0] ^= wrong_bits
        arrays = {key: getattr(plan, key) for key in Plan.__slots__ if key != "versions"}
        versions = np.frombuffer(b"".join(plan.versions), np.uint8).reshape(len(plan.versions), -1)
        np.savez(self.folder / f"{name}.npz", which=0, rows=rows, versions=versions, **arrays)


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path)


def test_a_reply_that_is_what_its_plan_gives_is_right(kept: Kept) -> None:
    kept.keep("good", kept.plan)
    assert kept.checker.check(["good"]) == (frozenset(), frozenset())
    assert kept.checker.reasons == {}


def test_one_wrong_bit_is_found_and_its_row_and_who_answered_are_named(kept: Kept) -> None:
    kept.keep("bad", kept.plan, wrong_row=3)
    assert kept.checker.check(["bad"]) == (frozenset({"bad"}), frozenset())
    reason = kept.checker.reasons["bad"]
    assert reason.startswith(f"rows [3] of {T} differ from what the plan gives, in 1 numbers by 1 steps of bf16 at most")
    assert all(f"{expert} by exact of generation" in reason for expert in kept.plan.expert_ids[3])


def test_how_far_a_wrong_number_is_off_is_counted_across_zero(kept: Kept) -> None:
    kept.keep("bad", kept.plan, wrong_row=0, wrong_bits=0x8000)
    size = int(kept.reply.hidden_states.view(torch.uint16)[0, 0]) & 0x7FFF
    assert size > 0
    assert kept.checker.check(["bad"]) == (frozenset({"bad"}), frozenset())
    assert f"in 1 numbers by {2 * size} steps of bf16 at most" in kept.checker.reasons["bad"]


def test_a_version_that_no_store_holds_leaves_a_reply_unchecked(kept: Kept) -> None:
    kept.keep("lost", replace(kept.plan, versions=(bytes(32), *kept.plan.versions[1:])))
    assert kept.checker.check(["lost"]) == (frozenset(), frozenset({"lost"}))
    assert "cannot be replayed" in kept.checker.reasons["lost"]


def test_a_reply_that_is_not_written_yet_is_checked_when_it_is(kept: Kept) -> None:
    assert kept.checker.check(["later"]) == (frozenset(), frozenset({"later"}))
    kept.keep("later", kept.plan)
    assert kept.checker.check(["later"]) == (frozenset(), frozenset())
    assert kept.checker.reasons == {}
