"""What the kernel is asked for: it holds for the thread that asked and for those it starts, and asking where it is unknown does no harm."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from cluster import scheduling
from cluster.scheduling import SHORT_SLICE_NS, ask_for_slices, come_forward, give_way, go_before_others, may_come_forward

LINUX = sys.platform == "linux"


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What the work gives in a thread of its own: nothing that is asked for here may outlast a test."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def slice_ns() -> int:
    """The calling thread's slice, from the kernel."""
    buffer = ctypes.create_string_buffer(scheduling._ATTR.size)
    number = scheduling._CALLS[platform.machine()][1]
    assert ctypes.CDLL(None).syscall(number, 0, buffer, len(buffer), 0) == 0
    return int(scheduling._ATTR.unpack(buffer.raw)[5])


def test_a_short_slice_holds_for_the_thread_and_those_that_it_starts_and_for_nobody_else() -> None:
    own_ns = 3 * SHORT_SLICE_NS  # that nobody else asks for

    def ask() -> tuple[bool, int, int]:
        return ask_for_slices(own_ns), slice_ns(), in_a_thread(slice_ns)

    if not in_a_thread(lambda: ask_for_slices(own_ns)):
        pytest.skip("this kernel knows of no slices (Linux 6.12 does)")
    before_ns = slice_ns()
    assert in_a_thread(ask) == (True, own_ns, own_ns)
    assert slice_ns() == before_ns != own_ns


@pytest.mark.parametrize(("machine", "release"), [("riscv64", "6.18.0"), ("x86_64", "6.8.0-45-generic"), ("x86_64", "5")])
def test_where_it_is_unknown_nothing_is_asked(machine: str, release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "", release, "", machine)))
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: pytest.fail("a system call was made"))
    assert not ask_for_slices(SHORT_SLICE_NS)


@pytest.mark.skipif(not LINUX, reason="threads have a priority of their own on Linux only")
def test_who_gives_way_does_so_alone_and_never_comes_back() -> None:
    def twice() -> list[int]:
        own = threading.get_native_id()
        found = []
        for niceness in (7, 3):
            give_way(niceness)
            found.append(os.getpriority(os.PRIO_PROCESS, own))
        return found

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    wanted = max(7, before)
    assert in_a_thread(twice) == [wanted, wanted]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


# Another thread and its main one at two priorities; then what it was told to come forward to, and where both are.
CHILD = """
import os, sys, threading
from cluster.scheduling import come_forward, give_way
give_way(9)
done = threading.Event()
other = threading.Thread(target=lambda: (give_way(12), ready.set(), done.wait()))
ready = threading.Event()
other.start()
ready.wait()
if sys.argv[1] == "itself":
    come_forward(4)
else:
    print("up", flush=True)
    sys.stdin.readline()
print(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), os.getpriority(os.PRIO_PROCESS, other.native_id))
done.set()
"""


@pytest.mark.skipif(not LINUX or not may_come_forward(4), reason="this user may not raise a priority (root may)")
@pytest.mark.parametrize("who", ["itself", "another"])
def test_who_comes_forward_does_so_with_every_thread(who: str) -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD, who], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        if who == "another":
            assert child.stdout.readline() == "up\n"
            assert come_forward(4, child.pid)
            child.stdin.write("\n")
            child.stdin.flush()
        assert child.stdout.readline() == "4 4\n"


@pytest.mark.skipif(not LINUX or not may_come_forward(-1), reason="this user may not raise a priority (root may)")
def test_who_goes_before_others_does_so_alone_and_with_those_that_it_starts() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = priority()
    assert in_a_thread(lambda: (go_before_others(before - 1), priority(), in_a_thread(priority))) == (True, before - 1, before - 1)
    assert priority() == before


def test_whoever_is_there_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "setpriority", lambda *_: pytest.fail("a priority was changed"))
    assert in_a_thread(lambda: come_forward(19)) is LINUX


@pytest.mark.skipif(not LINUX, reason="threads have a priority of their own on Linux only")
def test_where_the_system_refuses_it_is_known_beforehand_and_nothing_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    lower = os.setpriority

    def only_lower(which: int, who: int, niceness: int) -> None:
        if niceness < os.getpriority(which, who):
            raise PermissionError
        lower(which, who, niceness)

    monkeypatch.setattr(os, "setpriority", only_lower)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert not may_come_forward(own)
    assert os.getpriority(os.PRIO_PROCESS, 0) == own
    assert not in_a_thread(lambda: (give_way(own + 1), come_forward(own))[1])


def test_a_process_that_is_gone_does_not_come_forward() -> None:
    assert not come_forward(0, 2**22 + 1)
