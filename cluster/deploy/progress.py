"""What a deployment shows while it comes up: one line that moves on a terminal, a line per phase and every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console
from rich.status import Status

SPINNER = "dots"
MIN_PAUSE_S: Final = 5.0


class Progress:
    """Shows steps and the current state; use it as a context manager. `clock` is monotonic, in seconds."""

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._spinner: Status | None = None
        self._clock = clock
        self._said, self._phase, self._said_s = "", "", 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._spinner = self._console.status("", spinner=SPINNER)
            self._spinner.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._spinner is not None:
            self._spinner.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False)

    def show(self, text: str, *, phase: str = "") -> None:
        """What is going on now: replaces what was shown before; repeated text is shown once.

        Off a terminal a new text of the same `phase` (by default each is a phase of its own) waits until MIN_PAUSE_S after the last line.
        """
        if text == self._said:
            return
        now_s, phase = self._clock(), phase or text
        if self._spinner is None and phase == self._phase and now_s - self._said_s < MIN_PAUSE_S:
            return
        self._said, self._phase, self._said_s = text, phase, now_s
        if self._spinner is not None:
            self._spinner.update(text)
        else:
            self.say(text)


def phase_of(status: dict[str, Any]) -> str:
    """What a cluster status waits for, coarsely: the models, their copies or routers. Single actors and copies that come up change nothing of it."""
    if status["num_copies_wanted"] == 0:
        waits_for = "models"
    elif status["num_copies_ready"] < status["num_copies_wanted"]:
        waits_for = "copies"
    else:
        waits_for = "" if any(router["state"] == "ready" for router in status["routers"]) else "routers"
    return f"{status['state']} {waits_for}"


def state_line(status: dict[str, Any]) -> str:
    """A cluster status (the fields of GetClusterStatusResponse) in one line."""
    actors = [actor["state"] for actor in status["actors"]]
    parts = [
        f"{status['state']:<9}",
        f"actors {sum(state == 'ready' for state in actors)}/{len(actors)}",
        f"copies {status['num_copies_ready']}/{status['num_copies_wanted']}",
        f"routers {sum(router['state'] == 'ready' for router in status['routers'])}/{len(status['routers'])}",
    ]
    parts += [f"{entry['model']}: {entry['num_done']}/{entry['num_wanted']} tensors verified" for entry in status.get("imports", ())]
    if status["message"] and status["state"] != "SERVING":
        parts.append(status["message"])
    return "   ".join(parts)
