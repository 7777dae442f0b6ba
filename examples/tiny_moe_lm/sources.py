"""Where the training text comes from: the running Python and pinned Debian packages.

Every source is free text that any machine gets through its ordinary package client, so the data set is a list of
names, versions and licences and not a download of our own.
"""

from __future__ import annotations

import gzip
import re
import struct
import subprocess
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Document = tuple[str, str]
"""A name that is stable across machines, and the text."""

_STDLIB_SKIPPED = ("site-packages", "encodings", "pydoc_data", "lib2to3/tests", "idlelib/Icons")
_SECTION_CHARS = 32 * 1024


@dataclass(frozen=True)
class Source:
    """One package (or the standard library) and how its documents are read."""

    domain: str
    package: str
    version: str
    licence: str
    pattern: str
    read: Callable[[Path], str]
    is_one_book: bool = False


def plain_text(path: Path) -> str:
    """Read UTF-8 text, unpacking gzip (and dictzip, which is gzip) on the way."""
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    return raw.decode("utf-8")


def r_strings(path: Path) -> str:
    """Return the character vectors of an R lazy-load database, one string a line.

    The file is a row of (4-byte big-endian length, zlib stream) records; inside, R writes a string as the CHARSXP
    header 0x00040009 followed by its length and its bytes ("R Internals", section 1.8, Serialization Formats).
    """
    raw, lines = path.read_bytes(), list[str]()
    while raw:
        stream = zlib.decompressobj()
        record = stream.decompress(raw[4:])
        raw = stream.unused_data
        position = record.find(b"\x00\x04\x00\x09")
        while position >= 0:
            (length,) = struct.unpack_from(">i", record, position + 4)
            text = record[position + 8 : position + 8 + max(length, 0)]
            lines.append(text.decode("utf-8", errors="replace"))
            position = record.find(b"\x00\x04\x00\x09", position + 8 + len(text))
    return "\n".join(lines)


def html_page(path: Path) -> str:
    """Read an HTML page without its style sheet and scripts, which every page of a manual repeats."""
    return re.sub(r"(?s)<(style|script)\b.*?</\1>\n?", "", plain_text(path))


def king_james(path: Path) -> str:
    """Print the compressed text with its own package's program: one verse a line, a blank line between chapters."""
    program = _unpacked(BIBLE_PROGRAM, path.parents[4]) / "usr/bin/bible"
    done = subprocess.run([str(program), "-f", "gen1:1-rev22:21"], cwd=path.parent, check=True, capture_output=True, text=True)  # noqa: S603
    lines = list[str]()
    for line in done.stdout.splitlines():
        reference, _, verse = line.partition(" ")
        if reference.endswith(":1") and lines:
            lines.append("")
        lines.append(verse)
    return "\n".join(lines) + "\n"


BIBLE_PROGRAM = Source("prose", "bible-kjv", "4.38", "GPL-2.0-or-later", "", plain_text)

SOURCES = (
    Source("prose", "bible-kjv-text", "4.38", "public domain", "**/usr/lib/bible.data", king_james, is_one_book=True),
    Source("prose", "r-cran-janeaustenr", "1.0.0-1", "public domain (package: MIT)", "**/data/Rdata.rdb", r_strings, is_one_book=True),
    Source("prose", "dict-foldoc", "20230119-1", "GFDL-1.1-or-later", "**/foldoc.dict.dz", plain_text, is_one_book=True),
    Source("prose", "dict-devil", "1.0-13.1", "public domain", "**/devil.dict.dz", plain_text, is_one_book=True),
    Source("prose", "jargon-text", "4.4.7-4.1", "public domain", "**/jargon.txt.gz", plain_text, is_one_book=True),
    Source("prose", "debian-history", "2.28", "GPL-2.0-or-later", "**/project-history.en.txt.gz", plain_text, is_one_book=True),
    Source("markup", "python3.11-doc", "3.11.2-6+deb12u8", "PSF-2.0", "**/_sources/**/*.rst.txt", plain_text),
    Source("markup", "manpages", "6.03-2", "GPL-2.0-or-later and other free licences", "**/man?/*.gz", plain_text),
    Source("markup", "manpages-dev", "6.03-2", "GPL-2.0-or-later and other free licences", "**/man?/*.gz", plain_text),
    Source("markup", "git-doc", "1:2.39.5-0+deb12u3", "GPL-2.0-only", "**/*.html", html_page),
    Source("markup", "perl-doc", "5.36.0-7+deb12u3", "GPL-1.0-or-later or Artistic", "**/pod/*.pod", plain_text),
)


def stdlib_documents() -> Iterator[Document]:
    """Yield the Python source files of the running interpreter's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in name for part in _STDLIB_SKIPPED):
            continue
        text = _read_or_none(path, plain_text)
        if text is not None:
            yield f"stdlib/{name}", text


def package_documents(source: Source, cache: Path) -> Iterator[Document]:
    """Yield the documents of one Debian package, downloading and unpacking it on first use."""
    root = _unpacked(source, cache)
    for path in sorted(root.glob(source.pattern)):
        if path.is_symlink() or not path.is_file():
            continue
        text = _read_or_none(path, source.read)
        if text is None:
            continue
        name = f"{source.package}/{path.relative_to(root).as_posix()}"
        if source.is_one_book:
            yield from _sections(name, text)
        else:
            yield name, text


def package_archive(source: Source, cache: Path) -> Path:
    """Return the cached .deb of a source, downloading it with apt-get if it is not there."""
    wanted = f"{source.package}={source.version}"
    folder = cache / source.package
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("*.deb")):
        # Mirrors drop superseded versions: the candidate then stands in, and the manifest records its real hash.
        for name in (wanted, source.package):
            done = subprocess.run(["apt-get", "download", name], cwd=folder, check=False, capture_output=True)  # noqa: S603, S607
            if done.returncode == 0:
                break
    archives = sorted(folder.glob("*.deb"))
    if not archives:
        message = f"{wanted} could not be downloaded: run 'apt-get update' once, then try again"
        raise FileNotFoundError(message)
    return archives[0]


def _unpacked(source: Source, cache: Path) -> Path:
    archive = package_archive(source, cache)
    root = archive.parent / "unpacked"
    if not root.exists():
        subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True)  # noqa: S603, S607
    return root


def _read_or_none(path: Path, read: Callable[[Path], str]) -> str | None:
    try:
        return read(path)
    except UnicodeDecodeError:
        return None


def _sections(name: str, text: str) -> Iterator[Document]:
    """Cut one long book at blank lines into sections, so that it can be split like files are."""
    section, size = list[str](), 0
    number = 0
    for block in re.split(r"(?<=\n)\n+", text):
        section.append(block)
        size += len(block) + 1
        if size >= _SECTION_CHARS:
            yield f"{name}#{number:04d}", "\n".join(section)
            section, size, number = [], 0, number + 1
    if section:
        yield f"{name}#{number:04d}", "\n".join(section)
