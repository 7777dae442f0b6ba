"""Imports that take seconds of a core, behind everything else that wants it: an actor that is being replaced starts beside those that answer."""

from __future__ import annotations

import contextlib
import importlib
import threading

from cluster.scheduling import START_NICENESS, give_way


def import_quietly(*modules: str) -> None:
    """Import in a thread of low priority; returns when that is done. An import that fails is left to the caller's own, which says why."""
    thread = threading.Thread(target=_import, args=(modules,), name="quiet-import")
    thread.start()
    thread.join()


def _import(modules: tuple[str, ...]) -> None:
    give_way(START_NICENESS)
    with contextlib.suppress(ImportError):
        for name in modules:
            importlib.import_module(name)
