"""The review in a terminal: show a row, read one key, show the next row. Without a terminal, keys come from standard input."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from tunesmith.io.terminal import plain
from tunesmith.stages.review.stage import Review, Shown

_HELP = "[a]ccept  [r]eject  [e]dit  [b]ack  [q]uit, resume later"


def review(session: Review, by: str, console: Console, keys: TextIO = sys.stdin) -> dict[str, Any] | None:
    """Go through the undecided rows and sign off at the end; None if the reviewer quits before that."""
    done: list[str] = []
    with _single_keys(keys):
        while left := session.open_places():
            shown = session.show(left[0])
            _print(shown, console, f"{len(session.places) - len(left) + 1} of {len(session.places)}")
            key = _key(keys)
            if key in ("q", ""):
                console.print(f"{len(left)} rows are left; run `tunesmith review` again to resume here")
                return None
            if key == "b" and done:
                session.undo(done.pop())
            elif _decided(session, shown, key, by, console, keys):
                done.append(shown.where)
    signed = session.sign(by)
    console.print(
        f"signed off by {by}: {signed['accepted']} accepted, {signed['rejected']} rejected, {signed['edited']} edited"
    )
    if signed["rejected"] or signed["edited"]:
        console.print(f"run `tunesmith prepare` again to apply the rejections and edits in {session.run.recipe.data.review}")
    return signed


def _decided(session: Review, shown: Shown, key: str, by: str, console: Console, keys: TextIO) -> bool:
    if key == "a":
        session.decide(shown.where, "accept", by)
    elif key == "r":
        session.decide(shown.where, "reject", by)
    elif key == "e" and (value := _edited(shown.value, keys, console)) is not None:
        session.decide(shown.where, "edit", by, value)
    else:
        if key != "e":
            console.print(_HELP)
        return False
    return True


def _print(shown: Shown, console: Console, counter: str) -> None:
    console.rule(Text(f"{counter}  {shown.where}"))
    for finding in shown.findings:
        console.print(Text(plain(finding), style="yellow"))
    for side in shown.sides:
        text = Text()
        for part, labelled in side:
            # Brackets as well as colour, so that the spans stay visible in a pipe and to a reader who cannot see green.
            text.append(f"\u27e6{plain(part)}\u27e7" if labelled else plain(part), "bold green" if labelled else "dim")
        console.print(text, soft_wrap=True)
    console.print(_HELP, style="cyan")


@contextlib.contextmanager
def _single_keys(keys: TextIO) -> Iterator[None]:
    """Keys are read without waiting for return, where the terminal supports it (not on Windows)."""
    try:
        import termios
        import tty

        before = termios.tcgetattr(keys.fileno())
    except (ImportError, OSError, termios.error):
        yield
        return
    try:
        tty.setcbreak(keys.fileno())
        yield
    finally:
        termios.tcsetattr(keys.fileno(), termios.TCSADRAIN, before)


def _key(keys: TextIO) -> str:
    """The next key that is not whitespace; empty at the end of the input."""
    while (key := keys.read(1)).isspace():
        pass
    return key.lower()


def _edited(value: Mapping[str, Any], keys: TextIO, console: Console) -> dict[str, Any] | None:
    """The row from the editor, or without a terminal from the rest of the line; None, with a message, if not a JSON object."""
    if keys.isatty():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "row.json"
            path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
            editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
            subprocess.run([*editor.split(), str(path)], check=False)
            text = path.read_text(encoding="utf-8")
    else:
        text = keys.readline()
    try:
        edited = json.loads(text)
    except ValueError as error:
        console.print(f"not valid JSON, nothing was changed: {error}", style="red")
        return None
    if not isinstance(edited, dict):
        console.print("a row must be a JSON object, nothing was changed", style="red")
        return None
    return edited
