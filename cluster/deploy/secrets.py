"""The secrets of one deployment: made once on the node of its controller, in files that only their owner can read, found again ever after."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from cluster.core.errors import ConfigError
from cluster.core.spec import ClusterSpec

SECRET_BYTES = 32
DEFAULT_TENANT = "default"


@dataclass(frozen=True, slots=True)
class Secrets:
    """`link_secret` is what link keys are derived from; `control_token` opens the control service. Neither is ever printed."""

    link_secret: bytes
    control_token: bytes
    control_token_path: Path

    def __repr__(self) -> str:
        return f"Secrets({self.control_token_path.parent})"


def load_or_make(state_dir: Path) -> Secrets:
    """The deployment's secrets, made if this is its first start. Raises ConfigError for a file of another form."""
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    token_path = state_dir / "control_token"
    return Secrets(_load_or_make(state_dir / "link_secret"), _load_or_make(token_path), token_path)


def with_tenant_tokens(spec: ClusterSpec, state_dir: Path) -> ClusterSpec:
    """The spec with a token file for every tenant: without `auth.tokens`, one tenant `default` whose token is made on first start."""
    if not spec.auth.enabled or spec.auth.tokens:
        return spec
    path = state_dir / "tokens" / DEFAULT_TENANT
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _load_or_make(path)
    return spec.model_copy(update={"auth": spec.auth.model_copy(update={"tokens": {DEFAULT_TENANT: path}})})


def _load_or_make(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _load(path)
    secret = secrets.token_bytes(SECRET_BYTES)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret.hex())
        file.flush()
        os.fsync(file.fileno())
    return secret


def _load(path: Path) -> bytes:
    try:
        secret = bytes.fromhex(path.read_text().strip())
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        message = f"{path}: not {SECRET_BYTES} bytes in hex; remove it, and every actor of this deployment is replaced by the next `moelastic up --replace`"
        raise ConfigError(message)
    return secret
