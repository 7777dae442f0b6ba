"""The models that a router can answer for: their gates, loaded from the node-local store as tables name them, off the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from cluster.core.errors import MoeError
from cluster.core.routing_table import RoutingTable
from router_service.models import GateStore, ServedModel, load_model

logger = logging.getLogger(__name__)


class ServedModels:
    """Models by name; `current` is one and the same mapping all the time, and changes only in `put`."""

    def __init__(self, store: GateStore) -> None:
        self.current: dict[str, ServedModel] = {}
        self._store = store

    async def load(self, table: RoutingTable) -> dict[str, ServedModel]:
        """The models of a table, those loaded before as they are. One that cannot be loaded is left out: better no answer than another gate's."""
        loaded: dict[str, ServedModel] = {}
        for name, entry in table.models.items():
            known = self.current.get(name)
            if known is not None and known.digest == entry.manifest:
                loaded[name] = known
                continue
            try:
                loaded[name] = await asyncio.to_thread(load_model, self._store, entry.manifest)
            except MoeError as error:
                logger.warning("model %s cannot be loaded from this node's store yet: %s", name, error)
            except Exception:  # whatever is wrong with one model, the others are served
                logger.exception("model %s cannot be loaded from this node's store", name)
        return loaded

    def put(self, models: Mapping[str, ServedModel]) -> None:
        """Serve these models from now on."""
        self.current.clear()
        self.current.update(models)
