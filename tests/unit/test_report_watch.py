"""Looking at processes: one question at a time, a recent report stands in for a slow one, silence ends in silence."""

from __future__ import annotations

import asyncio

import pytest

from cluster.report_watch import PATIENCE_S, ReportWatch


class Process:
    """Answers when told to."""

    def __init__(self) -> None:
        self.answers = asyncio.Event()
        self.answers.set()
        self.num_asked = 0

    async def report(self) -> int:
        self.num_asked += 1
        number = self.num_asked
        await self.answers.wait()
        return number


@pytest.fixture
def process() -> Process:
    return Process()


async def test_answer_in_time_is_the_report(process: Process) -> None:
    watch = ReportWatch(process.report)
    assert [(await watch.look(1.0)).report for _ in range(3)] == [1, 2, 3]


async def test_recent_report_stands_in_for_a_slow_one_and_nothing_is_asked_twice(process: Process) -> None:
    watch = ReportWatch(process.report)
    await watch.look(1.0)
    process.answers.clear()
    looks = [await watch.look(10.0) for _ in range(2)]
    assert [look.report for look in looks] == [1, 1]
    assert process.num_asked == 2
    process.answers.set()
    assert (await watch.look(10.0)).report == 2
    watch.close()


async def test_report_older_than_a_command_is_marked_and_nobody_waits_for_a_newer_one(process: Process) -> None:
    watch = ReportWatch(process.report)
    await watch.look(1.0)
    watch.note_command()
    process.answers.clear()
    look = await asyncio.wait_for(watch.look(3600.0), 60.0)
    assert (look.report, look.is_outdated) == (1, True)
    assert look.silent_s > 0
    process.answers.set()
    look = await watch.look(3600.0)
    assert (look.report, look.is_outdated, look.silent_s) == (2, False, 0.0)
    watch.close()


async def test_answer_to_a_question_from_before_a_command_is_marked_too(process: Process) -> None:
    watch = ReportWatch(process.report)
    await watch.look(1.0)
    process.answers.clear()
    await watch.look(3600.0)
    watch.note_command()
    process.answers.set()
    assert (await watch.look(3600.0)).is_outdated
    assert not (await watch.look(3600.0)).is_outdated


async def test_silent_process_is_waited_for_once_and_not_in_every_look(process: Process) -> None:
    watch = ReportWatch(process.report)
    await watch.look(1.0)
    process.answers.clear()
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    await watch.look(3600.0)
    first_s = loop.time() - began_s
    assert first_s >= PATIENCE_S
    began_s = loop.time()
    for _ in range(3):
        await watch.look(3600.0, 3600.0)
    assert loop.time() - began_s < 60.0, "a question that has waited in vain is not waited for again"
    watch.close()


async def test_silence_longer_than_the_limit_is_no_report(process: Process) -> None:
    watch = ReportWatch(process.report)
    process.answers.clear()
    look = await watch.look(2 * PATIENCE_S)
    assert (look.report, look.error, look.was_heard) == (None, None, False)
    watch.close()


async def test_failure_is_handed_on_and_the_next_look_asks_again() -> None:
    answers = iter([ValueError("no"), 5])

    async def report() -> int:
        answer = next(answers)
        if isinstance(answer, ValueError):
            raise answer
        return answer

    watch = ReportWatch(report)
    look = await watch.look(1.0)
    assert isinstance(look.error, ValueError)
    assert (await watch.look(1.0)).report == 5
