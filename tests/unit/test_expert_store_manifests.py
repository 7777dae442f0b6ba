"""Manifests: what a checkpoint ships or a controller expects holds for every byte, and nodes import only what they are asked for."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.expert_store import ExpertStore, write_manifest
from cluster.core.descriptors import DType, Manifest
from cluster.core.errors import CheckpointError, NotFound
from cluster.registry.checkpoint import MANIFEST_FILE
from cluster.registry.tensor_files import TensorFiles
from kit.models import NUM_EXPERTS, save_tiny
from kit.stores import all_digests, poke

WEIGHTS = "model.safetensors"
NUM_LAYERS = 3


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_tiny("olmoe", tmp_path / "source", torch.bfloat16)


@pytest.fixture
def store(tmp_path: Path) -> ExpertStore:
    return ExpertStore(tmp_path / "store")


def test_equal_checkpoints_have_equal_manifests_wherever_they_lie(source: Path, tmp_path: Path, store: ExpertStore) -> None:
    elsewhere = save_tiny("olmoe", tmp_path / "elsewhere", torch.bfloat16)
    assert store.import_model(source, name="m").digest == ExpertStore(tmp_path / "other").import_model(elsewhere, name="m").digest


def test_a_flipped_bit_in_the_source_is_refused_against_a_shipped_manifest(source: Path, store: ExpertStore) -> None:
    write_manifest(source, "shipped")
    store.import_model(source, name="m")
    with TensorFiles(source) as files:
        victim = files.entry("model.layers.2.mlp.experts.5.down_proj.weight")
    poke(source / WEIGHTS, victim.begin + victim.num_bytes - 1)
    with pytest.raises(CheckpointError, match=r"expert 2/5 has SHA-256 \w{12}, but moelastic.manifest.json says \w{12}"):
        store.import_model(source, name="m")


def _swap(source: Path, one: str, two: str) -> None:
    tensors = load_file(source / WEIGHTS)
    tensors[one], tensors[two] = tensors[two], tensors[one]
    save_file(tensors, source / WEIGHTS)


def test_swapped_tensors_are_refused_by_the_first_expert_concerned(source: Path, store: ExpertStore) -> None:
    write_manifest(source, "shipped")
    _swap(source, "model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.mlp.experts.6.up_proj.weight")
    with pytest.raises(CheckpointError, match="expert 1/2 has SHA-256"):
        store.import_model(source, name="m")


def test_swapped_gates_are_refused_by_layer(source: Path, store: ExpertStore) -> None:
    expected = store.import_model(source, name="m")
    _swap(source, "model.layers.0.mlp.gate.weight", "model.layers.2.mlp.gate.weight")
    with pytest.raises(CheckpointError, match=r"the gate of layer 0 has SHA-256 .* but the expected manifest says"):
        store.import_model(source, name="m", expected=expected)


@pytest.mark.parametrize("dtype", [DType.FP32, DType.FP16])
def test_a_shipped_manifest_holds_for_every_name_and_element_type(dtype: DType, source: Path, store: ExpertStore) -> None:
    write_manifest(source, "shipped")
    manifest = store.import_model(source, name="other", dtype=dtype)
    assert (manifest.model.name, manifest.model.dtype) == ("other", dtype)
    _swap(source, "model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.mlp.experts.6.up_proj.weight")
    with pytest.raises(CheckpointError, match="expert 1/2 has SHA-256"):
        store.import_model(source, name="other", dtype=dtype)


def test_a_manifest_of_another_model_or_with_holes_is_refused(source: Path, tmp_path: Path, store: ExpertStore) -> None:
    other = store.import_model(save_tiny("mixtral", tmp_path / "mixtral", torch.bfloat16), name="m")
    with pytest.raises(CheckpointError, match="describes other layers"):
        store.import_model(source, name="m", expected=other)
    manifest = store.import_model(source, name="m")
    holes = manifest.model_copy(update={"experts": {key: value for key, value in manifest.experts.items() if key != "0/0"}})
    more = manifest.model_copy(update={"gates": {**manifest.gates, "9": "0" * 64}})
    for wrong in (holes, more):
        with pytest.raises(CheckpointError, match="does not list exactly"):
            store.import_model(source, name="m", expected=wrong)


@pytest.mark.parametrize("text", ["{", "{}", '{"model": 1, "experts": {}, "gates": {}}'])
def test_a_broken_shipped_manifest_is_refused_not_ignored(text: str, source: Path, store: ExpertStore) -> None:
    (source / MANIFEST_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"moelastic\.manifest"):
        store.import_model(source, name="m")


def test_write_manifest_says_what_an_import_says(source: Path, store: ExpertStore) -> None:
    path = write_manifest(source, "m")
    assert path == source / MANIFEST_FILE
    assert Manifest.model_validate_json(path.read_text()) == store.import_model(source, name="m")
    assert sorted(entry.name for entry in source.iterdir() if "manifest" in entry.name) == [MANIFEST_FILE]


def test_only_the_experts_asked_for_and_all_gates_are_imported(source: Path, tmp_path: Path, store: ExpertStore) -> None:
    manifest = store.import_model(source, name="m")
    node = ExpertStore(tmp_path / "node")
    seen: list[tuple[int, int]] = []
    node.import_experts(source, manifest=manifest, experts=[(0, 3), (2, 7)], progress=lambda done, total: seen.append((done, total)))
    held = {digest for digest in all_digests(manifest) if node.has(digest)}
    assert held == {manifest.experts["0/3"], manifest.experts["2/7"], *manifest.gates.values()}
    assert seen[0] == (0, 5)
    assert seen[-1] == (5, 5)
    assert node.manifest(manifest.digest) == manifest


def test_experts_that_are_there_are_not_read_again(source: Path, store: ExpertStore) -> None:
    manifest = store.import_model(source, name="m")
    (source / WEIGHTS).unlink()
    places = [(layer, index) for layer in range(NUM_LAYERS) for index in range(NUM_EXPERTS)]
    store.import_experts(source, manifest=manifest, experts=places)
    assert all(store.has(digest) for digest in manifest.experts.values())


def test_experts_of_a_changed_source_are_refused_by_name(source: Path, tmp_path: Path, store: ExpertStore) -> None:
    manifest = store.import_model(source, name="m")
    _swap(source, "model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.mlp.experts.6.up_proj.weight")
    node = ExpertStore(tmp_path / "node")
    node.import_experts(source, manifest=manifest, experts=[(1, 3)])
    with pytest.raises(CheckpointError, match="expert 1/6 has SHA-256"):
        node.import_experts(source, manifest=manifest, experts=[(1, 3), (1, 6)])


def test_a_place_that_the_manifest_does_not_list_is_not_found(source: Path, store: ExpertStore) -> None:
    manifest = store.import_model(source, name="m")
    with pytest.raises(NotFound, match=f"no expert 0/{NUM_EXPERTS}"):
        store.import_experts(source, manifest=manifest, experts=[(0, 0), (0, NUM_EXPERTS)])


def test_a_changed_manifest_is_refused(source: Path, store: ExpertStore) -> None:
    manifest = store.import_model(source, name="m")
    path = store._manifests / f"{manifest.digest}.json"
    path.chmod(0o644)
    path.write_text(path.read_text().replace(manifest.experts["0/0"], manifest.experts["0/1"]))
    with pytest.raises(CheckpointError, match="was changed"):
        store.manifest(manifest.digest)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        store.manifest(manifest.digest)
    store.put_manifest(manifest)
    assert store.manifest(manifest.digest) == manifest
