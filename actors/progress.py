"""How far an actor's compute thread is, as its heartbeats tell routers."""

from __future__ import annotations

from typing import NamedTuple


class Progress(NamedTuple):
    """What a Pong says of the compute thread; a plain tuple of the first three will do."""

    frames_done: int
    oldest_age_s: float
    queued_tokens: int
    is_loading: bool = False
