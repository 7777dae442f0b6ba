"""A ladder file beside a checkpoint: imported with it, the same on every node, refused when it is damaged or another model's, and replayable bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.expert_store import ExpertStore
from actors.ladder_blobs import LadderBlobs
from cluster.core.descriptors import Manifest
from cluster.core.errors import CheckpointError, ExpertUnavailable
from cluster.core.ladder_record import LadderRecord
from cluster.core.spec import ShadowSpec
from cluster.registry.checkpoint import MANIFEST_FILE
from cluster.registry.ladder_file import LADDER_FILE, Ladder, write_ladder
from kit.ladders import add_ladder
from kit.models import HIDDEN, NUM_EXPERTS, NUM_LAYERS, save_tiny
from kit.stores import poke
from router_service.core.layer_call import GateChoice, TopK
from router_service.core.outcomes import Outcome
from router_service.models import load_model
from router_service.replay import from_store, replay
from router_service.twin import Twin

T = 40
GONE = (0, 3, 5)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = save_tiny("olmoe", tmp_path / "model", torch.bfloat16)
    add_ladder(folder)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> ExpertStore:
    return ExpertStore(tmp_path / "store")


def test_fallbacks_are_imported_listed_and_served(source: Path, store: ExpertStore) -> None:
    manifest = store.import_model(source, name="m")
    assert set(manifest.ladder) == {f"{rung}/{layer}" for rung in ("generalist", "dense") for layer in range(NUM_LAYERS)}
    model = load_model(store, manifest.digest)
    for layer in model.layers.values():
        assert layer.fallbacks is not None
        x_ND = torch.randn((5, HIDDEN)).bfloat16()
        assert layer.fallbacks.generalist(x_ND).shape == layer.fallbacks.dense(x_ND).shape == x_ND.shape
        assert layer.fallbacks.dense(x_ND).dtype == torch.bfloat16


def test_a_model_without_a_ladder_has_no_fallbacks_and_keeps_its_digest(tmp_path: Path, store: ExpertStore) -> None:
    plain = save_tiny("olmoe", tmp_path / "plain", torch.bfloat16)
    manifest = store.import_model(plain, name="m")
    assert "ladder" not in manifest.model_dump_json()
    assert all(layer.fallbacks is None for layer in load_model(store, manifest.digest).layers.values())


def test_every_node_gets_the_fallbacks_of_the_manifest(source: Path, tmp_path: Path, store: ExpertStore) -> None:
    manifest = store.import_model(source, name="m")
    node = ExpertStore(tmp_path / "node")
    node.import_experts(source, manifest=manifest, experts=[])
    assert all(node.has(digest) for digest in manifest.ladder.values())
    (source / LADDER_FILE).unlink()
    node.import_experts(source, manifest=manifest, experts=[(0, 1)])
    with pytest.raises(CheckpointError, match="is not the one that the manifest"):
        ExpertStore(tmp_path / "late").import_experts(source, manifest=manifest, experts=[])


def test_a_fitted_shadow_is_taken_where_it_does_less_damage_and_lies_on_every_node_as_listed(source: Path, tmp_path: Path, store: ExpertStore) -> None:
    manifest = store.import_model(source, name="m", shadow=ShadowSpec())
    plain = save_tiny("olmoe", tmp_path / "plain", torch.bfloat16)
    rounded = ExpertStore(tmp_path / "other").import_model(plain, name="m", shadow=ShadowSpec())
    fitted = {key for key in manifest.shadows if manifest.shadows[key].version != rounded.shadows[key].version and manifest.shadows[key].codec == "int2"}
    assert fitted == {f"{layer}/0" for layer in range(NUM_LAYERS)}
    node = ExpertStore(tmp_path / "node")
    node.import_experts(source, manifest=manifest, experts=[], shadows=[(0, 0), (0, 1)])
    assert node.has(manifest.shadows["0/0"].version)
    assert node.has(manifest.shadows["0/1"].version)
    (source / LADDER_FILE).unlink()
    with pytest.raises(CheckpointError, match="ladder file"):
        node.import_experts(source, manifest=manifest.model_copy(update={"ladder": {}}), experts=[], shadows=[(1, 0)])


def test_a_codec_that_the_spec_does_not_name_is_not_used(source: Path, store: ExpertStore) -> None:
    manifest = store.import_model(source, name="m", shadow=ShadowSpec(codecs=("int3",), memory_fraction=0.5))
    assert {record.codec for record in manifest.shadows.values()} == {"int3"}


@pytest.mark.parametrize("place", [-1, -2000])
def test_a_ladder_with_one_wrong_byte_is_refused(place: int, source: Path, store: ExpertStore) -> None:
    path = source / LADDER_FILE
    poke(path, path.stat().st_size + place)
    with pytest.raises(CheckpointError, match="is damaged"):
        store.import_model(source, name="m")


def test_a_ladder_of_other_weights_is_refused(source: Path, tmp_path: Path, store: ExpertStore) -> None:
    other = save_tiny("olmoe", tmp_path / "other", torch.bfloat16, seed=1)
    (other / LADDER_FILE).write_bytes((source / LADDER_FILE).read_bytes())
    with pytest.raises(CheckpointError, match="calibrated for other weights"):
        store.import_model(other, name="m")


def test_a_ladder_whose_tensors_are_not_of_the_layers_size_is_refused_before_it_is_read(source: Path, store: ExpertStore) -> None:
    with Ladder(source) as ladder:
        record = ladder.record
    wide = {f"dense.{layer}.weight": np.zeros((HIDDEN + 1, HIDDEN), np.float32) for layer in range(NUM_LAYERS)}
    write_ladder(source, record.model_copy(update={"generalists": {}, "shadows": {}}), wide)
    with pytest.raises(CheckpointError, match=r"dense.0.weight is F32 \[33, 32\] where BF16 \[32, 32\] belongs"):
        store.import_model(source, name="m")


def test_a_ladder_file_is_written_to_the_same_bytes_and_says_what_was_recorded(source: Path) -> None:
    with Ladder(source) as ladder:
        record = ladder.record
        before = (source / LADDER_FILE).read_bytes()
    assert add_ladder(source) == record.model_copy(update={"sha256": ""})
    assert (source / LADDER_FILE).read_bytes() == before
    assert LadderRecord.model_validate_json(record.model_dump_json()) == record


LADDERS = [("fewer_experts", "dense"), ("generalist",), ("dense",), ("fewer_experts", "generalist", "dense"), ("dense", "fewer_experts")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ladder", LADDERS, ids="+".join)
def test_a_degraded_reply_is_recomputed_bit_for_bit_from_its_plan(ladder: tuple[str, ...], dtype: torch.dtype, source: Path, store: ExpertStore) -> None:
    manifest = store.import_model(source, name="m")
    twin = Twin.from_store(store, manifest.digest, lost=[(0, index) for index in GONE], ladder=ladder)
    x_TD = torch.randn((T, HIDDEN), generator=torch.Generator().manual_seed(1)).to(dtype)
    both = TopK(torch.tensor([[3, 5, 1]] * T, dtype=torch.int32), torch.rand((T, 3), generator=torch.Generator().manual_seed(2)))
    every = TopK(torch.tensor([[3, 5, -1]] * T, dtype=torch.int32), torch.rand((T, 3), generator=torch.Generator().manual_seed(2)))
    for routing in (GateChoice(), both, every):
        reply = twin.layer(0, x_TD, routing, want_plan=True)
        plan = reply.report.plan
        assert reply.report.degraded_tokens > 0
        assert set(np.unique(plan.outcomes)) & {Outcome.OMITTED, Outcome.GENERALIST, Outcome.DENSE}
        assert reply.report.num_choices == plan.outcomes.size
        assert torch.equal(replay(x_TD, plan, from_store(store)), reply.hidden_states)


def test_a_loss_that_no_rung_serves_fails_with_its_rows(source: Path, store: ExpertStore) -> None:
    manifest = store.import_model(source, name="m")
    twin = Twin.from_store(store, manifest.digest, lost=[(0, 3)], ladder=("fewer_experts",))
    routing = TopK(torch.tensor([[3, -1], [1, 3], [1, 2]], dtype=torch.int32), torch.ones(3, 2))
    with pytest.raises(ExpertUnavailable) as failed:
        twin.layer(0, torch.zeros((3, HIDDEN)).bfloat16(), routing)
    assert failed.value.failed_rows == (0,)


def test_any_set_of_lost_experts_gives_finite_replies_or_says_which_rows_fail(source: Path, store: ExpertStore) -> None:
    manifest = store.import_model(source, name="m")
    x_TD = torch.randn((T, HIDDEN), generator=torch.Generator().manual_seed(3)).bfloat16()
    for gone in range(1, 1 << NUM_EXPERTS, 7):
        lost = [(1, index) for index in range(NUM_EXPERTS) if gone >> index & 1]
        reply = Twin.from_store(store, manifest.digest, lost=lost, ladder=("fewer_experts", "dense")).layer(1, x_TD)
        assert torch.isfinite(reply.hidden_states).all()


def test_the_shipped_ladder_is_of_the_shipped_weights_and_small() -> None:
    folder = Path(__file__).parents[2] / "examples" / "tiny_moe_lm" / "checkpoint"
    manifest = Manifest.model_validate_json((folder / MANIFEST_FILE).read_text())
    with Ladder(folder) as ladder:
        blobs = LadderBlobs(ladder, manifest)
        fallbacks = {blob.key for blob in blobs.fallbacks()}
        shadows = [blobs.shadow(key, manifest.model.layer(int(key.split("/")[0])).expert) for key in manifest.experts]
    assert fallbacks == {f"{rung}/{layer.layer}" for rung in ("generalist", "dense") for layer in manifest.model.layers}
    packed = [found[1] for found in shadows if found is not None]
    assert sum(shadow.num_bytes for shadow in packed) <= 0.15 * sum(layer.num_experts * layer.expert.num_bytes for layer in manifest.model.layers)
    assert blobs.record.order[0] == "generalist"
    assert (folder / LADDER_FILE).stat().st_size <= 2 << 20
