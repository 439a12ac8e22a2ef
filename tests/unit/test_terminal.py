"""Untrusted text on a terminal: cleaned by one function wherever it appears, and never parsed as markup."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

import tunesmith
from tunesmith.cli.render import show_problems
from tunesmith.errors import Problem
from tunesmith.io.terminal import make_console, plain

ROOT = Path(tunesmith.__file__).parent
FOREIGN = "a\x1b]0;owned\x07b\x1b[2Jc\x9bd\u202ee\u2066f\U000e0041g\rh[/foo] [red]:smile: i"
CLEAN = "a\ufffd]0;owned\ufffdb\ufffd[2Jc\ufffdd\ufffde\ufffdf\ufffdg\ufffdh[/foo] [red]:smile: i"


def test_control_characters_are_replaced_one_by_one() -> None:
    assert plain(FOREIGN) == CLEAN
    assert plain("a\tb\nc é 漢 👍") == "a\tb\nc é 漢 👍"


def test_whatever_is_printed_is_cleaned(capsys: pytest.CaptureFixture[str]) -> None:
    console = make_console(stderr=True)
    table = Table(FOREIGN, box=None)
    table.add_row(FOREIGN)
    for each in (FOREIGN, Text(FOREIGN), table):
        console.print(each, soft_wrap=True)
    show_problems([Problem("TS201", FOREIGN, FOREIGN, FOREIGN, FOREIGN)])
    printed = capsys.readouterr().err
    # Rich drops some control characters itself; the rest must match what `plain` leaves.
    assert plain(printed) == printed
    assert printed.count("[/foo] [red]:smile: i") == 8


def test_all_consoles_are_made_in_one_place() -> None:
    made = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Console"
    }
    assert made == {"io/terminal.py"}
