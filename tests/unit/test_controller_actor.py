"""The controller's process: a first start that fails is tried again, leaves nothing open, and at last ends the process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cluster import controller_actor
from cluster.control_service import ControlServer
from cluster.controller_actor import EXIT_NOT_STARTED, ControllerActor, ControllerSettings
from cluster.core.errors import FleetError
from cluster.fleet import Fleet
from kit.fleet import FakeFleet, ManualClock
from kit.waiting import until


class Factory:
    """Fails as often as told, then makes fleets of nothing."""

    def __init__(self, num_failures: int) -> None:
        self.num_failures, self.num_calls = num_failures, 0

    def __call__(self, settings: ControllerSettings) -> Fleet:
        self.num_calls += 1
        if self.num_calls <= self.num_failures:
            message = f"{settings.deployment}: no Ray yet"
            raise FleetError(message)
        return FakeFleet(ManualClock())


@pytest.fixture
async def settings(tmp_path: Path) -> ControllerSettings:
    free = ControlServer("127.0.0.1", 0)
    await free.stop()
    return ControllerSettings("t", "127.0.0.1", tmp_path / "state", tmp_path / "store", b"l" * 32, b"c" * 32, port=free.port)


@pytest.fixture(autouse=True)
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    codes: list[int] = []
    monkeypatch.setattr(controller_actor, "START_BACKOFFS_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(controller_actor.os, "_exit", codes.append)
    return codes


async def first_start(actor: ControllerActor) -> None:
    assert actor._first_start is not None
    async with asyncio.timeout(10.0):
        await actor._first_start


async def test_start_that_fails_is_tried_again_and_finds_its_fixed_port_free(
    settings: ControllerSettings, exits: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    factory = Factory(2)
    actor = ControllerActor(settings, factory)
    await first_start(actor)
    assert factory.num_calls == 3
    assert exits == []
    assert [record.getMessage() for record in caplog.records if "start" in record.getMessage()] == [
        "controller: start 1 of 4 failed",
        "controller: start 2 of 4 failed",
    ]
    assert await actor.start() == f"127.0.0.1:{settings.port}"
    await actor.stop()


async def test_start_that_keeps_failing_ends_the_process_after_a_bounded_number(settings: ControllerSettings, exits: list[int]) -> None:
    factory = Factory(1000)
    await first_start(ControllerActor(settings, factory))
    assert (factory.num_calls, exits) == (4, [EXIT_NOT_STARTED])


async def test_caller_sees_why_the_start_failed(settings: ControllerSettings) -> None:
    actor = ControllerActor(settings, Factory(1))
    with pytest.raises(FleetError, match="no Ray yet"):
        await actor.start()
    await first_start(actor)
    await actor.stop()


async def test_stopped_controller_does_not_start_by_itself(settings: ControllerSettings, exits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_actor, "START_BACKOFFS_S", (60.0,))
    factory = Factory(1)
    actor = ControllerActor(settings, factory)
    await until(lambda: factory.num_calls == 1)
    await actor.stop()
    assert actor._first_start is not None
    assert actor._first_start.done()
    assert (factory.num_calls, exits) == (1, [])
