"""What the commands print: tables and values to standard output, errors and progress to standard error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.errors import Problem
from tunesmith.io.terminal import make_console, plain


def show_table(table: dict[str, Any], folder: Path) -> None:
    """Print a comparison and its verdict, and the forgetting table if forgetting was measured."""
    from tunesmith.stages.compare import (
        FORGETTING_HEADERS,
        HEADERS,
        cells,
        forgetting_cells,
        forgetting_verdict,
        verdict,
    )

    console = make_console()
    print_table(console, HEADERS, cells(table["rows"]))
    console.print(Text(verdict(table["rows"])))
    if forgetting := forgetting_cells(table["rows"]):
        print_table(console, FORGETTING_HEADERS, forgetting)
        console.print(Text(forgetting_verdict(table["rows"]) or ""))
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)


def print_table(console: Console, headers: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table between blank lines, with the first column left-aligned and the others right-aligned."""
    shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for number, header in enumerate(headers):
        shown.add_column(header, justify="left" if number == 0 else "right", no_wrap=True)
    for line in lines:
        shown.add_row(*line)
    console.print()
    console.print(shown)
    console.print()


def print_facts(values: dict[str, Any], *names: str) -> None:
    """Print the named values, one per line, as `name value`."""
    for name in names:
        value = values[name]
        print(plain(f"{name:>22}  {f'{value:.4g}' if isinstance(value, float) else value}"))


def stderr() -> Console:
    """A console on standard error, for progress; results go to standard output."""
    return make_console(stderr=True)


def show_problems(problems: Sequence[Problem]) -> None:
    """Print problems to standard error: what and where first, then why it matters and how to fix it."""
    console = stderr()
    for problem in problems:
        console.print(Text.assemble((f"error {problem.code} {problem.name}", "bold red"), f"  {problem.where}"), soft_wrap=True)
        for label, text in (("", problem.what), ("why  ", problem.why), ("fix  ", problem.fix)):
            console.print(Text.assemble("  ", (label, "bold"), text), soft_wrap=True)
