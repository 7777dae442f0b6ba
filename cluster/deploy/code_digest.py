"""Which code runs: one digest over our packages, so that a deployment can tell an actor of older code from its own."""

from __future__ import annotations

import hashlib
from pathlib import Path

PACKAGES = ("actors", "cluster", "protos", "router_service")
PROJECT_ROOT = Path(__file__).resolve().parents[2]
# The command line and the local cluster run on nobody's node; changing them replaces nothing.
LEFT_OUT = ("cluster/cli/", "cluster/local/")


def code_digest(root: Path = PROJECT_ROOT) -> str:
    """SHA-256 over path and content of every Python file of the served packages, in hex."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if not name.startswith(LEFT_OUT):
                content = path.read_bytes()
                digest.update(f"{name}\n{len(content)}\n".encode())
                digest.update(content)
    return digest.hexdigest()
