"""A sentinel ends a killed process's links, and no others. The links here have a further holder, so that the kernel's own closing ends none of them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.sentinel import Sentinel
from kit.link import joined_ends
from kit.waiting import wait_until

LIMIT_S = 20.0
ACTOR = """
import socket, sys
from actors.sentinel import Sentinel
sentinel = Sentinel.start()
link = socket.socket(fileno=int(sys.argv[1]))
sentinel.guard(link)
print(sentinel.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    with joined_ends(LIMIT_S) as both:
        yield both


def num_sockets(pid: int | None) -> int:
    """How many descriptors of a process are sockets; others may come and go meanwhile."""
    found = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += str(path.readlink()).startswith("socket:")
    return found


def test_the_links_of_a_killed_process_end_though_somebody_else_holds_them_open(ends: tuple[socket.socket, socket.socket]) -> None:
    router, held_open = ends
    command = [sys.executable, "-c", ACTOR, str(held_open.fileno())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(held_open.fileno(),)) as actor:
        assert actor.stdout is not None
        sentinel_pid = int(actor.stdout.readline())
        wait_until(lambda: num_sockets(sentinel_pid) == 2, "the sentinel holds what it should")
        actor.kill()
        assert router.recv(1) == b""


def test_a_sentinel_that_is_stopped_leaves_links_alone(ends: tuple[socket.socket, socket.socket]) -> None:
    router, actor = ends
    sentinel = Sentinel.start()
    assert sentinel is not None
    sentinel.guard(actor)
    wait_until(lambda: num_sockets(sentinel.pid) == 2, "the sentinel holds what it should")
    sentinel.stop()
    assert not Path(f"/proc/{sentinel.pid}").exists()
    actor.sendall(b"still here")
    assert router.recv(16) == b"still here"
    router.settimeout(0)
    with pytest.raises(BlockingIOError):
        router.recv(1)


def test_a_link_that_its_actor_closed_is_not_kept_open(ends: tuple[socket.socket, socket.socket]) -> None:
    router, actor = ends
    sentinel = Sentinel.start()
    assert sentinel is not None
    sentinel.guard(actor)
    wait_until(lambda: num_sockets(sentinel.pid) == 2, "the sentinel holds what it should")
    actor.shutdown(socket.SHUT_RDWR)
    actor.close()
    assert router.recv(1) == b""
    wait_until(lambda: num_sockets(sentinel.pid) == 1, "the sentinel holds what it should")
    sentinel.stop()


def test_an_actor_whose_sentinel_is_gone_serves_on(ends: tuple[socket.socket, socket.socket], caplog: pytest.LogCaptureFixture) -> None:
    router, actor = ends
    sentinel = Sentinel.start()
    assert sentinel is not None
    assert sentinel.pid is not None
    sentinel.guard(actor)
    os.kill(sentinel.pid, 9)
    wait_until(lambda: Path(f"/proc/{sentinel.pid}/stat").read_text().split()[2] == "Z", "the sentinel holds what it should")
    sentinel.guard(actor)
    assert "takes no links" in caplog.text
    actor.sendall(b"still here")
    assert router.recv(16) == b"still here"
    sentinel.stop()


def test_without_robust_mutexes_there_is_none_and_it_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert Sentinel.start() is None
    assert "no sentinel" in caplog.text


def test_links_that_a_sentinel_has_not_taken_yet_when_its_actor_dies_end_as_well(ends: tuple[socket.socket, socket.socket]) -> None:
    router, held_open = ends
    script = ACTOR.replace("sentinel.guard(link)", "import os, signal; os.kill(sentinel.pid, signal.SIGSTOP); sentinel.guard(link)")
    command = [sys.executable, "-c", script, str(held_open.fileno())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(held_open.fileno(),)) as actor:
        assert actor.stdout is not None
        sentinel_pid = int(actor.stdout.readline())
        actor.kill()
        actor.wait()
        os.kill(sentinel_pid, signal.SIGCONT)
        assert router.recv(1) == b""
