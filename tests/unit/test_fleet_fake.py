"""The fake fleet keeps the fleet's contract: what is proved on it holds for Ray as well."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.core.ids import Incarnation
from cluster.core.status import FleetObservation
from kit.fleet import FakeFleet, ManualClock
from kit.fleet_contract import MANIFEST, FleetContract

MAX_LOOKS = 100


class FakeRig:
    """Waiting moves the clock."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.fleet = FakeFleet(self.clock, nodes=2)
        self.store_dir, self.model_dir, self.bad_dir = Path("/store"), Path("/models/m"), Path("/models/none")
        self.fleet.models[self.model_dir] = MANIFEST
        self.generation = 0

    async def until(self, condition: Callable[[FleetObservation], bool]) -> FleetObservation:
        for _ in range(MAX_LOOKS):
            status = await self.fleet.observe()
            if condition(status):
                return status
            self.clock.advance(0.1)
            await asyncio.sleep(0)
        message = "the condition did not come true"
        raise AssertionError(message)

    async def kill(self, incarnation: Incarnation) -> None:
        self.fleet.kill_actor(incarnation)


class TestFakeFleet(FleetContract):
    @pytest.fixture
    def rig(self) -> FakeRig:
        return FakeRig()
