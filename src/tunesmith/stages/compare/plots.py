"""The report's plots: loss curves and bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tunesmith.plotting import colour, figure, logarithmic, svg


def loss_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], methods: Mapping[str, str]) -> Markup:
    """Training loss (nats per labelled token) by optimizer step, one line per run."""
    made, axes = figure(6.2, 3.2)
    for number, (name, steps) in enumerate(curves.items()):
        shade = colour(methods[name], number)
        axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], label=name, color=shade, linewidth=1.6)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_yscale("log")
    logarithmic(axes.yaxis)
    axes.grid(axis="y", which="both", alpha=0.2)
    axes.legend(frameon=False)
    return svg(made)


def bars(names: Sequence[str], values: Sequence[float], labels: Sequence[str], shades: Sequence[str], title: str) -> Markup:
    """Horizontal bars, the first on top, each labelled with its value."""
    made, axes = figure(6.2, 0.6 + 0.44 * len(names))
    drawn = axes.barh(range(len(names)), values, color=list(shades), height=0.62)
    axes.bar_label(drawn, labels=list(labels), padding=4)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, max([*values, 1e-9]) * 1.18)
    axes.set_xlabel(title)
    axes.tick_params(axis="y", length=0)
    return svg(made)
