"""Devices that fail again and again: what counts against one, and when it is quarantined. A device is NODE/DEVICE, as its actors report it.

The deaths of all actors of a device at one moment are one failure. A quarantine lasts until somebody releases it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace

from cluster.core.ids import Incarnation
from cluster.core.memory import Memory
from cluster.core.spec import RepairSpec
from cluster.core.status import ActorReport, FleetObservation, GpuFault

SAME_EVENT_S = 5.0
MAX_DEVICES = 4096


def device_of(report: ActorReport) -> str:
    """The device that an actor computes on."""
    return f"{report.node_id}/{report.device}"


def node_of_device(device: str) -> str:
    """The node that a device is on."""
    return device.partition("/")[0]


def with_devices(memory: Memory, status: FleetObservation) -> Memory:
    """Remember the device of each recorded life: who dies says nothing any more."""
    lives = {record.incarnation for record in memory.actors.values()}
    devices = {life: device for life, device in memory.devices.items() if life in lives}
    devices.update({actor.incarnation: device_of(actor.report) for actor in status.actors if actor.report is not None and actor.incarnation in lives})
    return memory if devices == memory.devices else replace(memory, devices=devices)


def with_strike(memory: Memory, device: str, now_s: float) -> Memory:
    """Count a failure against a device; what happens within a moment is one failure."""
    if not device or device in memory.quarantined or (device not in memory.strikes and len(memory.strikes) >= MAX_DEVICES):
        return memory
    times = memory.strikes.get(device, ())
    if times and now_s - times[-1] < SAME_EVENT_S:
        return memory
    return replace(memory, strikes={**memory.strikes, device: (*times, now_s)})


def with_strike_of(memory: Memory, life: Incarnation, now_s: float) -> Memory:
    """Count the failure of a life against the device that it was last seen on."""
    return with_strike(memory, memory.devices.get(life, ""), now_s)


def with_gpu_faults(memory: Memory, status: FleetObservation) -> Memory:
    """Take up what the nodes' drivers tell: an error that is the device's quarantines it at once, one of a program is left to its exit.

    Drivers' listeners tell the same errors until they end: what was before a device's release is past.
    """
    blamed = {
        device: f"its driver reported Xid {fault.xid}"
        for device, fault in _gpu_faults(status)
        if fault.is_device and device not in memory.quarantined and fault.unix_s > memory.released.get(device, 0.0)
    }
    return replace(memory, quarantined={**memory.quarantined, **blamed}) if blamed else memory


def _gpu_faults(status: FleetObservation) -> Iterator[tuple[str, GpuFault]]:
    return ((f"{node.node_id}/{fault.device}", fault) for node in status.nodes if node.alive for fault in node.gpu_faults)


def with_quarantines(memory: Memory, repair: RepairSpec, now_s: float, can_spare: Callable[[str], bool]) -> tuple[Memory, list[str]]:
    """Quarantine devices that failed too often; with notes on those that would be, if the others had room for their copies.

    Args:
        memory: with the strikes counted so far.
        repair: the limits.
        now_s: the time of the look.
        can_spare: whether what is left without a device could hold all copies.
    """
    if not memory.strikes:
        return memory, []
    strikes = {device: tuple(at_s for at_s in times if now_s - at_s < repair.quarantine_window_s) for device, times in memory.strikes.items()}
    strikes = {device: times for device, times in strikes.items() if times}
    memory = memory if strikes == memory.strikes else replace(memory, strikes=strikes)
    if not repair.quarantine_failures:
        return memory, []
    due = [device for device, times in strikes.items() if len(times) >= repair.quarantine_failures]
    why = f"it failed {repair.quarantine_failures} times within {repair.quarantine_window_s:g} s"
    kept = [device for device in due if not can_spare(device)]
    for device in [device for device in due if device not in kept][:1]:  # one at a time: the next look knows how much room is left
        memory = replace(memory, quarantined={**memory.quarantined, device: why}, strikes={name: times for name, times in strikes.items() if name != device})
    return memory, [f"{device} is not quarantined, although {why}: the other actors have no room for its copies" for device in kept]


def released(memory: Memory, device: str, status: FleetObservation, unix_s: float) -> Memory:
    """Trust a device again, from nothing held against it: no error until now, nor one that is known already by a node's clock that is ahead."""
    past_s = max([unix_s, *(fault.unix_s for name, fault in _gpu_faults(status) if name == device)])
    kept: Mapping[str, str] = {name: why for name, why in memory.quarantined.items() if name != device}
    strikes = {name: times for name, times in memory.strikes.items() if name != device}
    past = dict([*((name, at_s) for name, at_s in memory.released.items() if name != device), (device, past_s)][-MAX_DEVICES:])
    return replace(memory, quarantined=kept, strikes=strikes, released=past)


def found_device(memory: Memory, status: FleetObservation, asked: str) -> str | None:
    """The quarantined device that is meant by NODE/DEVICE, where NODE is a node's id, its name, or a beginning that only one of them has."""
    node, _, name = asked.partition("/")
    names = {entry.node_id: entry.name for entry in status.nodes}
    on_device = [device for device in memory.quarantined if device.partition("/")[2] == name]
    exact = [device for device in on_device if node in {node_of_device(device), names.get(node_of_device(device))}]
    found = exact or [device for device in on_device if node and node_of_device(device).startswith(node)]
    return found[0] if len(found) == 1 else None


def closed_nodes(memory: Memory) -> Collection[str]:
    """Nodes that get no new actors: Ray, not we, picks the device within a node."""
    return {node_of_device(device) for device in memory.quarantined}
