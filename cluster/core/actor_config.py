"""What an expert actor and a router are started with: plain data, equal on every side, without secrets."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from cluster.core.ids import Incarnation
from cluster.core.spec import ClusterSpec


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TelemetryConfig(_Config):
    """Where a process sends its spans."""

    sampling_ratio: float = 0.01
    trace_dir: Path | None = None
    otlp_endpoint: str | None = None
    actor_spans: bool = False


class ExpertActorConfig(_Config):
    """One incarnation of an expert actor. `config_digest` leaves out the generation and the node: it says whether two actors would behave alike."""

    deployment: str
    actor_id: str
    generation: int
    num_slots: int
    memory_bytes: int | None = None
    device: str = "auto"
    deterministic: bool = False
    layout: Literal["mapped", "packed", "widened", "auto"] = "mapped"
    num_gpus: float = 0.0
    max_tokens_per_frame: int = 4096
    frames_in_flight: int = 2
    max_frame_bytes: int = 256 << 20
    link_host: str | None = None
    store_dir: Path
    drain_timeout_s: float = 10.0
    expanded_max: int = 8
    expanded_idle_s: float = 10.0
    abft_fraction: float = 0.0625
    redigest_s: float = 300.0
    chaos_allowed: bool = False
    sentinel: bool = False
    short_slices: bool = False
    niceness: int | None = None
    answering_niceness: int | None = None
    compute_niceness: int = 0
    code_digest: str = ""
    telemetry: TelemetryConfig = TelemetryConfig()

    @property
    def incarnation(self) -> Incarnation:
        """The life that this config starts."""
        return Incarnation(self.actor_id, self.generation)

    @property
    def config_digest(self) -> str:
        """SHA-256 of everything that shapes behaviour."""
        text = self.model_dump_json(exclude={"generation", "code_digest"})
        return hashlib.sha256(text.encode()).hexdigest()


class RouterConfig(_Config):
    """One router: one of `router_ids(spec)`. `control_address` is the controller's HOST:PORT; `spec` is the deployment it belongs to."""

    router_id: str
    spec: ClusterSpec
    control_address: str
    store_dir: Path
    code_digest: str = ""

    @property
    def metrics_port(self) -> int:
        """The one that the spec names plus this router's place among its siblings; 0 where any will do."""
        first = self.spec.router.metrics_port
        return first + router_ids(self.spec).index(self.router_id) if first else 0


def router_ids(spec: ClusterSpec) -> tuple[str, ...]:
    """The routers of a deployment."""
    return tuple(f"router-{place}" for place in range(spec.router.count))
