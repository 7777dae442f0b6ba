"""What actors and routers are started with, made from the spec: the same spec always gives the same configs, so their digests can be compared."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cluster.core.actor_config import ExpertActorConfig, RouterConfig, TelemetryConfig
from cluster.core.ids import Incarnation
from cluster.core.spec import ClusterSpec, ControlSpec, ShadowSpec, StoreSpec

LIVE_SETTINGS = frozenset({"reconcile_s"})


@dataclass(frozen=True, slots=True)
class Launch:
    """What a deployment knows besides its spec. `control_address` is the controller's HOST:PORT for routers.

    `control` and `store` are the sections that the controller's process was started with, where that is known.
    """

    store_dir: Path
    code_digest: str = ""
    control_address: str = ""
    control: ControlSpec | None = None
    store: StoreSpec | None = None


def actor_config(spec: ClusterSpec, launch: Launch, incarnation: Incarnation, num_slots: int) -> ExpertActorConfig:
    """The config of one life of an expert actor."""
    actors = spec.actors
    shadows = [model.shadow for model in spec.models if model.shadow is not None] or [ShadowSpec()]
    return ExpertActorConfig(
        deployment=spec.name,
        actor_id=incarnation.actor_id,
        generation=incarnation.generation,
        num_slots=num_slots,
        memory_bytes=actors.memory_bytes,
        device=actors.device,
        deterministic=actors.deterministic,
        layout=actors.layout,
        num_gpus=actors.num_gpus,
        max_tokens_per_frame=actors.max_tokens_per_frame,
        frames_in_flight=actors.frames_in_flight,
        max_frame_bytes=spec.link.max_frame_bytes,
        link_host=spec.link.host,
        store_dir=launch.store_dir,
        drain_timeout_s=actors.drain_timeout_s,
        expanded_max=max(shadow.expanded_max for shadow in shadows),
        expanded_idle_s=max(shadow.expanded_idle_s for shadow in shadows),
        abft_fraction=spec.abft.fraction,
        redigest_s=spec.abft.redigest_s,
        chaos_allowed=spec.chaos == "allowed",
        sentinel=actors.sentinel,
        short_slices=spec.scheduling.short_slices,
        niceness=spec.scheduling.niceness,
        answering_niceness=spec.scheduling.answering_niceness,
        compute_niceness=spec.scheduling.compute_niceness,
        code_digest=launch.code_digest,
        telemetry=TelemetryConfig(
            sampling_ratio=spec.telemetry.sampling_ratio,
            trace_dir=spec.telemetry.trace_dir,
            otlp_endpoint=spec.telemetry.otlp_endpoint,
            actor_spans=spec.telemetry.actor_spans,
        ),
    )


def router_config(spec: ClusterSpec, launch: Launch, router_id: str) -> RouterConfig:
    """The config of one router."""
    return RouterConfig(router_id=router_id, spec=spec, control_address=launch.control_address, store_dir=launch.store_dir, code_digest=launch.code_digest)


def router_digest(spec: ClusterSpec, launch: Launch) -> str:
    """SHA-256 of what shapes a router's behaviour. Models are not in it: routers learn them from the table. Nor is the controller's address.

    Nor is the number of its siblings, as long as there are some: another one joins those that run.
    """
    router = spec.router.model_copy(update={"count": min(spec.router.count, 2)})
    sections = (router, spec.link, spec.auth, spec.telemetry)
    text = "\n".join([spec.name, str(launch.store_dir), launch.code_digest, *(part.model_dump_json() for part in sections)])
    return hashlib.sha256(text.encode()).hexdigest()


def controller_differences(spec: ClusterSpec, launch: Launch) -> list[str]:
    """Settings that the running controller has otherwise and takes over only when it is replaced. `control.reconcile_s` it takes over at once."""
    sections = (("control", launch.control, spec.control), ("store", launch.store, spec.store))
    result = []
    for section, running, wanted in sections:
        if running is None:
            continue
        before, after = running.model_dump(mode="json"), wanted.model_dump(mode="json")
        changed = [name for name in after if before[name] != after[name] and name not in LIVE_SETTINGS]
        result += [f"{section}.{name} is {before[name]} in the running controller, now {after[name]}" for name in changed]
    return result
