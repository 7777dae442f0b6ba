"""`moelastic trace last`: the last request as a waterfall."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from cluster.core.errors import NotFound

WIDTH = 240


def show_last(trace_dir: Path, *, console: Console | None = None) -> None:
    """Print the newest trace of a folder. Raises NotFound, naming the setting to change, when there is none."""
    from cluster.telemetry.trace_files import last_trace, read_spans
    from cluster.telemetry.trace_view import waterfall

    spans = last_trace(read_spans(trace_dir)) if trace_dir.is_dir() else []
    if not spans:
        message = (
            f"{trace_dir}: no trace here yet; requests are sampled at `telemetry.sampling_ratio` (1 % by default): raise it and deploy with --replace, "
            "or send more requests"
        )
        raise NotFound(message, resource="trace", name=str(trace_dir))
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(waterfall(spans))
