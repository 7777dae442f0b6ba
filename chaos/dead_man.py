"""A dead man's switch: a small process that resumes what we stopped, should this one end without doing so, by SIGKILL too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil

from chaos.core.targets import Process

SAME_START_S = 0.05
END_LIMIT_S = 5.0


class DeadMan:
    """Our end of it; the process is started when there is something to guard."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def guard(self, process: Process) -> None:
        """Have it resumed when this process ends, whatever ends it."""
        if self._process is None:
            command = [sys.executable, "-m", "chaos.dead_man"]
            # A session of its own: what ends us through the terminal must not end it first.
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)  # noqa: S603  # our own command line
        if self._process.stdin is not None:
            self._process.stdin.write(f"{process.pid} {process.start_s!r}\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """Nothing is to be guarded any more: it resumes everything once more, and ends."""
        if self._process is not None:
            self._process.communicate(timeout=END_LIMIT_S)
            self._process = None


def resume(pid: int, start_s: float) -> None:
    """SIGCONT exactly this process, if it still runs."""
    try:
        if abs(psutil.Process(pid).create_time() - start_s) <= SAME_START_S:
            os.kill(pid, signal.SIGCONT)
    except (psutil.Error, ProcessLookupError):
        return


def main() -> None:
    """Remember what stdin names; once it ends, resume it all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    guarded = [line.split() for line in sys.stdin]
    for pid, start_s in guarded:
        resume(int(pid), float(start_s))


if __name__ == "__main__":
    main()
