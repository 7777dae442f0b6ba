"""Where a router listens: the port it had before, if any will do, and where the spec wants several routers, one port for all of them and for nobody else.

With SO_REUSEPORT every process of this user that asks for it, too, may listen on the port, and nobody is told: a part of the callers would talk to a
stranger. (Any gRPC server in Python asks for it unless told otherwise.) So each router looks first who listens there, one at a time. A stranger that
comes later cannot be kept away, and is found when the next router starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import platform
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final

import psutil

from cluster.core.actor_config import RouterConfig, router_ids
from cluster.core.errors import ConfigError, NotReady
from cluster.core.spec import MAX_PORT

RETRY_S: Final = 0.1
TURN_S: Final = 30.0
Listen = Callable[[int], Awaitable[int]]
_Life = tuple[int, float]


class RouterAddress:
    """The port of one router; siblings agree on theirs by files in the node's store."""

    def __init__(self, config: RouterConfig) -> None:
        """Touches nothing."""
        name, folder = config.spec.name, config.store_dir / "routers"
        self._router = config.spec.router
        self._folder = folder
        self._port_path = folder / f"{name}-{router_ids(config.spec)[0]}.port"
        self._lives_path = folder / f"{name}.lives"
        self._turn_path = folder / f"{name}.turn"

    async def listen(self, listen: Listen, *, patience_s: float) -> int:
        """Listen on the port of the spec, or where that is 0 on the one that was had before: clients find it again after a restart. Raises ConfigError.

        The life before may still be draining on a port that it is known to have had; then it is waited for, `patience_s` at most. NotReady: a sibling
        hangs in its turn.
        """
        until_s, given_up = time.monotonic() + patience_s, 0
        while True:
            async with self._turn():
                known = await asyncio.to_thread(_remembered_port, self._port_path)
                wanted = self._router.port or (known if known != given_up else 0)
                try:
                    return await self._listen_on(wanted, listen)
                except ConfigError:
                    may_wait = 0 < wanted == known and time.monotonic() < until_s
                    may_move = wanted > 0 and not self._router.port and not self._siblings()
                    if not (may_wait or may_move):
                        raise
                    given_up = given_up if may_wait else wanted
            await asyncio.sleep(RETRY_S)

    async def _listen_on(self, wanted: int, listen: Listen) -> int:
        if self._router.shares_address:
            await asyncio.to_thread(self._refuse_strangers, wanted)
        port = await listen(wanted)
        await asyncio.to_thread(self._note, port)
        return port

    def _note(self, port: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._port_path.write_text(str(port))
        if self._router.shares_address:
            draft = self._lives_path.with_suffix(".draft")
            draft.write_text(json.dumps([*self._siblings(), (os.getpid(), psutil.Process().create_time())]))
            draft.replace(self._lives_path)

    def _refuse_strangers(self, port: int) -> None:
        """Raises ConfigError when a process that is none of our routers listens on the port, at any address of this machine."""
        if platform.system() != "Linux":
            message = "router.count: only Linux spreads connections over several routers behind one address; set router.count to 1"
            raise ConfigError(message)
        ours = {pid for pid, _ in self._siblings()} | {os.getpid()}
        listeners = [(entry.laddr, entry.pid) for entry in psutil.net_connections("tcp") if entry.status == psutil.CONN_LISTEN]
        if any(address and address.port == port and pid not in ours for address, pid in listeners):
            message = f"router: cannot listen on port {port}: a process that is no router of this deployment listens there; end it, or set another router.port"
            raise ConfigError(message)

    def _siblings(self) -> list[_Life]:
        """Other routers of the deployment, or former lives of this one, that have listened where we do and are still alive."""
        try:
            known = json.loads(self._lives_path.read_text())
        except (OSError, ValueError):
            return []
        return [(pid, start_s) for pid, start_s in known if pid != os.getpid() and _is_alive(pid, start_s)]

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """One router at a time looks and then listens; a router that shares with nobody has no need to wait."""
        if not self._router.shares_address:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._turn_path.open("w") as file:
            until_s = time.monotonic() + TURN_S
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if time.monotonic() >= until_s:
                    message = f"router: another router of this deployment has been about to listen for {TURN_S:g} s and hangs; end its process"
                    raise NotReady(message)
                await asyncio.sleep(RETRY_S)
            yield


def _is_alive(pid: int, start_s: float) -> bool:
    try:
        return psutil.Process(pid).create_time() == start_s
    except psutil.Error:
        return False


def _remembered_port(path: Path) -> int:
    try:
        text = path.read_text()
    except OSError:
        return 0
    return int(text) if text.isdigit() and int(text) <= MAX_PORT else 0
