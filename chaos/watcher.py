"""Looks at the router while a repetition runs: links often, the table when its epoch has changed. A thread: a look must not wait for the runner's loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from chaos.core.observations import RouterSample
from cluster.core.errors import MoeError
from cluster.core.ids import ExpertId, Incarnation
from router_service.client import RouterClient, RoutingTableInfo

QUICK_S = 0.05
SLOW_S = 0.2
ASK_LIMIT_S = 0.5
MAX_SAMPLES = 200_000
Places = dict[ExpertId, frozenset[Incarnation]]


class Watcher:
    """`quicken(until_s)` makes it look every QUICK_S for a while: a look costs the router about a millisecond, so not always."""

    def __init__(self, client: RouterClient, model: str, layer: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._model, self._layer = model, layer
        self._clock = clock
        self._samples: list[RouterSample] = []
        self._quick_until_s = 0.0
        self._is_over = threading.Event()
        self._is_hurried = threading.Event()
        self._table: tuple[int, Places, Places] = (-1, {}, {})
        self._thread = threading.Thread(target=self._run, name="watch-router", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End; returns when the last look is over."""
        self._is_over.set()
        self._is_hurried.set()
        self._thread.join(2 * ASK_LIMIT_S + SLOW_S)

    def quicken(self, until_s: float) -> None:
        """Look often until then."""
        self._quick_until_s = until_s
        self._is_hurried.set()

    def since(self, begin_s: float) -> list[RouterSample]:
        """The samples from then on."""
        return [sample for sample in self._samples if sample.at_s >= begin_s]

    def look(self) -> RouterSample | None:
        """One look; None when the router did not answer."""
        try:
            status = self._client.status(timeout_s=ASK_LIMIT_S)
            if status.epoch != self._table[0]:
                table = self._client.routing_table(timeout_s=ASK_LIMIT_S)
                self._table = (table.epoch, _places(table, self._model, self._layer, "replicas"), _places(table, self._model, self._layer, "shadows"))
        except MoeError:
            return None
        links = {Incarnation(link.actor_id, link.generation): link.state for link in status.links}
        return RouterSample(self._clock(), status.epoch, links, self._table[1], self._table[2])

    def _run(self) -> None:
        while not self._is_over.is_set():
            sample = self.look()
            if sample is not None and len(self._samples) < MAX_SAMPLES:
                self._samples.append(sample)
            is_quick = self._clock() < self._quick_until_s
            self._is_hurried.clear()
            if not is_quick:
                self._is_hurried.wait(SLOW_S)
            else:
                self._is_over.wait(QUICK_S)


def _places(table: RoutingTableInfo, model: str, layer: int, role: str) -> Places:
    return {
        ExpertId(expert.model, expert.layer, expert.index): frozenset(Incarnation(place.actor_id, place.generation) for place in getattr(expert, role))
        for expert in table.experts
        if (expert.model, expert.layer) == (model, layer)
    }
