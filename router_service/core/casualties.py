"""Which actors were lost or fell silent of late, and whether together they tell of a lost GPU or node."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from router_service.core.watch import Watch


@dataclass(frozen=True, slots=True)
class Group:
    """A GPU of a node, or the whole node, that two actors speak for; neither was heard after `last_heard_s`."""

    node_id: str
    device: str | None
    last_heard_s: float
    evidence: str

    def holds(self, watch: Watch) -> bool:
        """Whether an actor belongs to it."""
        return watch.node_id == self.node_id and self.device in {None, watch.device}


@dataclass(frozen=True, slots=True)
class _Casualty:
    device: str
    at_s: float
    heard_s: float
    is_firm: bool


class Casualties:
    """The casualties of each node within the window. `is_firm`: lost or ejected; those that are merely suspected count only beside a firm one."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._by_node: dict[str, dict[str, _Casualty]] = {}

    def note(self, watch: Watch, clock_s: float, heard_s: float, *, is_firm: bool) -> None:
        """One more; those that are out of the window are dropped."""
        known = self._by_node.get(watch.node_id, {})
        fresh = {actor: one for actor, one in known.items() if abs(clock_s - one.at_s) <= self._window_s}
        fresh[watch.actor] = _Casualty(watch.device, clock_s, heard_s, is_firm)
        self._by_node[watch.node_id] = fresh

    def forget(self, watch: Watch) -> None:
        """It is well again, or is known no more."""
        known = self._by_node.get(watch.node_id)
        if known is not None and known.pop(watch.actor, None) is not None and not known:
            del self._by_node[watch.node_id]

    def struck_group(self, watch: Watch, everybody: Iterable[Watch]) -> Group | None:
        """What the casualties around this one say is gone: its GPU, if they are all there and the node has others; else the node."""
        known = self._by_node.get(watch.node_id, {})
        if len(known) <= 1 or not any(one.is_firm for one in known.values()):
            return None
        devices = {one.device for one in known.values()}
        others = {mate.device for mate in everybody if mate.node_id == watch.node_id} - devices
        device = watch.device if len(devices) == 1 and others else None
        names = " and ".join(sorted(known))
        place = f"node {watch.node_id}" if device is None else f"{device} of node {watch.node_id}"
        last_heard_s = max(one.heard_s for one in known.values())
        return Group(watch.node_id, device, last_heard_s, f"{place}: {names} were lost or silent within {self._window_s} s")
