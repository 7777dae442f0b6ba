"""Where plain classes meet Ray: what the controller's process builds itself from. An importable module, because Ray ships references to it, not code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ray

from cluster.controller_actor import ControllerSettings
from cluster.core.spec import ClusterSpec
from cluster.deploy.secrets import Secrets, load_or_make, with_tenant_tokens
from cluster.fleet import Fleet

DIGEST_FILE = "controller.digest"


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was made or found on the controller's node. `running_digest` is the digest of the code that the controller was last started with."""

    spec_json: str
    secrets: Secrets
    state_dir: Path
    store_dir: Path
    running_digest: str


def prepare(spec_json: str) -> Prepared:
    """Run on the controller's node: make or find the folders and the secrets of a deployment."""
    spec = ClusterSpec.model_validate_json(spec_json)
    state_dir = spec.control.state_dir or session_folder() / "moelastic" / spec.name / "control"
    store_dir = spec.store.dir or session_folder() / "moelastic" / "store"
    secrets = load_or_make(state_dir)
    digest = state_dir / DIGEST_FILE
    return Prepared(
        spec_json=with_tenant_tokens(spec, state_dir).model_dump_json(),
        secrets=secrets,
        state_dir=state_dir,
        store_dir=store_dir,
        running_digest=digest.read_text() if digest.is_file() else "",
    )


def record_digest(state_dir: Path, digest: str) -> None:
    """Run on the controller's node: remember the code that it was started with."""
    (state_dir / DIGEST_FILE).write_text(digest)


def session_folder() -> Path:
    """Ray's session folder on this node."""
    return Path(ray._private.worker.global_worker.node.get_session_dir_path())  # noqa: SLF001  # Ray has no public name for it


def make_fleet(settings: ControllerSettings, *, store_max_bytes: int | None = None) -> Fleet:
    """The fleet on Ray, with the plain classes that it hosts."""
    from actors.hosting import HostedExpertActor
    from actors.node_agent import NodeAgent
    from cluster.ray_fleet import HostedClasses, RayFleet
    from router_service.hosting import RouterHost
    from router_service.server import RouterSecrets

    return RayFleet(
        namespace=settings.deployment,
        classes=HostedClasses(expert_actor=HostedExpertActor, node_agent=NodeAgent, router=RouterHost),
        link_secret=settings.link_secret,
        router_secrets=RouterSecrets(link_secret=settings.link_secret, control_token=settings.control_token),
        store_dir=settings.store_dir,
        store_max_bytes=store_max_bytes,
        observe_timeout_s=settings.observe_timeout_s,
    )
