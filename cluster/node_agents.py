"""The nodes' agents as the fleet holds them: imports that end when their agent falls silent, progress, and the end of processes that hang.

Knows nothing of Ray: how an agent is made, ended and called safely is handed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Protocol, TypeVar

from cluster.core.errors import FleetError
from cluster.core.status import ActorReport, CommandReply, GpuFault, GpuReading, NodeGpus, RouterObservation

Result = TypeVar("Result")

PROBE_PAUSE_S = 1.0
PROBE_TIMEOUT_S = 5.0
MAX_MISSED = 10
PROGRESS_TIMEOUT_S = 0.1
GPUS_PAUSE_S = 2.0
KILL_TIMEOUT_S = 10.0  # also of an agent that has to be started for it


class Host(Protocol):
    """What makes, ends and calls agents. All of it raises FleetError."""

    async def create_agent(self, node_id: str) -> Any:  # noqa: ANN401 - Ray ships no types for handles
        """A handle of the node's agent, which may run already."""
        ...

    async def end_agent(self, agent: Any) -> None:  # noqa: ANN401 - as above
        """End its process; nothing starts it again but `create_agent`."""
        ...

    async def answer(self, call: Awaitable[Result]) -> Result:
        """The result of a call to an agent."""
        ...


class NodeAgents:
    """One agent for each node, made when first needed."""

    def __init__(self, host: Host, *, pause_s: float = PROBE_PAUSE_S, timeout_s: float = PROBE_TIMEOUT_S, max_missed: int = MAX_MISSED) -> None:
        """While it imports, an agent is asked for its progress every `pause_s`; it is given up after `max_missed` missed answers in a row."""
        self._host = host
        self._pause_s, self._timeout_s, self._max_missed = pause_s, timeout_s, max_missed
        self._agents: dict[str, Any] = {}
        self._gpus: dict[str, NodeGpus] = {}
        self._asking: list[asyncio.Future[None]] = []
        self._gpus_asked_s = 0.0
        self._creating = asyncio.Lock()

    async def run_import(self, node_id: str, send: Callable[[Any], Awaitable[CommandReply]]) -> CommandReply:
        """An import's reply. Raises FleetError, with the node's name, when its agent is lost or silent; the next import then gets a new agent."""
        agent = await self._agent(node_id)
        call = asyncio.ensure_future(self._host.answer(send(agent)))
        try:
            return await self._while_answering(node_id, agent, call)
        except FleetError:
            self._agents.pop(node_id, None)
            raise
        finally:
            call.cancel()

    async def progress(self) -> dict[str, tuple[int, int]]:
        """For each import under way, `NODE/MODEL`: blobs done and wanted. An agent that does not answer within a moment is left out."""

        async def ask(node_id: str, agent: Any) -> dict[str, tuple[int, int]]:  # noqa: ANN401 - Ray ships no types for handles
            answer = await self._ask_progress(agent, PROGRESS_TIMEOUT_S) or {}
            return {f"{node_id}/{model}": (done, wanted) for model, (done, wanted) in answer.items()}

        answers = await asyncio.gather(*(ask(node_id, agent) for node_id, agent in self._agents.items()))
        return {place: counts for answer in answers for place, counts in answer.items()}

    def gpus(self, alive: Collection[str]) -> dict[str, NodeGpus]:
        """By node, what its driver told of its GPUs, as far as is known; asks for news beside the caller. Agents of other nodes are forgotten."""
        self._agents = {node_id: agent for node_id, agent in self._agents.items() if node_id in alive}
        self._gpus = {node_id: gpus for node_id, gpus in self._gpus.items() if node_id in alive}
        now_s = asyncio.get_running_loop().time()
        if now_s - self._gpus_asked_s >= GPUS_PAUSE_S and all(task.done() for task in self._asking):
            self._gpus_asked_s = now_s
            self._asking = [asyncio.ensure_future(self._ask_gpus(node_id, agent)) for node_id, agent in self._agents.items()]
        return dict(self._gpus)

    async def kill(self, node_id: str, report: ActorReport | RouterObservation) -> None:
        """SIGKILL the process that sent this report, by (pid, start time); nothing where these are not known."""
        if not node_id or report.pid <= 0 or report.process_start_s <= 0:
            return
        with contextlib.suppress(TimeoutError, FleetError):
            async with asyncio.timeout(KILL_TIMEOUT_S):
                agent = await self._agent(node_id)
                await self._host.answer(agent.kill.remote(report.pid, report.process_start_s))

    def forget(self) -> None:
        """They are ended by other means."""
        self._agents.clear()
        for task in self._asking:
            task.cancel()

    async def _agent(self, node_id: str) -> Any:  # noqa: ANN401 - Ray ships no types for handles
        async with self._creating:
            if node_id not in self._agents:
                self._agents[node_id] = await self._host.create_agent(node_id)
        return self._agents[node_id]

    async def _while_answering(self, node_id: str, agent: Any, call: asyncio.Future[CommandReply]) -> CommandReply:  # noqa: ANN401 - as above
        num_missed = 0
        while num_missed < self._max_missed:
            done, _ = await asyncio.wait({call}, timeout=self._pause_s)
            if done:
                return call.result()
            num_missed = num_missed + 1 if await self._ask_progress(agent, self._timeout_s) is None else 0
        if call.done():
            return call.result()
        with contextlib.suppress(FleetError):
            await self._host.end_agent(agent)
        message = f"node {node_id}: its agent missed {num_missed} questions for the progress of an import in a row and was ended; look at that node"
        raise FleetError(message)

    async def _ask_progress(self, agent: Any, limit_s: float) -> dict[str, tuple[int, int]] | None:  # noqa: ANN401 - as above
        """None when it did not answer."""
        try:
            async with asyncio.timeout(limit_s):
                answer: dict[str, tuple[int, int]] = await self._host.answer(agent.progress.remote())
        except (TimeoutError, FleetError):
            return None
        return answer

    async def _ask_gpus(self, node_id: str, agent: Any) -> None:  # noqa: ANN401 - as above
        with contextlib.suppress(TimeoutError, FleetError):
            async with asyncio.timeout(self._timeout_s):
                faults: str = await self._host.answer(agent.gpu_faults.remote())
                readings: str = await self._host.answer(agent.gpus.remote())
                self._gpus[node_id] = NodeGpus(
                    tuple(GpuReading(**entry) for entry in json.loads(readings)), tuple(GpuFault(**entry) for entry in json.loads(faults))
                )
