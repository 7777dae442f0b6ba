"""The expert actor: a plain async class that a fleet hosts. Its process starts empty, assumes experts into its slots and serves them over expert links.

torch is imported by `start`, off the event loop: the import takes seconds, and a report should not wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from actors.expert_store import ExpertStore
from actors.link_server import LinkServer
from actors.quiet_import import import_quietly
from actors.sentinel import Sentinel
from actors.tether import hold
from cluster.core.actor_config import ExpertActorConfig
from cluster.core.errors import CheckpointError, MoeError, NotReady
from cluster.core.ids import CopyId, ExpertId, Role
from cluster.core.link_frames import Cool, Warm, fault_token_of
from cluster.core.link_limits import LinkLimits
from cluster.core.status import ActorReport, CommandReply
from cluster.scheduling import SHORT_SLICE_NS, ask_for_slices, come_forward, go_before_others
from cluster.telemetry.tracing import Tracing

if TYPE_CHECKING:
    from actors.core.slots import SizedCopy
    from actors.expert_runtime import ExpertRuntime
    from actors.fault_port import FaultPort

START_TIMEOUT_S = 60.0
STOP_RESERVE_S = 0.5


@dataclass(slots=True)
class _Running:
    runtime: ExpertRuntime
    links: LinkServer
    tracing: Tracing
    node_id: str
    host: str
    port: int
    faults: FaultPort | None = None
    sentinel: Sentinel | None = None


class ExpertActor:
    """One incarnation. Commands answer with a CommandReply: accepted means begun, and the report says how it went."""

    def __init__(self, config: ExpertActorConfig, link_key: bytes) -> None:
        self._config = config
        self._link_key = link_key
        self._store = ExpertStore(config.store_dir)
        self._starting = asyncio.Lock()
        self._running: _Running | None = None
        self._is_stopped = False

    async def start(self, node_id: str, node_address: str = "") -> ActorReport:
        """Import torch, test the device, listen for links on `link_host`, else on the node's address. Starting again only reports.

        Raises ConfigError for a device that is not there, NotReady after a stop; a device that fails its test ends the process.
        """
        async with self._starting:
            if self._is_stopped:
                message = f"{self._config.incarnation} was stopped; start a new generation"
                raise NotReady(message)
            if self._running is None:
                self._running = await self._start(node_id, self._config.link_host or node_address or own_address())
                if self._config.short_slices:  # last: threads that were started before, as the computing one, have none
                    ask_for_slices(SHORT_SLICE_NS)
                if self._config.answering_niceness is not None:
                    go_before_others(self._config.answering_niceness)
        return self._report(self._running)

    async def _start(self, node_id: str, host: str) -> _Running:
        config = self._config
        tracing = Tracing.disabled()
        if config.telemetry.actor_spans:
            tracing = Tracing(service="expert", instance=str(config.incarnation), config=config.telemetry, node_id=node_id)
        limits = LinkLimits(
            max_frame_bytes=config.max_frame_bytes,
            max_tokens_per_frame=config.max_tokens_per_frame,
            frames_in_flight=config.frames_in_flight,
        )
        runtime, faults = await asyncio.to_thread(self._open_runtime, tracing, node_id, limits.max_links)
        sentinel = await asyncio.to_thread(Sentinel.start) if config.sentinel else None
        links = LinkServer(
            config.incarnation,
            self._link_key,
            limits,
            runtime.submit if faults is None else faults.hinder_submit(runtime.submit),
            runtime.progress,
            cancel=runtime.cancel,
            hint=lambda hint: (runtime.warm if isinstance(hint, Warm) else runtime.cool)(hinted_copy(hint)),
            fault=None if faults is None else faults.answer,
            guard=None if sentinel is None else sentinel.guard,
            hold=hold if config.sentinel else None,
        )
        try:
            listening_host, port = await links.start(host)
        except BaseException:
            await asyncio.to_thread(runtime.stop, STOP_RESERVE_S)
            if sentinel is not None:
                await asyncio.to_thread(sentinel.stop)
            raise
        return _Running(runtime, links, tracing, node_id, listening_host, port, faults, sentinel)

    def _open_runtime(self, tracing: Tracing, node_id: str, max_links: int) -> tuple[ExpertRuntime, FaultPort | None]:
        import_quietly("torch", "actors.expert_runtime")
        if self._config.niceness is not None:  # before there are threads that shall give way
            come_forward(self._config.niceness)
        import torch

        from actors.device import choose_device
        from actors.expert_runtime import ExpertRuntime

        torch.set_num_threads(1)
        device = choose_device(self._config.device)
        faults = self._open_faults() if self._config.chaos_allowed else None
        hinder = None if faults is None else faults.hinder
        runtime = ExpertRuntime(self._config, self._store, device, max_links=max_links, tracing=tracing, node_id=node_id, hinder=hinder)
        if faults is not None:
            faults.attach(runtime)
        runtime.start(START_TIMEOUT_S)
        return runtime, faults

    def _open_faults(self) -> FaultPort:
        from actors.fault_port import FaultPort

        incarnation = self._config.incarnation
        return FaultPort(incarnation, fault_token_of(self._link_key, incarnation))

    async def assume(self, copies: Sequence[CopyId], epoch: int) -> CommandReply:
        """Begin to load copies into free slots: all of them, or none with SLOTS_EXHAUSTED and both numbers. What is held already stays as it is."""
        try:
            sized = await asyncio.to_thread(self._sized, copies)
        except MoeError as error:
            return _refused(error)
        return self._command(lambda runtime: runtime.assume(sized, epoch))

    async def drain(self, copies: Sequence[CopyId], epoch: int) -> CommandReply:
        """Take no new segments for these copies; finish what is under way."""
        return self._command(lambda runtime: runtime.drain(copies, epoch))

    async def release(self, copies: Sequence[CopyId], epoch: int) -> CommandReply:
        """Free the slots of copies once nothing of theirs is under way."""
        return self._command(lambda runtime: runtime.release(copies, epoch))

    async def report(self) -> ActorReport:
        """What this incarnation is, holds and has done. Raises NotReady before `start`."""
        if self._running is None:
            message = f"{self._config.incarnation} has not started; call start first"
            raise NotReady(message)
        return self._report(self._running)

    async def stop(self, timeout_s: float) -> None:
        """Say goodbye to the links, refuse what is new, finish the frames under way, end the threads; all within the limit. Stopping again does nothing."""
        async with self._starting:
            running, self._running, self._is_stopped = self._running, None, True
        if running is None:
            return
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        if running.faults is not None:
            await asyncio.to_thread(running.faults.heal)
        await running.links.stop("the actor is stopping", max(0.0, timeout_s - STOP_RESERVE_S))
        if running.sentinel is not None:
            await asyncio.to_thread(running.sentinel.stop)
        await asyncio.to_thread(running.runtime.stop, max(STOP_RESERVE_S / 2, deadline_s - loop.time() - STOP_RESERVE_S / 2))
        with contextlib.suppress(TimeoutError):  # an exporter that hangs goes down with the process
            flush_s = STOP_RESERVE_S / 2
            await asyncio.wait_for(asyncio.to_thread(running.tracing.shutdown, flush_s), flush_s)

    def _sized(self, copies: Sequence[CopyId]) -> list[SizedCopy]:
        from actors.core.slots import SizedCopy

        # What packing adds is known for certain only when it is done; until then it counts in full.
        factor = {copy: 2 if self._config.layout == "packed" and copy.role is Role.REPLICA else 1 for copy in copies}
        return [SizedCopy(copy, factor[copy] * self._store.num_bytes(copy.version), self._expanded_bytes(copy)) for copy in copies]

    def _expanded_bytes(self, copy: CopyId) -> int:
        if copy.role is not Role.SHADOW:
            return 0
        try:
            return self._store.expert_bytes(copy.version)
        except CheckpointError:  # its load will fail, and say why
            return 0

    def _command(self, command: Callable[[ExpertRuntime], None]) -> CommandReply:
        if self._running is None:
            return CommandReply(ok=False, error="NOT_READY", message=f"{self._config.incarnation} does not run; start it first")
        try:
            command(self._running.runtime)
        except MoeError as error:
            return _refused(error)
        return CommandReply(ok=True)

    def _report(self, running: _Running) -> ActorReport:
        runtime = running.runtime
        progress = runtime.progress()
        return ActorReport(
            incarnation=self._config.incarnation,
            pid=os.getpid(),
            process_start_s=psutil.Process().create_time(),
            node_id=running.node_id,
            host=running.host,
            port=running.port,
            device=runtime.device_label,
            num_slots=self._config.num_slots,
            capacity_bytes=runtime.capacity_bytes,
            used_bytes=runtime.used_bytes,
            slots=runtime.slots(),
            max_epoch=runtime.max_epoch,
            code_digest=self._config.code_digest,
            config_digest=self._config.config_digest,
            frames_done=progress.frames_done,
            oldest_age_s=progress.oldest_age_s,
            expanded_bytes=runtime.expanded_bytes,
            expanded_max_bytes=runtime.expanded_max_bytes,
            num_unexpanded=runtime.num_unexpanded,
        )


def own_address() -> str:
    """The address of the interface towards other machines, or loopback when there is none. Connecting a datagram socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def hinted_copy(hint: Warm | Cool) -> CopyId:
    """The shadow that a hint is about."""
    return CopyId(ExpertId(hint.model, hint.layer, hint.index), hint.version.hex(), Role.SHADOW)


def _refused(error: MoeError) -> CommandReply:
    return CommandReply(ok=False, error=error.reason, message=str(error))
