"""Reconciling as a pure function, and as a story: golden transcripts of deploying, losing, replacing and removing."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.core.ids import ExpertId
from cluster.core.load import Load, with_window
from cluster.core.memory import BACKOFF_MAX_S, Memory, with_failure, with_success
from cluster.core.reconcile import Told, reconcile
from cluster.core.spec import ActorsSpec
from kit.control import LAUNCH, ControlRig, make_spec
from kit.transcript import replay

TRANSCRIPTS = Path(__file__).parent / "transcripts"
MAX_LINES = 60


class Story:
    """Runs the lines of a transcript: `deploy`, `steps N`, `kill actor-1`, `kill node-2`, `hang actor-1`, `crash`, `code NAME`, `apply ...`."""

    def __init__(self, folder: Path) -> None:
        self.rig = ControlRig(folder, make_spec("m", "other"))
        self.seen = 0
        self.epoch = 0

    async def run(self, line: str) -> list[str]:
        verb, *words = line.split()
        match verb:
            case "apply":
                names = [word for word in words if word != "--replace"]
                self.rig.spec = make_spec(*names)
                revision, differences = await self.rig.controller.apply(self.rig.spec, replace_differing="--replace" in words)
                answer = [f"revision {revision}", *(f"differs: {text}" for text in differences)]
            case "steps":
                answer = []
                for _ in range(int(words[0])):
                    await self.rig.step()
            case "kill" if words[0].startswith("node"):
                self.rig.fleet.kill_node(words[0])
                return []
            case "kill":
                self.rig.fleet.kill_actor(self.rig.incarnation(words[0]))
                return []
            case "hang":
                self.rig.fleet.actors[self.rig.incarnation(words[0])].hung = True
                return []
            case "crash":
                await self.rig.crash()
                answer = [f"controller generation {self.rig.controller.generation}"]
            case "code":
                self.rig.launch = replace(LAUNCH, code_digest=words[0])
                return []
            case _:
                message = f"unknown line: {line}"
                raise ValueError(message)
        return [*answer, *self.news()]

    def news(self) -> list[str]:
        """Decisions since the last line, and where things stand."""
        decisions = [entry for entry in self.rig.controller.store.decisions(10_000) if entry.sequence > self.seen]
        if decisions:
            self.seen = decisions[-1].sequence
        told = [f"{entry.action} {entry.target} @{entry.epoch}: {entry.reason}" for entry in decisions if not entry.action.startswith("import_experts")]
        table = self.rig.controller.table
        num_copies = 0 if table is None else sum(len(copies) for copies in table.copies.values())
        epoch = 0 if table is None else table.epoch
        return [*told, f"= {self.rig.state or 'nothing'} epoch {epoch}, {num_copies} copies. {self.rig.message}".rstrip()]


@pytest.mark.parametrize("name", ["control_deploy_and_loss", "control_replace_and_remove"])
def test_story_is_told_as_recorded(name: str, tmp_path: Path) -> None:
    story = Story(tmp_path)
    with asyncio.Runner() as runner:
        recorded, replayed = replay(TRANSCRIPTS / f"{name}.txt", lambda line: runner.run(story.run(line)))
    assert replayed == recorded


async def test_same_facts_give_the_same_decision_and_are_left_as_they_were(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path)
    await rig.controller.apply(rig.spec)
    for number in range(60):
        if number == 40:
            rig.fleet.kill_node("node-1")
        status, memory = await rig.fleet.observe(), rig.controller.snapshot().memory
        before = copy.deepcopy(memory)
        first = reconcile(rig.spec, LAUNCH, memory, status, Told())
        second = reconcile(rig.spec, LAUNCH, memory, status, Told())
        assert first == second
        assert memory == before
        await rig.step()


async def test_settled_goal_decides_nothing(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path)
    await rig.deploy()
    for _ in range(40):
        decision = rig.controller.snapshot().decision
        await rig.step()
        assert decision is not None
    decision = rig.controller.snapshot().decision
    assert decision is not None
    assert decision.actions == ()


async def test_busiest_lost_expert_is_repaired_first_when_slots_are_few(tmp_path: Path) -> None:
    rig = ControlRig(tmp_path, make_spec(actors=ActorsSpec(count=2, free_slots=1)), nodes=1)
    await rig.deploy()
    hot = ExpertId("m", 1, 3)
    rig.controller.report_health("router-0", 0, (), {hot: 1000, ExpertId("m", 0, 1): 10}, 1.0)
    rig.fleet.start_s = 60.0
    rig.fleet.kill_actor(rig.incarnation("actor-1"))
    await rig.step()
    await rig.until(lambda: bool(rig.controller.table and rig.controller.table.copies_of(hot)))
    assert rig.controller.table is not None
    lost = [ExpertId("m", layer, index) for layer in range(2) for index in (1, 3)]
    assert [expert for expert in lost if rig.controller.table.copies_of(expert)] == [hot]


def test_load_fades_and_forgets_and_settles_at_the_true_rate() -> None:
    expert, load = ExpertId("m", 0, 0), Load()
    for second in range(120):
        load = with_window(load, {expert: 50}, 1.0, float(second))
    assert load.of(expert) == pytest.approx(50.0, rel=0.01)
    load = with_window(load, {}, 1.0, 1000.0)
    assert load.of(expert) == 0.0
    assert with_window(load, {expert: 5}, 0.0, 1001.0) is load


def test_failures_in_a_row_wait_longer_up_to_a_limit_and_success_forgets_them() -> None:
    memory, now_s, waits = Memory(), 0.0, []
    for _ in range(12):
        memory = with_failure(memory, "start a", "no", now_s)
        waits.append(memory.backoff["start a"].until_s - now_s)
        now_s = memory.backoff["start a"].until_s
        assert memory.may_try("start a", now_s)
        assert not memory.may_try("start a", now_s - 0.01)
    assert waits == sorted(waits)
    assert waits[-1] == BACKOFF_MAX_S
    assert with_success(memory, "start a").backoff == {}
