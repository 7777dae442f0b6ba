"""Who may call: bearer tokens of tenants, read from files, compared in constant time. A token is never printed, logged or kept in clear."""

from __future__ import annotations

import hashlib
import hmac
import logging
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cluster.core.errors import ConfigError, Unauthenticated
from cluster.core.spec import AuthSpec

logger = logging.getLogger(__name__)

SCHEME: Final = "bearer "
MIN_TOKEN_BYTES: Final = 16
MAX_TOKEN_FILE_BYTES: Final = 4096
OPEN_TENANT: Final = "default"


class Tenants:
    """Tenants by the digest of their token."""

    def __init__(self, tokens: Mapping[str, bytes]) -> None:
        """Raises ConfigError for a token that is too short to be a secret, or that two tenants share."""
        self._digests: dict[str, bytes] = {}
        for tenant, token in tokens.items():
            if len(token) < MIN_TOKEN_BYTES:
                message = f"auth.tokens.{tenant}: the token has {len(token)} bytes, at least {MIN_TOKEN_BYTES} are needed; make one with `openssl rand -hex 32`"
                raise ConfigError(message)
            digest = hashlib.sha256(token).digest()
            if digest in self._digests.values():
                message = f"auth.tokens.{tenant}: another tenant has the same token; give each its own"
                raise ConfigError(message)
            self._digests[tenant] = digest

    @classmethod
    def from_files(cls, files: Mapping[str, Path]) -> Tenants:
        """Read one token from each file, without its line end. Raises ConfigError for a file that cannot be read."""
        return cls({tenant: _read(tenant, path) for tenant, path in files.items()})

    def tenant_of(self, authorization: str | None) -> str:
        """The tenant of an `authorization` metadata value. Raises Unauthenticated. Every token is compared, so time tells nothing."""
        if authorization is None:
            message = "no token: send metadata `authorization: Bearer TOKEN`"
            raise Unauthenticated(message)
        if authorization[: len(SCHEME)].lower() != SCHEME:
            message = "metadata `authorization` has another form than `Bearer TOKEN`"
            raise Unauthenticated(message)
        offered = hashlib.sha256(authorization[len(SCHEME) :].strip().encode()).digest()
        found = [tenant for tenant, digest in self._digests.items() if hmac.compare_digest(digest, offered)]
        if not found:
            message = "the token is not known here; check that it belongs to this deployment (its file is named in auth.tokens)"
            raise Unauthenticated(message)
        return found[0]


def operators_of(auth: AuthSpec) -> frozenset[str]:
    """Tenants that may see into the router; unless some are named, the one that there is by default, where it is the only one."""
    if auth.operators is not None:
        return auth.operators
    is_alone = not auth.enabled or set(auth.tokens) <= {OPEN_TENANT}
    return frozenset({OPEN_TENANT}) if is_alone else frozenset()


def _read(tenant: str, path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        with path.open("rb") as file:
            content = file.read(MAX_TOKEN_FILE_BYTES + 1)
    except OSError as error:
        message = f"auth.tokens.{tenant}: cannot read {path} ({error.strerror}); the router's node needs this file"
        raise ConfigError(message) from error
    if len(content) > MAX_TOKEN_FILE_BYTES:
        message = f"auth.tokens.{tenant}: {path} has more than {MAX_TOKEN_FILE_BYTES} bytes; it must hold one token"
        raise ConfigError(message)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning("token file %s can be read by others than its owner; run: chmod 600 %s", path, path)
    return content.strip()
