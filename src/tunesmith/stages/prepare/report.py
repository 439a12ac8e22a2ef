"""report.html: what happened to the rows, as one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tunesmith.recipe import Recipe
from tunesmith.stages.prepare.files import ShownRow

_ROWS = 5  # shown with their labelled spans
_CHARACTERS = 4000  # shown per side


def render(
    recipe: Recipe, ledger: Mapping[str, Any], rows: Sequence[ShownRow], tokenizer: Any, probed: Mapping[str, Any]
) -> str:
    """The page's HTML. Everything from data or recipes is escaped; there are no scripts and no external links."""
    environment = Environment(loader=PackageLoader("tunesmith.stages.prepare"), autoescape=True, undefined=StrictUndefined)
    environment.filters["n"] = "{:,}".format
    total = max(1, ledger["rows_in"] + ledger["rows_added"])
    return environment.get_template("report.html.jinja").render(
        recipe=recipe,
        ledger=ledger,
        total=total,
        classes=sorted(ledger.get("balance", {}).items(), key=lambda pair: (-pair[1]["before"], pair[0])),
        reasons=_bars(ledger["reasons"]),
        lengths=_bars(ledger["lengths"]["histogram"]),
        findings=[
            (rule, action, count)
            for rule, actions in sorted(ledger["findings"].items(), key=lambda pair: -sum(pair[1].values()))
            for action, count in actions.items()
        ],
        rows=[_shown(row, tokenizer) for row in rows[:_ROWS]],
        probed=probed,
        share=lambda count: f"{100 * count / total:.1f} %",
    )


def _bars(counts: Mapping[str, int]) -> list[tuple[str, int, float]]:
    """Name, count, and bar width in percent of the longest."""
    longest = max(counts.values(), default=0) or 1
    return [(name, count, round(100 * count / longest, 1)) for name, count in counts.items()]


def _shown(row: ShownRow, tokenizer: Any) -> dict[str, Any]:
    names = ("chosen", "rejected") if len(row.sides) > 1 else ("",)
    sides = []
    for name, side in zip(names, row.sides, strict=True):
        parts, left = [], _CHARACTERS
        for text, labelled in side.spans(tokenizer):
            parts.append((text[:left], labelled))
            left -= len(text)
            if left <= 0:
                parts.append((" [shortened]", False))
                break
        sides.append({"name": name, "parts": parts, "labelled": sum(side.loss_mask), "tokens": len(side.loss_mask)})
    return {"where": row.where, "sides": sides}
