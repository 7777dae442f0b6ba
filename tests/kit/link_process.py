"""One end of a link as a process of its own: `serve HOST` or `call HOST PORT`. Tells one JSON line per event.

A caller does what its standard input says, line by line: a number of rows to send, or `wait` for the link to be ready.
"""

from __future__ import annotations

import asyncio
import json
import sys

import numpy as np

from cluster.core.errors import MoeError
from cluster.core.ids import Incarnation
from cluster.core.link_limits import LinkLimits
from cluster.core.routing_table import ActorEndpoint
from kit.link import random_rows, request, running_actor, running_lanes, until
from router_service.link_client import LinkPhase


def tell(**event: object) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


async def serve(host: str) -> None:
    async with running_actor(host=host) as actor:
        tell(host=actor.host, port=actor.port)
        await asyncio.to_thread(sys.stdin.read)


async def call(host: str, port: int) -> None:
    endpoint = ActorEndpoint(Incarnation("actor-0", 1), host, port, "node-1")
    async with running_lanes(endpoint, limits=LinkLimits(heartbeat_s=0.05, silence_timeout_s=0.5)) as lanes:
        while line := await asyncio.to_thread(sys.stdin.readline):
            if line.strip() == "wait":
                await until(lambda: lanes.status()[0].phase is LinkPhase.READY, timeout_s=30.0)
                tell(ready=True)
                continue
            rows = random_rows(int(line), 2048)
            try:
                reply = await lanes.submit(request(endpoint, rows, timeout_s=20.0))
                tell(equal=bool(np.array_equal(reply.rows, rows)), bytes=reply.rows.nbytes)
            except MoeError as error:
                tell(error=error.reason, message=str(error))


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[2]) if sys.argv[1] == "serve" else call(sys.argv[2], int(sys.argv[3])))
