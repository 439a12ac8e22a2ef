"""report.html: one self-contained page, built from the table and the runs' own files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tunesmith.plotting import colour
from tunesmith.stages.compare import plots
from tunesmith.stages.compare.forgetting import FORGETTING_HEADERS, forgetting_cells, forgetting_verdict
from tunesmith.stages.compare.text import HEADERS, PROMISE_HEADERS, cells, percent, promise_cells, verdict


def render(
    table: Mapping[str, Any], curves: Mapping[str, Sequence[Mapping[str, Any]]], details: Sequence[Mapping[str, Any]]
) -> str:
    """The page's HTML. Everything from data or recipes is escaped; there are no scripts and no external links."""
    environment = Environment(loader=PackageLoader("tunesmith.stages.compare"), autoescape=True, undefined=StrictUndefined)
    rows = table["rows"]
    return environment.get_template("report.html.jinja").render(
        table=table,
        verdict=verdict(rows),
        headers=HEADERS,
        columns=cells(rows),
        chart_titles=("Task score", "Memory", "Time"),
        details=details,
        curves=plots.loss_curves(curves, {row["model"]: row["method"] for row in rows}),
        charts=_charts(rows),
        fields=sorted({name for row in rows for name in (row["field_accuracy"] or {})}),
        percent=percent,
        forgetting_headers=FORGETTING_HEADERS,
        forgetting=forgetting_cells(rows),
        forgetting_verdict=forgetting_verdict(rows),
        promise_headers=PROMISE_HEADERS,
        promises=[promise_cells(run["name"], run["score"]) for run in details if run["score"] is not None],
    )


def _charts(rows: Sequence[Mapping[str, Any]]) -> list[Markup]:
    def chart(key: str, title: str, scale: float, form: str) -> Markup:
        shown = [row for row in rows if row[key] is not None]
        names = [row["model"] for row in shown]
        values = [row[key] / scale for row in shown]
        shades = [colour(row["method"], number) for number, row in enumerate(shown)]
        return plots.bars(names, values, [form.format(value) for value in values], shades, title)

    return [
        chart("task_score", "task score (%)", 0.01, "{:.1f} %"),
        chart("peak_memory_bytes", "peak training memory (GiB)", 2**30, "{:.2f}"),
        chart("seconds_per_step", "seconds per optimizer step", 1, "{:.2f}"),
    ]
