"""The node-local store: what is served is what was imported, byte by byte, whatever happens to the source or to the store's own files."""

import hashlib
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from actors import blob_files
from actors.expert_blob import ALIGNMENT
from actors.expert_store import ExpertStore
from cluster.core.descriptors import DType, ExpertDescriptor
from cluster.core.errors import CheckpointError, ConfigError, NotFound
from cluster.registry.checkpoint import Checkpoint
from kit.models import FAMILIES, NUM_EXPERTS, save_custom, save_tiny
from kit.quantised import save_deepseek_fp8, save_gpt_oss_mxfp4
from kit.stores import all_digests, contents, path_of, poke

WEIGHTS = "model.safetensors"
NUM_LAYERS = 3


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_tiny("olmoe", tmp_path / "source", torch.bfloat16)


@pytest.fixture
def store(tmp_path: Path) -> ExpertStore:
    return ExpertStore(tmp_path / "store")


@pytest.mark.parametrize("family", [*FAMILIES, "moelastic"])
def test_every_family_is_stored_as_its_checkpoint_reads(family: str, tmp_path: Path, store: ExpertStore) -> None:
    folder = save_tiny(family, tmp_path / "source", torch.bfloat16)
    manifest = store.import_model(folder, name="m")
    with Checkpoint.open(folder) as checkpoint:
        assert manifest.model == checkpoint.descriptor("m")
        for place, digest in manifest.experts.items():
            layer, index = map(int, place.split("/"))
            blob = store.open(digest)
            assert (blob.kind, blob.descriptor) == ("expert", manifest.model.layer(layer).expert)
            wanted = checkpoint.expert(layer, index)
            assert blob.tensors.keys() == wanted.keys()
            assert all((blob.tensors[name] == wanted[name]).all() for name in wanted)
        for place, digest in manifest.gates.items():
            blob = store.open(digest)
            assert (blob.kind, blob.descriptor) == ("gate", manifest.model.layer(int(place)).gate)
            assert all((blob.tensors[name] == array).all() for name, array in checkpoint.gate(int(place)).items())
    assert len(manifest.experts) == len(manifest.model.layers) * NUM_EXPERTS


@pytest.mark.parametrize("make", [save_gpt_oss_mxfp4, save_deepseek_fp8])
def test_quantised_checkpoints_are_stored_in_bf16(make: Callable[[Path], Path], tmp_path: Path, store: ExpertStore) -> None:
    manifest = store.import_model(make(tmp_path / "source"), name="m")
    assert manifest.model.dtype is DType.BF16
    assert all(store.has(digest) for digest in all_digests(manifest))


def test_a_blob_is_named_by_the_sha256_of_its_file_read_only_and_aligned(source: Path, store: ExpertStore) -> None:
    manifest = store.import_model(source, name="m")
    for digest in all_digests(manifest):
        path = path_of(store, digest)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
        assert stat.S_IMODE(path.stat().st_mode) == 0o444
        blob = store.open(digest)
        assert blob.num_bytes == path.stat().st_size
        for array in blob.tensors.values():
            assert array.ctypes.data % ALIGNMENT == 0
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0


def test_conversion_happens_once_at_import_and_is_part_of_the_digest(source: Path, store: ExpertStore) -> None:
    own, wide = store.import_model(source, name="m"), store.import_model(source, name="m", dtype=DType.FP32)
    assert not set(all_digests(own)) & set(all_digests(wide))
    narrow, converted = store.open(own.experts["1/2"]), store.open(wide.experts["1/2"])
    assert isinstance(converted.descriptor, ExpertDescriptor)
    assert converted.descriptor.dtype is DType.FP32
    assert (converted.tensors["down"] == narrow.tensors["down"].astype(np.float32)).all()


def test_progress_counts_every_blob(source: Path, store: ExpertStore) -> None:
    seen: list[tuple[int, int]] = []
    store.import_model(source, name="m", progress=lambda done, total: seen.append((done, total)))
    total = NUM_LAYERS * (NUM_EXPERTS + 1)
    assert seen == [(done, total) for done in range(1, total + 1)]


def _replace(source: Path) -> None:
    other = save_tiny("olmoe", source.parent / "replacement", torch.bfloat16, seed=5)
    (other / WEIGHTS).replace(source / WEIGHTS)


