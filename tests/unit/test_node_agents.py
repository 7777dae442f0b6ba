"""Imports by the nodes' agents: a slow one that answers goes on, a silent one ends with the node's name and is made anew; kills need both numbers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from dataclasses import asdict
from typing import Any

import pytest

from cluster import node_agents
from cluster.core.errors import FleetError
from cluster.core.status import ActorState, CommandReply, GpuFault, GpuReading, NodeGpus, RouterObservation
from cluster.node_agents import NodeAgents, Result
from kit.waiting import until

READING = GpuReading(0, "cuda-1", "GPU-1", "H100", 100)
FAULT = GpuFault(1e9, "cuda-1", 79, is_device=True)
DONE = CommandReply(ok=True, value="done")


class Remote:
    """`method.remote(...)` of a handle."""

    def __init__(self, method: Any) -> None:
        self.remote = method


class Agent:
    """An agent whose import ends when told, and which may fall silent."""

    def __init__(self) -> None:
        self.is_silent = False
        self.num_questions = 0
        self.imported = asyncio.Event()
        self.killed: list[tuple[int, float]] = []
        self.progress, self.import_model, self.kill = Remote(self._progress), Remote(self._import), Remote(self._kill)
        self.gpus, self.gpu_faults = Remote(self._gpus), Remote(self._gpu_faults)

    async def _progress(self) -> dict[str, tuple[int, int]]:
        self.num_questions += 1
        if self.is_silent:
            await asyncio.Event().wait()
        return {"m": (self.num_questions, 100)}

    async def _import(self) -> CommandReply:
        await self.imported.wait()
        return DONE

    async def _gpus(self) -> str:
        if self.is_silent:
            await asyncio.Event().wait()
        return json.dumps([asdict(READING)])

    async def _gpu_faults(self) -> str:
        return json.dumps([asdict(FAULT)])

    async def _kill(self, pid: int, start_s: float) -> bool:
        self.killed.append((pid, start_s))
        return True


class Host:
    """Makes agents and notes those that were ended."""

    def __init__(self) -> None:
        self.made: list[Agent] = []
        self.ended: list[Agent] = []

    async def create_agent(self, node_id: str) -> Agent:
        assert node_id
        self.made.append(Agent())
        return self.made[-1]

    async def end_agent(self, agent: Agent) -> None:
        self.ended.append(agent)

    async def answer(self, call: Awaitable[Result]) -> Result:
        return await call


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def agents(host: Host) -> NodeAgents:
    return NodeAgents(host, pause_s=0.001, timeout_s=0.01, max_missed=3)


def begin(agents: NodeAgents) -> asyncio.Task[CommandReply]:
    return asyncio.create_task(agents.run_import("node-7", lambda agent: agent.import_model.remote()))


async def test_slow_import_goes_on_while_its_agent_answers(host: Host, agents: NodeAgents) -> None:
    importing = begin(agents)
    await until(lambda: bool(host.made) and host.made[0].num_questions > 20)
    assert not importing.done()
    host.made[0].imported.set()
    assert await importing == DONE
    assert host.ended == []


async def test_import_of_a_silent_agent_fails_with_the_nodes_name_and_the_next_gets_a_new_one(host: Host, agents: NodeAgents) -> None:
    importing = begin(agents)
    await until(lambda: bool(host.made) and host.made[0].num_questions > 2)
    host.made[0].is_silent = True
    with pytest.raises(FleetError, match="node-7: its agent missed 3 questions"):
        await importing
    assert host.ended == host.made
    importing = begin(agents)
    await until(lambda: len(host.made) == 2)
    host.made[1].imported.set()
    assert await importing == DONE


async def test_agent_that_misses_a_question_now_and_then_is_kept(host: Host, agents: NodeAgents) -> None:
    importing = begin(agents)
    for turn in range(6):
        await until(lambda: bool(host.made) and host.made[0].num_questions > 0)
        agent, asked = host.made[0], host.made[0].num_questions
        agent.is_silent = turn % 2 == 0
        await until(lambda agent=agent, asked=asked: agent.num_questions > asked)  # type: ignore[misc]
        agent.is_silent = False
        await until(lambda agent=agent, asked=asked: agent.num_questions > asked + 2)  # type: ignore[misc]
    host.made[0].imported.set()
    assert await importing == DONE


async def test_progress_of_silent_agents_is_left_out(host: Host, agents: NodeAgents) -> None:
    importing = begin(agents)
    await until(lambda: bool(host.made) and host.made[0].num_questions > 0)
    assert list(await agents.progress()) == ["node-7/m"]
    host.made[0].imported.set()
    await importing


async def test_processes_are_killed_only_by_pid_and_start_time(host: Host, agents: NodeAgents) -> None:
    known = RouterObservation("router-0", ActorState.READY, "node-7", pid=4711, process_start_s=1.5)
    unknown = RouterObservation("router-0", ActorState.READY, "node-7", pid=4711)
    await agents.kill("node-7", unknown)
    assert host.made == []
    await agents.kill("node-7", known)
    assert host.made[0].killed == [(4711, 1.5)]


async def test_gpus_and_their_errors_are_what_the_living_nodes_agents_told_last(host: Host, agents: NodeAgents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_agents, "GPUS_PAUSE_S", 0.0)
    importing = begin(agents)
    await until(lambda: bool(host.made))
    assert agents.gpus({"node-7"}) == {}  # asked beside the caller
    await until(lambda: agents.gpus({"node-7"}) == {"node-7": NodeGpus((READING,), (FAULT,))})
    host.made[0].is_silent = True
    await until(lambda: any(not task.done() for task in agents._asking))
    assert agents.gpus({"node-7"}) == {"node-7": NodeGpus((READING,), (FAULT,))}
    assert agents.gpus({"node-8"}) == {}
    importing.cancel()
