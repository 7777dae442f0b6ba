"""What every fleet must do, whatever it runs on. A suite for the fake and for Ray: subclasses bring a `rig` fixture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest

from cluster.core.actor_config import ExpertActorConfig, RouterConfig
from cluster.core.errors import CheckpointError, FleetError, SlotsExhausted, StaleTable
from cluster.core.ids import CopyId, Incarnation
from cluster.core.placement import wanted_copies
from cluster.core.status import ActorState, FleetObservation, SlotState
from cluster.fleet import Fleet
from kit.control import make_spec
from kit.fleet import make_manifest

MANIFEST = make_manifest()
COPIES = wanted_copies(MANIFEST)
GPUS = 0.25


class FleetRig(Protocol):
    """A fleet under test. `model_dir` is a folder that its nodes can import MANIFEST from; `bad_dir` is none."""

    fleet: Fleet
    store_dir: Path
    model_dir: Path
    bad_dir: Path
    generation: int

    async def until(self, condition: Callable[[FleetObservation], bool]) -> FleetObservation:
        """Let time pass until an observation fits."""
        ...

    async def kill(self, incarnation: Incarnation) -> None:
        """End its process without a word."""
        ...


class FleetContract:
    """Tests; each starts actors of its own generation."""

    @pytest.fixture
    async def node_id(self, rig: FleetRig) -> str:
        status = await rig.fleet.observe()
        return next(node.node_id for node in status.nodes if node.alive and node.num_gpus >= GPUS)

    @pytest.fixture
    async def actor(self, rig: FleetRig, node_id: str) -> Incarnation:
        await rig.fleet.import_experts(node_id, manifest=MANIFEST, source=rig.model_dir, experts=[(0, 0), (0, 1), (1, 0)])
        rig.generation += 1
        config = ExpertActorConfig(deployment="t", actor_id="actor-0", generation=rig.generation, num_slots=2, num_gpus=GPUS, store_dir=rig.store_dir)
        await rig.fleet.start_actor(config, node_id=node_id, num_gpus=GPUS, num_cpus=0.0)
        await rig.until(lambda status: state_of(status, config.incarnation) is ActorState.READY)
        return config.incarnation

    async def test_head_and_nodes_are_seen_with_their_gpus(self, rig: FleetRig) -> None:
        status = await rig.fleet.observe()
        alive = [node for node in status.nodes if node.alive]  # one that was lost is told, too, for as long as the cluster runs
        assert [node.is_head for node in alive].count(True) == 1
        assert len(alive) > 1
        assert all(node.address for node in alive)
        assert sum(node.num_gpus for node in alive) > 0

    async def test_started_actor_reports_where_and_what_it_is(self, rig: FleetRig, actor: Incarnation, node_id: str) -> None:
        status = await rig.fleet.observe()
        entry = next(entry for entry in status.actors if entry.incarnation == actor)
        assert entry.node_id == node_id
        assert entry.report is not None
        assert (entry.report.incarnation, entry.report.num_slots, entry.report.slots) == (actor, 2, ())
        assert entry.report.port > 0

    async def test_starting_a_running_actor_again_changes_nothing(self, rig: FleetRig, actor: Incarnation, node_id: str) -> None:
        before = report_of(await rig.fleet.observe(), actor)
        config = ExpertActorConfig(deployment="t", actor_id=actor.actor_id, generation=actor.generation, num_slots=2, num_gpus=GPUS, store_dir=rig.store_dir)
        await rig.fleet.start_actor(config, node_id=node_id, num_gpus=GPUS, num_cpus=0.0)
        status = await rig.until(lambda status: state_of(status, actor) is ActorState.READY)
        assert report_of(status, actor).pid == before.pid

    async def test_assumed_copies_become_ready_then_drain_then_free_their_slots(self, rig: FleetRig, actor: Incarnation) -> None:
        copies = COPIES[:2]
        await rig.fleet.assume(actor, copies, epoch=1)
        await rig.until(lambda status: slots_of(status, actor) == dict.fromkeys(copies, SlotState.READY))
        await rig.fleet.drain(actor, copies[:1], epoch=2)
        await rig.until(lambda status: slots_of(status, actor).get(copies[0]) is SlotState.DRAINING)
        await rig.fleet.release(actor, copies[:1], epoch=2)
        status = await rig.until(lambda status: slots_of(status, actor) == {copies[1]: SlotState.READY})
        assert report_of(status, actor).max_epoch == 2

    async def test_what_does_not_fit_is_refused_whole_with_both_numbers(self, rig: FleetRig, actor: Incarnation) -> None:
        with pytest.raises(SlotsExhausted, match=r"2.*3|3.*2"):
            await rig.fleet.assume(actor, [COPIES[0], COPIES[1], COPIES[4]], epoch=1)
        assert slots_of(await rig.fleet.observe(), actor) == {}

    async def test_commands_of_an_older_epoch_are_refused(self, rig: FleetRig, actor: Incarnation) -> None:
        await rig.fleet.assume(actor, COPIES[:1], epoch=7)
        with pytest.raises(StaleTable):
            await rig.fleet.release(actor, COPIES[:1], epoch=6)

    async def test_killed_actor_is_gone_or_dead_and_refuses_commands(self, rig: FleetRig, actor: Incarnation) -> None:
        await rig.kill(actor)
        await rig.until(lambda status: state_of(status, actor) in (None, ActorState.DEAD))
        with pytest.raises(FleetError):
            await rig.fleet.assume(actor, COPIES[:1], epoch=1)

    async def test_stopped_actor_goes_away_and_stopping_it_again_does_nothing(self, rig: FleetRig, actor: Incarnation) -> None:
        await rig.fleet.stop_actor(actor, timeout_s=2.0)
        await rig.until(lambda status: state_of(status, actor) in (None, ActorState.DEAD))
        await rig.fleet.stop_actor(actor, timeout_s=2.0)

    async def test_import_reads_the_manifest_and_refuses_what_is_no_checkpoint(self, rig: FleetRig, node_id: str) -> None:
        manifest = await rig.fleet.import_model(node_id, name="m", source=rig.model_dir, dtype="checkpoint", expected=None)
        assert manifest.experts == MANIFEST.experts
        again = await rig.fleet.import_model(node_id, name="m", source=rig.model_dir, dtype="checkpoint", expected=manifest)
        assert again == manifest
        with pytest.raises(CheckpointError):
            await rig.fleet.import_model(node_id, name="m", source=rig.bad_dir, dtype="checkpoint", expected=None)
        assert await rig.fleet.import_progress() == {}

    async def test_router_starts_once_and_stops(self, rig: FleetRig) -> None:
        status = await rig.fleet.observe()
        head = next(node.node_id for node in status.nodes if node.is_head)
        config = RouterConfig(router_id="router-0", spec=make_spec(), control_address="127.0.0.1:1", store_dir=rig.store_dir)
        await rig.fleet.start_router(config, node_id=head)
        status = await rig.until(lambda status: [router.state for router in status.routers] == [ActorState.READY])
        await rig.fleet.start_router(config, node_id=head)
        assert [router.port for router in (await rig.fleet.observe()).routers] == [status.routers[0].port]
        await rig.fleet.stop_router("router-0", timeout_s=2.0)
        await rig.until(lambda status: all(router.state is ActorState.DEAD for router in status.routers))
        await rig.fleet.stop_router("router-0", timeout_s=2.0)


def state_of(status: FleetObservation, incarnation: Incarnation) -> ActorState | None:
    """An actor's state; None when it is not seen at all."""
    return next((actor.state for actor in status.actors if actor.incarnation == incarnation), None)


def report_of(status: FleetObservation, incarnation: Incarnation):  # noqa: ANN201 - a report, or the test ends here
    report = next(actor.report for actor in status.actors if actor.incarnation == incarnation)
    assert report is not None
    return report


def slots_of(status: FleetObservation, incarnation: Incarnation) -> dict[CopyId, SlotState]:
    """Copies and their states in an actor."""
    return {slot.copy: slot.state for actor in status.actors if actor.incarnation == incarnation and actor.report for slot in actor.report.slots}