def _truncate(source: Path) -> None:
    with (source / WEIGHTS).open("r+b") as file:
        file.truncate(0)


def _export_again(source: Path) -> None:
    save_tiny("olmoe", source, torch.bfloat16, seed=6)


def _overwrite(source: Path) -> None:
    with (source / WEIGHTS).open("r+b") as file:
        file.write(bytes((source / WEIGHTS).stat().st_size))


@pytest.mark.parametrize("change", [_replace, _truncate, _export_again, _overwrite])
def test_what_happens_to_the_source_while_serving_changes_nothing(change: Callable[[Path], None], source: Path, store: ExpertStore) -> None:
    manifest = store.import_model(source, name="m")
    before = contents(store, manifest)
    served = {digest: store.open(digest) for digest in all_digests(manifest)}
    change(source)
    assert contents(store, manifest) == before
    assert {digest: {name: array.tobytes() for name, array in blob.tensors.items()} for digest, blob in served.items()} == before


def test_a_flipped_bit_anywhere_in_a_blob_is_refused_by_name(source: Path, store: ExpertStore) -> None:
    manifest = store.import_model(source, name="m")
    size = store.open(manifest.experts["0/0"]).num_bytes
    for expert, offset in enumerate((0, 9, 40, 200, size // 2, size - 1)):
        digest = manifest.experts[f"0/{expert}"]
        poke(path_of(store, digest), offset)
        with pytest.raises(CheckpointError, match=f"blob {digest[:12]} of the store is damaged"):
            store.open(digest)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_blob_is_refused_by_name(size: int, source: Path, store: ExpertStore) -> None:
    digest = store.import_model(source, name="m").experts["2/3"]
    path = path_of(store, digest)
    path.chmod(0o644)
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    with pytest.raises(CheckpointError, match=digest[:12]):
        store.open(digest)


def test_swapped_blobs_are_refused_by_name(source: Path, store: ExpertStore) -> None:
    manifest = store.import_model(source, name="m")
    one, two = path_of(store, manifest.experts["0/0"]), path_of(store, manifest.experts["0/1"])
    one.rename(two.with_name("aside"))
    two.rename(one)
    two.with_name("aside").rename(two)
    for index in (0, 1):
        with pytest.raises(CheckpointError, match="is damaged"):
            store.open(manifest.experts[f"0/{index}"])


def test_a_damaged_blob_is_repaired_by_importing_again(source: Path, tmp_path: Path) -> None:
    full = ExpertStore(tmp_path / "first")
    full.import_model(source, name="m")
    store = ExpertStore(tmp_path / "store", max_bytes=full.used_bytes)
    manifest = store.import_model(source, name="m")
    digest = manifest.experts["1/4"]
    mapped = store.open(digest)
    poke(path_of(store, digest), 500)
    store.import_experts(source, manifest=manifest, experts=[(1, 4)])
    assert hashlib.sha256(path_of(store, digest).read_bytes()).hexdigest() == digest
    assert store.open(digest).num_bytes == mapped.num_bytes


def test_a_verified_file_is_verified_once_and_again_when_it_changed(source: Path, store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = store.import_model(source, name="m").experts["0/0"]
    hashed = []
    file_digest = hashlib.file_digest
    monkeypatch.setattr(blob_files.hashlib, "file_digest", lambda *args: hashed.append(args) or file_digest(*args))
    ExpertStore(store._blobs._root).open(digest)
    store.open(digest)
    assert not hashed
    os.utime(path_of(store, digest), ns=(1, 1))
    store.open(digest)
    assert len(hashed) == 1
    store.open(digest)
    assert len(hashed) == 1
    path_of(store, digest + ".ok").write_bytes(b"[]")
    store.open(digest)
    assert len(hashed) == 2


def test_unknown_names_are_not_found_and_never_paths(store: ExpertStore) -> None:
    for digest in ("0" * 64, "../../etc/passwd", "/etc/passwd", "", "A" * 64):
        assert not store.has(digest)
        with pytest.raises(NotFound):
            store.open(digest)
        with pytest.raises(NotFound):
            store.manifest(digest)


def test_a_store_that_is_too_small_refuses_with_both_numbers(source: Path, tmp_path: Path) -> None:
    store = ExpertStore(tmp_path / "store", max_bytes=30_000)
    with pytest.raises(ConfigError, match=r"needs \d+ bytes, the store may hold 30000"):
        store.import_model(source, name="m")
    assert store.used_bytes == 0


def test_a_store_that_fills_up_refuses_with_both_numbers_and_stays_whole(source: Path, tmp_path: Path) -> None:
    free = ExpertStore(tmp_path / "free")
    manifest = free.import_model(source, name="m")
    store = ExpertStore(tmp_path / "store", max_bytes=free.used_bytes - 1)
    with pytest.raises(ConfigError, match=r"\d+ bytes more do not fit, \d+ of \d+ are in use"):
        store.import_model(source, name="m")
    assert store.used_bytes < free.used_bytes
    assert all(store.open(digest) for digest in all_digests(manifest) if store.has(digest))
    exact = ExpertStore(tmp_path / "exact", max_bytes=free.used_bytes)
    exact.import_model(source, name="m")
    exact.import_model(source, name="again")
    assert exact.used_bytes == free.used_bytes


def test_what_a_dead_writer_left_is_swept_and_what_a_live_one_writes_is_not(source: Path, store: ExpertStore) -> None:
    (store._blobs._root / "tmp" / "left").write_bytes(b"half")
    file, name = store._blobs._new_file()
    try:
        store.import_model(source, name="m")
        assert [path.name for path in (store._blobs._root / "tmp").iterdir()] == [name.name]
    finally:
        os.close(file)
        name.unlink()


def test_a_disk_that_refuses_is_an_error_that_names_the_store(source: Path, store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_file: int, _data: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(blob_files.os, "write", full)
    with pytest.raises(ConfigError, match=r"store.dir: cannot write .*No space left"):
        store.import_model(source, name="m")
    assert not list((store._blobs._root / "tmp").iterdir())


IMPORTER = """
import sys
from pathlib import Path
from actors.expert_store import ExpertStore
print("ready", flush=True)
sys.stdin.readline()
print(ExpertStore(Path(sys.argv[2])).import_model(Path(sys.argv[1]), name="m").digest, flush=True)
"""


def test_processes_that_import_the_same_model_at_once_agree(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    command = [sys.executable, "-c", IMPORTER, str(source), str(root)]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert all(worker.stdout and worker.stdout.readline() == "ready\n" for worker in workers)
    for worker in workers:
        assert worker.stdin
        worker.stdin.write("go\n")
        worker.stdin.flush()
    digests = {worker.communicate(timeout=60)[0].strip() for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert len(digests) == 1
    store = ExpertStore(root)
    manifest = store.manifest(digests.pop())
    assert all(hashlib.sha256(path_of(store, digest).read_bytes()).hexdigest() == digest for digest in all_digests(manifest))
    assert not list((root / "tmp").iterdir())


def test_threads_that_import_and_open_at_once_agree(source: Path, store: ExpertStore) -> None:
    with ThreadPoolExecutor(4) as pool:
        manifests = list(pool.map(lambda _: ExpertStore(store._blobs._root).import_model(source, name="m"), range(4)))
        opened = list(pool.map(store.open, all_digests(manifests[0]) * 2))
    assert len({manifest.digest for manifest in manifests}) == 1
    assert len(opened) == 2 * NUM_LAYERS * (NUM_EXPERTS + 1)


def test_views_outlive_the_blob_and_the_removal_of_its_file(source: Path, store: ExpertStore) -> None:
    digest = store.import_model(source, name="m").experts["0/0"]
    tensors = store.open(digest).tensors
    before = {name: array.tobytes() for name, array in tensors.items()}
    path_of(store, digest).unlink()
    assert {name: array.tobytes() for name, array in tensors.items()} == before


def test_a_gate_is_part_of_the_digest_with_its_arithmetic(tmp_path: Path, store: ExpertStore) -> None:
    plain = store.import_model(save_custom(tmp_path / "a", gate={"normalize": True}), name="m")
    scaled = store.import_model(save_custom(tmp_path / "b", gate={"normalize": True, "scale": 2.0}), name="m")
    assert plain.experts == scaled.experts
    assert not set(plain.gates.values()) & set(scaled.gates.values())


def test_the_store_needs_no_torch() -> None:
    code = "import sys, actors.expert_store, cluster.registry.checkpoint; print(sorted({'torch', 'transformers', 'ray', 'grpc'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert re.sub(r"\s", "", done.stdout) == "[]"
