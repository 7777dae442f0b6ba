"""What the kernel is asked for: it holds for the thread that asked and for those it starts, and asking where it is unknown does no harm."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from cluster import scheduling
from cluster.scheduling import SHORT_SLICE_NS, ask_for_slices, give_way

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
