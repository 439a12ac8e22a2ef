"""Self-contained SVG figures in one style; matplotlib is imported when the first figure is drawn."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from markupsafe import Markup

#: One colour per method, distinguishable for colour-blind readers (Okabe and Ito 2008).
COLOURS = {"base": "#8a8f98", "full": "#d55e00", "lora": "#0072b2", "qlora": "#009e73"}
_FALLBACK = ("#cc79a7", "#56b4e9", "#e69f00", "#f0e442")


def colour(name: str, number: int) -> str:
    """The colour of a model, by method name, else by its position."""
    return COLOURS.get(name, _FALLBACK[number % len(_FALLBACK)])


def figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of this size in inches, with one pair of axes."""
    with contextlib.chdir(Path(__file__).parent):  # matplotlib reads a matplotlibrc of the working folder
        import matplotlib as mpl
    from matplotlib.figure import Figure

    # A fixed salt and no date make the output deterministic: same numbers, same bytes.
    mpl.rcParams.update({"svg.hashsalt": "tunesmith", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11})
    mpl.rcParams["text.parse_math"] = False  # a run's name may have a $ in it
    made = Figure(figsize=(width, height), layout="constrained")
    axes = made.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return made, axes


def logarithmic(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers, since `figure` turns formulas off."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, value: float, pos: int | None = None) -> str:
            return f"{value:g}" if super().__call__(value, pos) else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain(labelOnlyBase=False))


def svg(made: Any) -> Markup:
    """The figure's SVG element."""
    buffer = io.StringIO()
    made.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    # Without the XML declaration, because it is embedded in a page; matplotlib has escaped its texts.
    return Markup(text[text.index("<svg") :])  # noqa: S704
