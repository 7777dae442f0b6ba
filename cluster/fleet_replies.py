"""What machines answer, in our words: names as incarnations, command replies as errors, Ray's node records as observations. No Ray in here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from cluster.core.errors import CheckpointError, ConfigError, FleetError, MoeError, SlotsExhausted, StaleTable
from cluster.core.ids import Incarnation
from cluster.core.status import ActorObservation, ActorState, CommandReply, FleetObservation, NodeGpus, NodeObservation, RouterObservation

NODE_PREFIX_CHARS = 12
AGENT_PREFIX = "agent/"
ROUTER_NAME = re.compile(r"^router-\d+$")
_EXPERT_NAME = re.compile(r"^(?P<actor_id>[A-Za-z0-9][A-Za-z0-9._-]*)/g(?P<generation>\d+)$")
_ERRORS: dict[str, type[MoeError]] = {kind().reason: kind for kind in (SlotsExhausted, StaleTable, CheckpointError, ConfigError)}


def accepted(reply: CommandReply) -> CommandReply:
    """The reply, or the error that it carries as data; FleetError for reasons that have no class of their own here."""
    if not reply.ok:
        raise _ERRORS.get(reply.error, FleetError)(reply.message)
    return reply


def node_of(entry: Mapping[str, Any], free: Mapping[str, float]) -> NodeObservation:
    """One entry of `ray.nodes()` with the node's free resources, as far as they are known."""
    resources = entry.get("Resources", {})
    is_alive = bool(entry["Alive"])
    return NodeObservation(
        node_id=entry["NodeID"],
        name=entry.get("NodeName") or entry["NodeID"][:NODE_PREFIX_CHARS],
        address=entry["NodeManagerAddress"],
        alive=is_alive,
        num_gpus=float(resources.get("GPU", 0.0)),
        num_cpus=float(resources.get("CPU", 0.0)),
        is_head="node:__internal_head__" in resources,
        free_gpus=float(free.get("GPU", 0.0)) if is_alive and free else None,
    )


def incarnation_of(name: str) -> Incarnation | None:
    """Of an expert actor's name; None for a router's."""
    match = _EXPERT_NAME.match(name)
    return None if match is None else Incarnation(match["actor_id"], int(match["generation"]))


def observation_of(
    now_s: float,
    nodes: Iterable[NodeObservation],
    seen: Iterable[ActorObservation | RouterObservation],
    gpus: Mapping[str, NodeGpus],
) -> FleetObservation:
    """One look, of what was seen of each node and process."""
    seen = list(seen)
    return FleetObservation(
        now_s,
        tuple(replace(node, gpu_faults=found.faults, gpus=found.readings) if (found := gpus.get(node.node_id)) else node for node in nodes),
        tuple(entry for entry in seen if isinstance(entry, ActorObservation)),
        tuple(entry for entry in seen if isinstance(entry, RouterObservation)),
    )


def failure_of(name: str, reason: str) -> ActorObservation | RouterObservation:
    """A process that was ended because it could not start; remembered so that its reason is seen."""
    incarnation = incarnation_of(name)
    if incarnation is None:
        return RouterObservation(name, ActorState.DEAD, "", reason=reason)
    return ActorObservation(incarnation, ActorState.DEAD, "", reason=reason)
