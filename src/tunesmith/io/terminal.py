"""Terminal output: control characters in untrusted text are replaced, and text is never parsed as markup."""

from __future__ import annotations

import re

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.measure import Measurement
from rich.segment import Segment

#: C0 except tab and line feed, delete, C1; direction controls; line ends that only some programs recognise; tags.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\U000e0000-\U000e007f]")


def plain(text: str) -> str:
    """Untrusted text with each control character replaced by U+FFFD."""
    return _CONTROL.sub("\ufffd", text)


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console on standard output or error that prints text literally."""
    console = Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)
    console.push_render_hook(_Cleaning())
    return console


class _Cleaning(RenderHook):
    """Cleans everything printed, including tables. Progress bars are not cleaned: their text is tunesmith's own."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Cleaned(each) for each in renderables]


class _Cleaned:
    """A renderable whose text is cleaned; control segments of the console itself pass through."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._inner, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._inner)
