"""Shadows in the store: planned within the budget, made to the same bytes on every node, and never taken for what they are not."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from actors import shadow_making
from actors.core.codecs import CODECS, PackedExpert, decode, encode, packed_bytes, packed_layout
from actors.expert_blob import canonical_json, digest_of, encode_shadow
from actors.expert_blob import decode as decode_header
from actors.expert_blob import encode as encode_blob
from actors.expert_layouts import expert_forward, load_weights
from actors.expert_store import ExpertStore
from cluster.core.descriptors import DType, ExpertDescriptor, Manifest
from cluster.core.errors import CheckpointError, NotFound
from cluster.core.spec import ModelSpec, ShadowSpec
from kit.models import NUM_EXPERTS, save_tiny
from kit.stores import path_of, poke

NUM_LAYERS = 3
EXPERT = ExpertDescriptor(hidden_size=24, intermediate_size=20, bias=True, dtype=DType.FP16)
PRIMARY = "ab" * 32


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("olmoe", tmp_path_factory.mktemp("source") / "model", torch.bfloat16)


@pytest.fixture
def store(tmp_path: Path) -> ExpertStore:
    return ExpertStore(tmp_path / "store")


def _packed(codec: str = "int3", seed: int = 0) -> PackedExpert:
    rng = np.random.default_rng(seed)
    tensors = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in EXPERT.tensor_shapes().items()}
    return encode(EXPERT, tensors, CODECS[codec])


@pytest.mark.parametrize("codec", CODECS)
def test_a_shadow_blob_says_what_it_is_and_gives_back_its_bytes(codec: str, store: ExpertStore) -> None:
    packed = _packed(codec)
    parts = encode_shadow(packed, PRIMARY)
    store._blobs.put(digest_of(parts), parts)
    blob = store.open(digest_of(parts))
    assert (blob.kind, blob.descriptor, blob.codec, blob.primary) == ("shadow", EXPERT, CODECS[codec], PRIMARY)
    assert {name: (array.dtype, array.tobytes()) for name, array in blob.tensors.items()} == {
        name: (array.dtype, array.tobytes()) for name, array in packed.tensors.items()
    }


@pytest.mark.parametrize(
    "lie",
    [
        (b'"kind":"shadow"', b'"kind":"expert"'),
        (b'"kind":"shadow"', b'"kind":"gate!!"'),
        (b'"bits":3', b'"bits":2'),
        (b'"bits":3', b'"bits":9'),
        (PRIMARY.encode(), b"G" + PRIMARY[1:].encode()),
        (b'"dtype":"u8"', b'"dtype":"u9"'),
        (b'"hidden_size":24', b'"hidden_size":23'),
        (b"down.codes", b"down.coins"),
    ],
)
def test_a_shadow_header_that_lies_is_refused(lie: tuple[bytes, bytes]) -> None:
    blob = b"".join(encode_shadow(_packed(), PRIMARY))
    assert blob.count(lie[0]) >= 1
    with pytest.raises(CheckpointError, match="is not valid"):
        decode_header(memoryview(blob.replace(lie[0], lie[1])), "b")


def test_bytes_are_stored_for_shadows_alone() -> None:
    with pytest.raises(CheckpointError, match="cannot be stored"):
        encode_blob(EXPERT, {"down": np.zeros(4, np.uint8)})


def test_a_manifest_without_shadows_is_written_and_named_as_before_there_were_any(source: Path, store: ExpertStore) -> None:
    manifest = store.import_model(source, name="m")
    assert set(manifest.model_dump(mode="json")) == {"model", "experts", "gates", "source"}
    assert "shadows" not in manifest.model_dump_json()
    before = {name: manifest.model_dump(mode="json")[name] for name in ("model", "experts", "gates", "source")}
    assert manifest.digest == hashlib.sha256(canonical_json(before)).hexdigest()


def test_shadows_are_planned_within_the_budget_and_listed(source: Path, store: ExpertStore) -> None:
    told: list[tuple[int, int]] = []
    manifest = store.import_model(source, name="m", shadow=ShadowSpec(), progress=lambda *counts: told.append(counts))
    assert len(manifest.shadows) == NUM_LAYERS * NUM_EXPERTS
    expert_bytes = manifest.model.layers[0].expert.num_bytes
    assert sum(record.num_bytes for record in manifest.shadows.values()) <= 0.15 * len(manifest.experts) * expert_bytes
    for key, record in manifest.shadows.items():
        blob = store.open(record.version)
        assert (blob.kind, blob.primary, blob.codec) == ("shadow", manifest.experts[key], CODECS[record.codec])
        assert record.num_bytes == packed_bytes(blob.descriptor, blob.codec)
        assert 0.0 < record.relative_error < 1.0
        assert record.cosine > 0.5
    total = NUM_LAYERS * (1 + 2 * NUM_EXPERTS)
    assert told == [(done, total) for done in range(1, total + 1)]
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest == store.manifest(manifest.digest)


def test_more_memory_buys_better_shadows(source: Path, tmp_path: Path) -> None:
    errors = {}
    for fraction in (0.15, 0.2, 0.3):
        manifest = ExpertStore(tmp_path / str(fraction)).import_model(source, name="m", shadow=ShadowSpec(memory_fraction=fraction))
        errors[fraction] = sum(record.relative_error**2 for record in manifest.shadows.values())
    assert errors[0.15] > errors[0.2] > errors[0.3]


def test_a_small_budget_leaves_experts_without_a_shadow(source: Path, store: ExpertStore) -> None:
    manifest = store.import_model(source, name="m", shadow=ShadowSpec(memory_fraction=0.05))
    assert 0 < len(manifest.shadows) <= NUM_LAYERS * NUM_EXPERTS * 0.05 / 0.13


def test_what_was_not_kept_for_the_plan_is_packed_again_to_the_same_bytes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ExpertStore(tmp_path / "kept").import_model(source, name="m", shadow=ShadowSpec())
    monkeypatch.setattr(shadow_making, "KEPT_BYTES", 0)
    assert ExpertStore(tmp_path / "again").import_model(source, name="m", shadow=ShadowSpec()) == kept


def test_another_node_makes_the_same_shadows_with_and_without_their_primaries(source: Path, store: ExpertStore, tmp_path: Path) -> None:
    manifest = store.import_model(source, name="m", shadow=ShadowSpec(memory_fraction=0.17))
    assert len({record.codec for record in manifest.shadows.values()}) > 1
    places = [(layer, index) for layer in range(NUM_LAYERS) for index in range(NUM_EXPERTS)]
    node = ExpertStore(tmp_path / "node")
    told: list[tuple[int, int]] = []
    node.import_experts(source, manifest=manifest, experts=[(0, 0)], shadows=places, progress=lambda *counts: told.append(counts))
    assert told[-1] == (NUM_LAYERS + 1 + len(places),) * 2
    assert [key for key, version in manifest.experts.items() if node.has(version)] == ["0/0"]
    for record in manifest.shadows.values():
        assert path_of(node, record.version).read_bytes() == path_of(store, record.version).read_bytes()
    assert node.manifest(manifest.digest) == manifest


def test_what_is_there_is_not_made_again(source: Path, store: ExpertStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = store.import_model(source, name="m", shadow=ShadowSpec())
    node = ExpertStore(tmp_path / "node")
    node.import_experts(source, manifest=manifest, experts=[], shadows=[(1, 2)])
    monkeypatch.setattr(shadow_making, "encode", None)
    node.import_experts(tmp_path / "gone", manifest=manifest, experts=[], shadows=[(1, 2)])


def test_a_shadow_that_comes_out_otherwise_is_refused_by_name(source: Path, store: ExpertStore, tmp_path: Path) -> None:
    manifest = store.import_model(source, name="m", shadow=ShadowSpec())
    other = manifest.shadows["1/2"].model_copy(update={"version": manifest.shadows["1/3"].version})
    lying = manifest.model_copy(update={"shadows": {**manifest.shadows, "1/2": other}})
    with pytest.raises(CheckpointError, match=r"shadow of expert 1/2 \(int\d\) has SHA-256 \w{12} here, but the manifest says"):
        ExpertStore(tmp_path / "node").import_experts(source, manifest=lying, experts=[], shadows=[(1, 2)])


def test_a_shadow_of_changed_weights_is_refused_by_name(store: ExpertStore, tmp_path: Path) -> None:
    source = save_tiny("olmoe", tmp_path / "changing", torch.bfloat16)
    manifest = store.import_model(source, name="m", shadow=ShadowSpec())
    weights = source / "model.safetensors"
    size = weights.stat().st_size
    for offset in range(size // 2, size, 64):
        poke(weights, offset)
    with pytest.raises(CheckpointError, match=r"expert \d/\d has SHA-256|the gate of layer"):
        ExpertStore(tmp_path / "node").import_experts(source, manifest=manifest, experts=[], shadows=[(layer, 3) for layer in range(NUM_LAYERS)])


def test_a_shadow_that_the_manifest_does_not_list_is_not_found(source: Path, store: ExpertStore) -> None:
    manifest = store.import_model(source, name="m")
    with pytest.raises(NotFound, match="lists no shadow of expert 0/1"):
        store.import_experts(source, manifest=manifest, experts=[(0, 1)], shadows=[(0, 1)])


def test_an_expert_with_nan_is_refused_by_name(tmp_path: Path, store: ExpertStore) -> None:
    source = save_tiny("olmoe", tmp_path / "nan", torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.experts.4.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"shadow of expert 1/4: .*holds NaN or infinity"):
        store.import_model(source, name="m", shadow=ShadowSpec())


def test_a_stored_shadow_computes_like_its_decoded_weights_and_holds_private_memory(source: Path, store: ExpertStore) -> None:
    manifest = store.import_model(source, name="m", shadow=ShadowSpec())
    blob = store.open(manifest.shadows["2/5"].version)
    weights = load_weights(blob, torch.device("cpu"))
    assert weights.private_bytes == weights.num_bytes == blob.descriptor.num_bytes
    wanted = decode(PackedExpert(blob.descriptor, blob.codec, {name: np.array(array) for name, array in blob.tensors.items()}))
    for name, tensor in weights.tensors.items():
        assert tensor.view(torch.int16).numpy().tobytes() == wanted[name].tobytes()
    primary = load_weights(store.open(manifest.experts["2/5"]), torch.device("cpu"))
    x_TD = torch.randn((16, blob.descriptor.hidden_size), generator=torch.Generator().manual_seed(1)).bfloat16()
    shadowed, exact = expert_forward(x_TD, weights).float(), expert_forward(x_TD, primary).float()
    assert 0.0 < float((shadowed - exact).norm() / exact.norm()) < 0.6


def test_the_layout_that_a_header_must_have_is_known_before_any_byte_is_read() -> None:
    packed = _packed("int2")
    header = decode_header(memoryview(b"".join(encode_shadow(packed, PRIMARY))), "b")
    assert {name: (spot.dtype, spot.shape) for name, spot in header.tensors.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in packed_layout(EXPERT, CODECS["int2"]).items()
    }


@pytest.mark.parametrize(
    "wrong", [{"memory_fraction": 0.0}, {"codecs": []}, {"codecs": ["int5"]}, {"cover": "some"}, {"expanded_max": 0}, {"expanded_idle_s": 0}, {"budget": 1}]
)
def test_a_shadow_section_that_cannot_be_meant_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ModelSpec.model_validate({"name": "m", "path": "p", "shadow": wrong})


def test_what_a_shadow_takes_expanded_is_known_before_it_is_read(store: ExpertStore, source: Path) -> None:
    manifest = store.import_model(source, name="m", shadow=ShadowSpec())
    record, full_bytes = manifest.shadows["1/2"], manifest.model.layers[0].expert.num_bytes
    assert store.expert_bytes(record.version) == store.expert_bytes(manifest.experts["1/2"]) == full_bytes > store.num_bytes(record.version)
    assert store.expert_bytes(manifest.gates["0"]) == 0
    poke(path_of(store, record.version), 0)
    with pytest.raises(CheckpointError, match="not a moelastic blob"):
        store.expert_bytes(record.version)
