"""What a deployment shows while it comes up: one line that moves on a terminal, one line per change elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.status import Status

SPINNER = "dots"


class Progress:
    """Shows steps and the current state; use it as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._spinner: Status | None = None
        self._last = ""

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

    def show(self, text: str) -> None:
        """What is going on now: replaces what was shown before; repeated text is shown once."""
        if text == self._last:
            return
        self._last = text
        if self._spinner is not None:
            self._spinner.update(text)
        else:
            self.say(text)


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
