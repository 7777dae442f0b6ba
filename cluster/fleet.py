"""The fleet port: all the controller may ask of the machines. `ray_fleet` speaks it to Ray, `tests/kit` to nothing; one contract suite holds both.

Commands are idempotent and carry an epoch; an actor refuses a command older than the newest it has seen (StaleTable). A command that is
accepted has begun, not ended: its end is seen by `observe`. Failures raise FleetError, which reconciling again may cure.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, Protocol

from cluster.core.actor_config import ExpertActorConfig, RouterConfig
from cluster.core.descriptors import DType, Manifest
from cluster.core.ids import CopyId, Incarnation
from cluster.core.spec import ShadowSpec
from cluster.core.status import FleetObservation


class Fleet(Protocol):
    """The machines, as the controller commands them."""

    async def observe(self, *, out: Collection[Incarnation] = ()) -> FleetObservation:
        """Look at everything once, within `control.observe_timeout_s`; what does not answer in time is unreachable.

        `out`: lives that are known not to answer; nothing waits for them.
        """
        ...

    async def import_model(
        self,
        node_id: str,
        *,
        name: str,
        source: Path,
        dtype: DType | Literal["checkpoint"],
        expected: Manifest | None,
        shadow: ShadowSpec | None = None,
    ) -> Manifest:
        """Read a checkpoint on a node into its store and say what it holds; with `shadow`, make shadows of its experts and list them.

        Raises CheckpointError, by name, when it must not be served.
        """
        ...

    async def import_experts(
        self,
        node_id: str,
        *,
        manifest: Manifest,
        source: Path,
        experts: Collection[tuple[int, int]],
        shadows: Collection[tuple[int, int]] = (),
        distrusted: Collection[str] = (),
    ) -> None:
        """Make sure that these experts ((layer, index)), these experts' shadows and all gates of a model lie verified in a node's store.

        All have the digests of the manifest; the `distrusted` among them are digested again, also if they were before.
        """
        ...

    async def import_progress(self) -> dict[str, tuple[int, int]]:
        """For each import under way, `NODE/MODEL`: blobs done and blobs wanted."""
        ...

    async def start_actor(self, config: ExpertActorConfig, *, node_id: str, num_gpus: float, num_cpus: float) -> None:
        """Start one incarnation on a node. Starting one that already runs does nothing."""
        ...

    async def stop_actor(self, incarnation: Incarnation, *, timeout_s: float) -> None:
        """Stop one incarnation: in order within the limit, then by force; 0: by force at once. Stopping one that is gone does nothing."""
        ...

    async def assume(self, incarnation: Incarnation, copies: Sequence[CopyId], *, epoch: int) -> None:
        """Load copies into free slots. Raises SlotsExhausted with both numbers when they do not fit."""
        ...

    async def drain(self, incarnation: Incarnation, copies: Sequence[CopyId], *, epoch: int) -> None:
        """Take no new segments for these copies; finish what is under way."""
        ...

    async def release(self, incarnation: Incarnation, copies: Sequence[CopyId], *, epoch: int) -> None:
        """Free the slots of drained copies."""
        ...

    async def start_router(self, config: RouterConfig, *, node_id: str) -> None:
        """Start a router. Starting one that already runs does nothing."""
        ...

    async def stop_router(self, router_id: str, *, timeout_s: float) -> None:
        """Set NOT_SERVING, finish what is in flight within the limit, stop."""
        ...

    async def stop_agents(self, *, timeout_s: float) -> None:
        """Stop what runs on every node for the fleet's own sake; the stores stay on disk."""
        ...

    async def close(self) -> None:
        """Let go of everything this port holds; what was started keeps running."""
        ...
