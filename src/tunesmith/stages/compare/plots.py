"""The report's pictures, as SVG text with no outside reference: loss curves and bars."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

#: One colour for each method, distinct for colour-blind readers too (Okabe and Ito 2008).
COLOURS = {"base": "#8a8f98", "full": "#d55e00", "lora": "#0072b2", "qlora": "#009e73"}
_FALLBACK = ("#cc79a7", "#56b4e9", "#e69f00", "#f0e442")


def colour(name: str, number: int) -> str:
    """The colour of a model, by its method's name, else by its place."""
    return COLOURS.get(name, _FALLBACK[number % len(_FALLBACK)])


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # A fixed salt and no date make the same numbers give the same bytes.
    mpl.rcParams.update({"svg.hashsalt": "tunesmith", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11})
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    # Without the XML declaration, as it goes into a page; matplotlib has escaped the texts in it.
    return Markup(text[text.index("<svg") :])  # noqa: S704


def loss_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], methods: Mapping[str, str]) -> Markup:
    """Training loss (nats a labelled token) by optimizer step, one line for each run."""
    figure, axes = _figure(6.2, 3.2)
    for number, (name, steps) in enumerate(curves.items()):
        shade = colour(methods[name], number)
        axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], label=name, color=shade, linewidth=1.6)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss (nats a token)")
    axes.set_yscale("log")
    axes.grid(axis="y", which="both", alpha=0.2)
    axes.legend(frameon=False)
    return _svg(figure)


def bars(names: Sequence[str], values: Sequence[float], labels: Sequence[str], shades: Sequence[str], title: str) -> Markup:
    """Horizontal bars, the first on top, each with its value written beside it."""
    figure, axes = _figure(6.2, 0.6 + 0.44 * len(names))
    drawn = axes.barh(range(len(names)), values, color=list(shades), height=0.62)
    axes.bar_label(drawn, labels=list(labels), padding=4)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, max([*values, 1e-9]) * 1.18)
    axes.set_xlabel(title)
    axes.tick_params(axis="y", length=0)
    return _svg(figure)
