"""`moelastic chaos …`: the whole command lives in `chaos.cli`, which is loaded only when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence


def run_chaos(options: Sequence[str]) -> None:
    """Run it with these options; it ends by typer.Exit's code, as any command does."""
    from chaos.cli import app

    app(args=list(options), prog_name="moelastic chaos")
