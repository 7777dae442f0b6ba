"""Looking into an expert store, and damaging files."""

from __future__ import annotations

from pathlib import Path

from actors.expert_store import ExpertStore
from cluster.core.descriptors import Manifest


def all_digests(manifest: Manifest) -> list[str]:
    return [*manifest.experts.values(), *manifest.gates.values()]


def path_of(store: ExpertStore, digest: str) -> Path:
    return store._blobs._path(digest)


def contents(store: ExpertStore, manifest: Manifest) -> dict[str, dict[str, bytes]]:
    return {digest: {name: array.tobytes() for name, array in store.open(digest).tensors.items()} for digest in all_digests(manifest)}


def poke(path: Path, offset: int, change: int = 1) -> None:
    """Flip bits of one byte of a read-only file in place."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ change]))
