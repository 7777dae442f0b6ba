"""Deploys with a router that trusts blindly: `python -m bench.bare_router` instead of `cluster.deploy`, for the section `failover_cost` alone.

Its router judges no actor (no liveness) and lets numbers that are not finite pass. Neither has a switch in the spec, since nobody should serve so: both are
taken out of the router's process here. What a switch exists for (hedging, checksums, the ladder) the spec turns off.
"""

from __future__ import annotations

import sys
from typing import Any

from cluster.controller_actor import ControllerSettings
from cluster.deploy import __main__ as deployer
from cluster.deploy import roots
from cluster.fleet import Fleet

BARE_ROUTER = "BareRouterHost"


def make_fleet(settings: ControllerSettings, *, store_max_bytes: int | None = None) -> Fleet:
    """As `roots.make_fleet`, but for the router. Runs in the controller's process; being `__main__`'s, it travels there by value."""
    from dataclasses import replace

    from router_service.hosting import RouterHost

    class BareRouterHost(RouterHost):
        """The shipped router, less what is measured."""

        def __init__(self, *arguments: Any) -> None:
            strip()
            super().__init__(*arguments)

    fleet: Any = roots.make_fleet(settings, store_max_bytes=store_max_bytes)
    fleet._classes = replace(fleet._classes, router=BareRouterHost)
    made: Fleet = fleet
    return made


def strip() -> None:
    """Take liveness and the check of outputs out of this process."""
    from router_service import pipeline, router_parts

    vars(router_parts)["ActorHealth"] = _blind()
    vars(pipeline)["is_finite"] = lambda _rows: True


def _blind() -> type:
    from router_service.actor_health import ActorHealth

    class Blind(ActorHealth):
        """Counts bytes as its base does, and judges nobody; it never beats."""

        def start(self) -> None:
            pass

        def joined(self, lane: Any) -> None:
            pass

        def may_send(self, lane: Any) -> bool:  # noqa: ARG002  (as its base)
            return True

        def sent(self, lane: Any, num_tokens: int, num_bytes: int) -> None:  # noqa: ARG002
            self._metrics.link_bytes("sent", num_bytes)

        def answered(self, lane: Any, num_tokens: int, num_bytes: int, took_s: float) -> None:  # noqa: ARG002
            self._metrics.link_bytes("received", num_bytes)

        def heard(self, lane: Any, progress: Any) -> None:
            pass

        def lost(self, lane: Any) -> None:  # noqa: ARG002
            self.changed.set()

        def left(self, lane: Any) -> None:
            pass

    return Blind


if __name__ == "__main__":
    vars(roots)["make_fleet"] = make_fleet
    sys.exit(deployer.main())
