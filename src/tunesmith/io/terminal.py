"""What is printed: foreign text without what would drive the terminal, and never read as markup."""

from __future__ import annotations

import re

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.measure import Measurement
from rich.segment import Segment

#: C0 but for tab and line feed, delete, C1; what turns the direction of text; line ends that only some see; tags.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\U000e0000-\U000e007f]")


def plain(text: str) -> str:
    """Foreign text with each control character replaced by U+FFFD."""
    return _CONTROL.sub("\ufffd", text)


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console of standard output or error on which text is only text."""
    console = Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)
    console.push_render_hook(_Cleaning())
    return console


class _Cleaning(RenderHook):
    """Cleans whatever is printed, in tables too (not what a progress bar draws: its texts are our own)."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Cleaned(each) for each in renderables]


class _Cleaned:
    """A renderable whose text is cleaned; what the console itself says to the terminal passes."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._inner, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._inner)
