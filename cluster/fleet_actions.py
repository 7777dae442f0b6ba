"""Performing one action on the fleet, within its time, and saying how it ended. Decides nothing."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from cluster.core.actions import Action, Assume, Drain, ImportExperts, ImportModel, Release, StartActor, StartRouter, StopActor, StopRouter
from cluster.core.descriptors import Manifest
from cluster.core.errors import CheckpointError, ConfigError, MoeError
from cluster.core.launch import Launch, actor_config, router_config
from cluster.core.memory import Memory
from cluster.core.placement import is_listed
from cluster.core.spec import ClusterSpec
from cluster.fleet import Fleet

COMMAND_TIMEOUT_S = 10.0
IMPORT_TIMEOUT_S = 4 * 3600.0
STOP_MARGIN_S = 15.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an action ended: accepted when `error` is None. `final`: trying again cannot help. An imported model brings its manifest."""

    action: Action
    error: str | None = None
    final: bool = False
    manifest: Manifest | None = None


async def perform(action: Action, fleet: Fleet, spec: ClusterSpec, launch: Launch, memory: Memory) -> Outcome:
    """Do it; every failure that reconciling can meet becomes an Outcome."""
    try:
        async with asyncio.timeout(_limit_s(action, spec)):
            manifest = await _perform(action, fleet, spec, launch, memory)
    except TimeoutError:
        return Outcome(action, f"{action.key} did not end within {_limit_s(action, spec):g} s")
    except MoeError as error:
        final = isinstance(action, ImportModel) and isinstance(error, CheckpointError | ConfigError)
        return Outcome(action, str(error), final)
    return Outcome(action, manifest=manifest)


def _limit_s(action: Action, spec: ClusterSpec) -> float:
    match action:
        case ImportModel() | ImportExperts():
            return IMPORT_TIMEOUT_S
        case StartActor() | StartRouter():
            return spec.actors.start_timeout_s
        case StopActor():
            return spec.actors.drain_timeout_s + STOP_MARGIN_S
        case StopRouter():
            return spec.router.drain_timeout_s + STOP_MARGIN_S
        case Assume() | Drain() | Release():
            return COMMAND_TIMEOUT_S


async def _perform(action: Action, fleet: Fleet, spec: ClusterSpec, launch: Launch, memory: Memory) -> Manifest | None:
    match action:
        case ImportModel():
            record = memory.models.get(action.model)
            expected = record.manifest if record is not None else None
            return await fleet.import_model(
                action.node_id, name=action.model, source=action.source, dtype=action.dtype, expected=expected, shadow=action.shadow
            )
        case ImportExperts():
            known = memory.models[action.model]
            shadows = sorted((copy.expert.layer, copy.expert.index) for copy in action.shadows if is_listed(known.manifest, copy))
            await fleet.import_experts(
                action.node_id,
                manifest=known.manifest,
                source=Path(known.path),
                experts=sorted(action.experts),
                shadows=shadows,
                distrusted=sorted(action.distrusted),
            )
        case StartActor():
            config = actor_config(spec, launch, action.incarnation, action.num_slots)
            await fleet.start_actor(config, node_id=action.node_id, num_gpus=spec.actors.num_gpus, num_cpus=spec.actors.num_cpus)
        case StopActor():
            await fleet.stop_actor(action.incarnation, timeout_s=0.0 if action.at_once else spec.actors.drain_timeout_s)
        case Assume():
            await fleet.assume(action.incarnation, action.copies, epoch=memory.epoch)
        case Drain():
            await fleet.drain(action.incarnation, action.copies, epoch=memory.epoch)
        case Release():
            await fleet.release(action.incarnation, action.copies, epoch=memory.epoch)
        case StartRouter():
            await fleet.start_router(router_config(spec, launch, action.router_id), node_id=action.node_id)
        case StopRouter():
            await fleet.stop_router(action.router_id, timeout_s=spec.router.drain_timeout_s)
    return None
