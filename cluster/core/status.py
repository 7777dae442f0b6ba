"""What was observed, as data: nodes, expert actors, their slots, routers. Facts only; what to do about them is `reconcile`'s."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from cluster.core.ids import CopyId, Incarnation


class SlotState(StrEnum):
    """A slot's copy: `loading` (mapped, verified, warmed), `ready` (answers), `draining` (answers what is under way), `failed` (see its reason)."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class ActorState(StrEnum):
    """An expert actor: `starting`, `ready`, `draining`, `unreachable` (no report in time), `dead`."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    UNREACHABLE = "unreachable"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class SlotReport:
    """One slot in use. `num_bytes` counts what the copy holds of the device's memory (mapped or private)."""

    copy: CopyId
    state: SlotState
    num_bytes: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ActorReport:
    """What an expert actor says of itself. `max_epoch` is the highest epoch of a command it has seen; older commands are refused.

    `expanded_bytes`: shadows expanded for use, beside `used_bytes`, which counts them packed; at most `expanded_max_bytes`. `num_unexpanded`: how many
    times rows were answered by a shadow for which there was no room.
    """

    incarnation: Incarnation
    pid: int
    process_start_s: float
    node_id: str
    host: str
    port: int
    device: str
    num_slots: int
    capacity_bytes: int
    used_bytes: int
    slots: tuple[SlotReport, ...]
    max_epoch: int
    code_digest: str
    config_digest: str
    frames_done: int = 0
    oldest_age_s: float = 0.0
    expanded_bytes: int = 0
    expanded_max_bytes: int = 0
    num_unexpanded: int = 0

    @property
    def num_free_slots(self) -> int:
        """Slots that hold nothing."""
        return self.num_slots - len(self.slots)


@dataclass(frozen=True, slots=True)
class ActorObservation:
    """One actor as the fleet sees it; `report` is None unless it answered in time.

    `silent_s`: how long a question has waited for its answer. `is_outdated`: the report is older than the last command, so it may tell of slots
    as they were before it.
    """

    incarnation: Incarnation
    state: ActorState
    node_id: str
    report: ActorReport | None = None
    reason: str = ""
    silent_s: float = 0.0
    is_outdated: bool = False


@dataclass(frozen=True, slots=True)
class GpuFault:
    """An error of a GPU that its driver told (NVIDIA's Xid), when by its node's clock; `is_device`: the device is to blame, not its program."""

    unix_s: float
    device: str
    xid: int
    is_device: bool


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU as its driver sees it; `device` is how actors name it. `problem`: why it cannot be read, as one that fell off its bus; then no more is known."""

    index: int
    device: str = ""
    uuid: str = ""
    name: str = ""
    total_bytes: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class NodeGpus:
    """What a node's driver tells: its GPUs now, and errors so far."""

    readings: tuple[GpuReading, ...] = ()
    faults: tuple[GpuFault, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeObservation:
    """One node. `num_gpus` counts Ray's GPUs, logical or real; `free_gpus` is what Ray says nobody holds, None when it does not say.

    `gpus` are the real ones, as far as its agent has told of them.
    """

    node_id: str
    name: str
    address: str
    alive: bool
    num_gpus: float
    num_cpus: float
    is_head: bool = False
    free_gpus: float | None = None
    gpu_faults: tuple[GpuFault, ...] = ()
    gpus: tuple[GpuReading, ...] = ()


@dataclass(frozen=True, slots=True)
class RouterObservation:
    """One router process; `host` and `port` are where clients call it. `process_start_s` is 0 where it is not known."""

    router_id: str
    state: ActorState
    node_id: str
    host: str = ""
    port: int = 0
    metrics_port: int = 0
    pid: int = 0
    generation: int = 0
    reason: str = ""
    process_start_s: float = 0.0


@dataclass(frozen=True, slots=True)
class FleetObservation:
    """Everything seen in one look, at `observed_s` (monotonic)."""

    observed_s: float
    nodes: tuple[NodeObservation, ...] = ()
    actors: tuple[ActorObservation, ...] = ()
    routers: tuple[RouterObservation, ...] = ()

    @property
    def is_loading(self) -> bool:
        """Whether some actor is loading a copy."""
        return any(slot.state is SlotState.LOADING for actor in self.actors if actor.report is not None for slot in actor.report.slots)

    def has_same_facts(self, other: FleetObservation) -> bool:
        """Whether all is as in another look, leaving out when that was and how busy actors are."""
        mine = (self.nodes, self.routers, tuple(_without_activity(actor) for actor in self.actors))
        return mine == (other.nodes, other.routers, tuple(_without_activity(actor) for actor in other.actors))


def _without_activity(actor: ActorObservation) -> ActorObservation:
    report = actor.report
    return replace(actor, silent_s=0.0, report=None if report is None else replace(report, frames_done=0, oldest_age_s=0.0, expanded_bytes=0, num_unexpanded=0))


@dataclass(frozen=True, slots=True)
class CommandReply:
    """How an actor or a node agent took a command: accepted, or refused with the `reason` of an error of the tree. `value` is the command's result, as JSON.

    Errors travel as data: exceptions with classes of their own would be unpickled on the other side.
    """

    ok: bool
    error: str = ""
    message: str = ""
    value: str = ""
