"""Build the data set: read the sources, split by file, drop what both sides share, write text and a manifest.

Run ``python -m examples.tiny_moe_lm.data``.

Large files go to the git-ignored data/ folder; manifest.json and the small heldout/ samples are committed.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from examples.tiny_moe_lm.sources import BIBLE_PROGRAM, SOURCES, Document, Source, package_archive, package_documents, stdlib_documents

HERE = Path(__file__).parent
DATA = HERE / "data"
HELDOUT = HERE / "heldout"
DOMAINS = ("code", "prose", "markup")
DOCUMENT_SEPARATOR = "\x00"
"""Between documents in the joined text; no document contains it."""

_HELDOUT_ONE_IN = 20
_SAMPLE_BYTES = 128 * 1024
_SAMPLE_BYTES_PER_DOCUMENT = 12 * 1024
_SHARED_BLOCK_CHARS = 64


def main() -> None:
    """Write data/{domain}.{train,heldout}.txt, heldout/{domain}.txt and manifest.json."""
    DATA.mkdir(exist_ok=True)
    HELDOUT.mkdir(exist_ok=True)
    manifest: dict[str, object] = {"python": platform.python_version(), "heldout_one_in": _HELDOUT_ONE_IN}
    manifest["sources"] = [_stdlib_record(), *(_record(source) for source in SOURCES)]
    manifest["programs"] = [_record(BIBLE_PROGRAM)]
    domains = {}
    for domain in DOMAINS:
        train, heldout = split(_documents(domain))
        train, num_dropped = without_shared_blocks(train, heldout)
        sample = heldout_sample(heldout)
        (HELDOUT / f"{domain}.txt").write_text(sample, encoding="utf-8", newline="")
        domains[domain] = {
            "train": _written(DATA / f"{domain}.train.txt", train),
            "heldout": _written(DATA / f"{domain}.heldout.txt", heldout),
            "train_blocks_dropped_as_shared": num_dropped,
            "sample_bytes": len(sample.encode()),
            "sample_sha256": _sha256(sample.encode()),
        }
        print(domain, json.dumps(domains[domain]))
    manifest["domains"] = domains
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def split(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """Divide documents by the hash of their name, dropping repeated texts; both sides in hash order."""
    train, heldout = list[tuple[str, Document]](), list[tuple[str, Document]]()
    seen = set[str]()
    for name, text in documents:
        fingerprint = _sha256(text.strip().encode())
        if fingerprint in seen or not text.strip() or DOCUMENT_SEPARATOR in text:
            continue
        seen.add(fingerprint)
        key = _sha256(name.encode())
        side = heldout if int(key, 16) % _HELDOUT_ONE_IN == 0 else train
        side.append((key, (name, text)))
    return [pair for _, pair in sorted(train)], [pair for _, pair in sorted(heldout)]


def without_shared_blocks(train: list[Document], heldout: list[Document]) -> tuple[list[Document], int]:
    """Remove from train every paragraph that also stands in a held-out document; return how many were removed.

    Licence headers, boilerplate and entries that two dictionaries share would otherwise be scored as if learnt.
    """
    known = {key for _, text in heldout for block in _blocks(text) if (key := _block_key(block))}
    kept, num_dropped = list[Document](), 0
    for name, text in train:
        blocks = list(_blocks(text))
        own = [block for block in blocks if _block_key(block) not in known]
        num_dropped += len(blocks) - len(own)
        kept.append((name, "".join(own) if len(own) < len(blocks) else text))
    return kept, num_dropped


def heldout_sample(heldout: list[Document]) -> str:
    """Join the first 12 KiB of held-out documents, in hash order, to 128 KiB of text."""
    pieces, size = list[str](), 0
    for _, text in heldout:
        room = min(_SAMPLE_BYTES - size, _SAMPLE_BYTES_PER_DOCUMENT)
        if room <= 0:
            break
        piece = text.encode()[:room].decode(errors="ignore")
        pieces.append(piece)
        size += len(piece.encode())
    return "".join(pieces)


def _documents(domain: str) -> Iterator[Document]:
    if domain == "code":
        yield from stdlib_documents()
    for source in SOURCES:
        if source.domain == domain:
            yield from package_documents(source, DATA / "packages")


def _blocks(text: str) -> Iterator[str]:
    """Yield paragraphs with the blank lines after them, so that joining them gives the text back."""
    yield from re.findall(r"(?:[^\n]*\S[^\n]*(?:\n|$))+\s*|\s+", text)


def _block_key(block: str) -> str | None:
    """Whitespace-free text of a paragraph that is long enough to count as shared."""
    key = "".join(block.split())
    return key if len(key) >= _SHARED_BLOCK_CHARS else None


def _written(path: Path, documents: list[Document]) -> dict[str, object]:
    raw = DOCUMENT_SEPARATOR.join(text for _, text in documents).encode()
    path.write_bytes(raw)
    return {"documents": len(documents), "bytes": len(raw), "sha256": _sha256(raw)}


def _stdlib_record() -> dict[str, object]:
    return {"domain": "code", "package": "Python standard library", "version": platform.python_version(), "licence": "PSF-2.0"}


def _record(source: Source) -> dict[str, object]:
    archive = package_archive(source, DATA / "packages")
    return {
        "domain": source.domain,
        "package": source.package,
        "version": archive.name.split("_")[1].replace("%3a", ":"),
        "licence": source.licence,
        "pattern": source.pattern,
        "archive_bytes": archive.stat().st_size,
        "archive_sha256": _sha256(archive.read_bytes()),
    }


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


if __name__ == "__main__":
    main()
