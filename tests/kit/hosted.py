"""What a Ray fleet hosts in tests: the three plain classes with the real ones' methods and no torch, no links, no gRPC."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from actors.node_agent import kill_process
from cluster.controller_actor import ControllerSettings
from cluster.core.actor_config import ExpertActorConfig, RouterConfig
from cluster.core.descriptors import Manifest
from cluster.core.errors import ConfigError, NotReady
from cluster.core.ids import CopyId
from cluster.core.status import ActorReport, ActorState, CommandReply, RouterObservation, SlotReport, SlotState
from cluster.fleet import Fleet

UNSTARTABLE = "unstartable"


class HostedActor:
    """Slots without weights. Loading takes one report."""

    def __init__(self, config: ExpertActorConfig, link_key: bytes) -> None:
        assert len(link_key) == 32
        self._config, self._node_id, self._max_epoch = config, "", 0
        self._slots: dict[CopyId, SlotState] = {}
        self._is_hung = False

    async def start(self, node_id: str, node_address: str = "") -> ActorReport:
        if self._config.actor_id.startswith(UNSTARTABLE):
            message = "device: there is no such device"
            raise ConfigError(message)
        assert node_address
        self._node_id = node_id
        return self._report()

    async def report(self) -> ActorReport:
        if not self._node_id:
            message = "not started"
            raise NotReady(message)
        if self._is_hung:
            await asyncio.Event().wait()
        report = self._report()
        self._slots = {copy: SlotState.READY if state is SlotState.LOADING else state for copy, state in self._slots.items()}
        return report

    async def assume(self, copies: Sequence[CopyId], epoch: int) -> CommandReply:
        new = [copy for copy in copies if copy not in self._slots]
        free = self._config.num_slots - len(self._slots)
        if len(new) > free:
            return CommandReply(ok=False, error="SLOTS_EXHAUSTED", message=f"{free} of {self._config.num_slots} slots are free; {len(new)} were asked for")
        return self._fenced(epoch) or self._set(copies, SlotState.LOADING)

    async def drain(self, copies: Sequence[CopyId], epoch: int) -> CommandReply:
        return self._fenced(epoch) or self._set(copies, SlotState.DRAINING)

    async def release(self, copies: Sequence[CopyId], epoch: int) -> CommandReply:
        return self._fenced(epoch) or self._set(copies, None)

    async def stop(self, timeout_s: float) -> None:
        if self._is_hung:
            await asyncio.sleep(timeout_s * 10)

    async def hang(self) -> None:
        """From now on nothing is answered."""
        self._is_hung = True

    def _fenced(self, epoch: int) -> CommandReply | None:
        if epoch < self._max_epoch:
            return CommandReply(ok=False, error="STALE_TABLE", message=f"epoch {epoch} is older than {self._max_epoch}")
        self._max_epoch = epoch
        return None

    def _set(self, copies: Sequence[CopyId], state: SlotState | None) -> CommandReply:
        for copy in copies:
            if state is None:
                self._slots.pop(copy, None)
            elif state is not SlotState.LOADING or copy not in self._slots:
                self._slots[copy] = state
        return CommandReply(ok=True)

    def _report(self) -> ActorReport:
        return ActorReport(
            incarnation=self._config.incarnation,
            pid=os.getpid(),
            process_start_s=psutil.Process().create_time(),
            node_id=self._node_id,
            host="127.0.0.1",
            port=1,
            device="cpu",
            num_slots=self._config.num_slots,
            capacity_bytes=0,
            used_bytes=0,
            slots=tuple(SlotReport(copy, state, 1) for copy, state in self._slots.items()),
            max_epoch=self._max_epoch,
            code_digest=self._config.code_digest,
            config_digest=self._config.config_digest,
        )


class HostedAgent:
    """Imports by reading one file: `manifest.json` of the source folder."""

    def __init__(self, store_dir: Path, max_bytes: int | None) -> None:
        self._store_dir, self._max_bytes = store_dir, max_bytes

    async def import_model(self, *, name: str, source: str, dtype: str, expected: str | None = None, shadow: str | None = None) -> CommandReply:
        assert shadow is None
        try:
            return CommandReply(ok=True, value=self._read(name, Path(source), expected).model_dump_json())
        except OSError as error:
            return CommandReply(ok=False, error="CHECKPOINT_ERROR", message=f"{source}: {error.strerror} (as {dtype})")

    async def import_experts(
        self,
        *,
        manifest: str,
        source: str,
        experts: Sequence[tuple[int, int]],
        shadows: Sequence[tuple[int, int]] = (),
        distrusted: Sequence[str] = (),
    ) -> CommandReply:
        assert not shadows
        assert not distrusted
        known = Manifest.model_validate_json(manifest)
        try:
            held = self._read(known.model.name, Path(source), None)
        except OSError as error:
            return CommandReply(ok=False, error="CHECKPOINT_ERROR", message=f"{source}: {error.strerror}")
        fits = all(held.experts[f"{layer}/{index}"] == known.experts[f"{layer}/{index}"] for layer, index in experts)
        return CommandReply(ok=fits, error="" if fits else "CHECKPOINT_ERROR", message="" if fits else "digests differ")

    async def progress(self) -> dict[str, tuple[int, int]]:
        return {}

    async def kill(self, pid: int, process_start_s: float) -> bool:
        return kill_process(pid, process_start_s)

    async def gpu_faults(self) -> str:
        return "[]"

    async def gpus(self) -> str:
        return "[]"

    def _read(self, name: str, source: Path, expected: str | None) -> Manifest:
        manifest = Manifest.model_validate_json((source / "manifest.json").read_text())
        assert manifest.model.name == name
        assert expected is None or Manifest.model_validate_json(expected) == manifest
        return manifest


class HostedRouter:
    """Is there, and says so."""

    def __init__(self, config: RouterConfig, secrets: Any) -> None:
        assert secrets == "secrets"
        self._config, self._node_id = config, ""

    async def start(self, node_id: str) -> RouterObservation:
        self._node_id = node_id
        return await self.report()

    async def report(self) -> RouterObservation:
        state = ActorState.READY if self._node_id else ActorState.STARTING
        start_s = psutil.Process().create_time()
        return RouterObservation(self._config.router_id, state, self._node_id, "127.0.0.1", 50051, pid=os.getpid(), process_start_s=start_s)

    async def stop(self, timeout_s: float) -> None:
        assert timeout_s > 0


def make_fleet(settings: ControllerSettings) -> Fleet:
    """The factory for a controller hosted by Ray."""
    from cluster.ray_fleet import HostedClasses, RayFleet

    return RayFleet(
        namespace=settings.deployment,
        classes=HostedClasses(HostedActor, HostedAgent, HostedRouter),
        link_secret=settings.link_secret,
        router_secrets="secrets",
        store_dir=settings.store_dir,
        observe_timeout_s=settings.observe_timeout_s,
    )
