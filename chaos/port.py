"""What faults and the runner need of a cluster: who is there, how to strike a process or a node of it, how to ask an actor to misbehave."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from chaos.core.observations import Strike
from chaos.core.targets import ActorView, Inventory, NodeView, Process, Target


class ClusterPort(Protocol):
    """One cluster. It refuses any process, with ConfigError, that its own status did not name."""

    def inventory(self) -> Inventory:
        """Ask the cluster what it consists of. Raises FleetError when it does not answer."""
        ...

    def kill(self, process: Process) -> None:
        """SIGKILL."""
        ...

    def stop(self, process: Process) -> None:
        """SIGSTOP, until `resume` or this process's own end, whichever is first."""
        ...

    def resume(self, process: Process) -> None:
        """SIGCONT; nothing happens when it is gone."""
        ...

    def is_running(self, process: Process) -> bool:
        """Whether this very process is alive and not stopped."""
        ...

    def is_alive(self, process: Process) -> bool:
        """Whether this very process is alive, stopped or not."""
        ...

    def kill_node(self, node: NodeView) -> float:
        """SIGKILL a node's raylet with everything that it hosts, all of it gone on return; when the first process was killed, on the monotonic clock."""
        ...

    def start_node(self, node: NodeView) -> None:
        """Start a node of that name again. Raises FleetError when it does not come up."""
        ...

    async def ask(self, actor: ActorView, fault: str, settings: dict[str, Any]) -> str:
        """Send a fault frame; what the actor answered. Raises FleetError when it refuses, or is not there."""
        ...


class FaultSettings(BaseModel):
    """A fault's arguments; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass
class Injection:
    """A fault that is there. `strikes` is what happened, for the journal; `held` is what its recovery must undo."""

    target: Target
    strikes: list[Strike]
    held: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Order:
    """What a fault is given: the cluster, whom to strike, how, the seed's dice, a clock, an interruptible pause, and the limit of its recovery."""

    cluster: ClusterPort
    target: Target
    settings: FaultSettings
    model: str
    layer: int
    rng: Random
    clock: Callable[[], float]
    pause: Callable[[float], Awaitable[None]]
    seconds: float | None = None
    recover_limit_s: float = 60.0


@dataclass(frozen=True, slots=True)
class FaultKind:
    """A kind of fault. `inject` fills the injection as it goes, so that what was begun can always be undone; `recover` returns once it saw the fault gone.

    `widen(inventory, target, model)` adds to a target whom else the fault strikes, before the blast radius is checked.
    """

    name: str
    summary: str
    kinds: frozenset[str]
    settings: type[FaultSettings]
    inject: Callable[[Order, Injection], Awaitable[None]]
    recover: Callable[[Order, Injection], Awaitable[None]]
    widen: Callable[[Inventory, Target, str], Target] | None = None
