"""The link across a real interface: a veth pair between two network namespaces, an actor's server in one, a router's lanes in the other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ACTOR_HOST, ROUTER_HOST = "10.203.77.1", "10.203.77.2"

End = Callable[..., subprocess.Popen]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("`ip` is missing (Debian package iproute2)")
    actor_ns, router_ns = (f"moe-test-{os.getpid()}-{side}" for side in "ar")
    actor_if, router_if = (f"mt{os.getpid()}{side}" for side in "ar")
    try:
        ip("netns", "add", actor_ns)
        ip("netns", "add", router_ns)
        ip("link", "add", actor_if, "type", "veth", "peer", "name", router_if)
        for namespace, interface, host in ((actor_ns, actor_if, ACTOR_HOST), (router_ns, router_if, ROUTER_HOST)):
            ip("link", "set", interface, "netns", namespace)
            ip("-n", namespace, "addr", "add", f"{host}/30", "dev", interface)
            ip("-n", namespace, "link", "set", interface, "up")
    except subprocess.CalledProcessError as error:
        remove(actor_ns, router_ns)
        pytest.skip(f"this machine makes no network namespaces: {error.stderr.decode().strip()}")
    yield actor_ns, router_ns
    remove(actor_ns, router_ns)


def remove(*namespaces: str) -> None:
    for namespace in namespaces:
        subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True, timeout=20)


@pytest.fixture
def end() -> Iterator[End]:
    started: list[subprocess.Popen] = []

    def start(namespace: str, *arguments: str) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "kit.link_process", *arguments]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)
        process.stdout.close()


def hear(process: subprocess.Popen) -> dict:
    return json.loads(process.stdout.readline())


def ask(process: subprocess.Popen, line: int | str) -> dict:
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return hear(process)


def test_rows_cross_a_real_interface_and_a_dead_one_is_noticed(namespaces: tuple[str, str], end: End) -> None:
    actor_ns, router_ns = namespaces
    server = end(actor_ns, "serve", ACTOR_HOST)
    place = hear(server)
    assert place["host"] == ACTOR_HOST
    router = end(router_ns, "call", place["host"], str(place["port"]))
    assert ask(router, 3) == {"equal": True, "bytes": 3 * 2048}
    assert ask(router, 4096) == {"equal": True, "bytes": 4096 * 2048}
    interface = f"mt{os.getpid()}a"
    ip("-n", actor_ns, "link", "set", interface, "down")
    lost = ask(router, 3)
    assert lost["error"] == "REPLICA_UNAVAILABLE"
    ip("-n", actor_ns, "link", "set", interface, "up")
    assert ask(router, "wait") == {"ready": True}
    assert ask(router, 3) == {"equal": True, "bytes": 3 * 2048}
