"""What a section of the benchmark has found: tables for people, in the console and in Markdown, and data for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable


@dataclass(frozen=True, slots=True)
class Table:
    """One table; the first column is text, every other one is numbers. `note` says how to read it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def show(self, console: Console) -> None:
        """Print it."""
        shown = RichTable(title=self.title, caption=self.note or None, caption_justify="left")
        for number, column in enumerate(self.columns):
            shown.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            shown.add_row(*row)
        console.print(shown)

    def markdown(self) -> list[str]:
        """Its lines, with a blank one before and after."""
        lines = ["", f"**{self.title}**", "", _line(self.columns), _line(["---", *["---:"] * (len(self.columns) - 1)])]
        lines += [_line(row) for row in self.rows]
        return [*lines, *(["", self.note] if self.note else []), ""]


@dataclass(slots=True)
class Section:
    """One section's tables, and the figures behind them as JSON."""

    tables: list[Table] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def show(self, console: Console) -> None:
        """Print every table."""
        for table in self.tables:
            table.show(console)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
