"""`python -m chaos.busy`: burns one core until its standard input ends: the busy neighbour of a control run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

END_LIMIT_S = 5.0


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many of them, for the length of a block; they end with this process too."""
    command = [sys.executable, "-m", "chaos.busy"]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) for _ in range(count)]  # noqa: S603  # our own command line
    try:
        yield
    finally:
        for process in running:
            process.communicate(timeout=END_LIMIT_S)


def main() -> None:
    """Count, until nobody holds the other end of stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    number = 0
    while number >= 0:
        number += 1


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
