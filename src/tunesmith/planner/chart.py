"""The frontier: memory, time and expected quality of the methods, as SVG."""

from __future__ import annotations

from tunesmith.hardware.catalogue import GIB
from tunesmith.planner.decide import EXPECTED_QUALITY
from tunesmith.planner.result import Plan
from tunesmith.plotting import colour, figure, svg

_NAMES = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}


def frontier(plan: Plan) -> str:
    """Memory over hours: one point per method, filled if it fits, with the device's memory as a line."""
    made, axes = figure(6.2, 4.2)
    limit = plan.device.memory_bytes / GIB
    highest = limit
    for number, option in enumerate(plan.options.values()):
        shade = colour(option.method, number)
        memory, top = option.peak_memory_bytes / GIB, option.safe_memory_bytes / GIB
        highest = max(highest, top)
        axes.plot([option.hours] * 2, [memory, top], color=shade, linewidth=2)
        quality = (
            f"{_NAMES[option.method]}: {memory:.1f} GiB, about {100 * EXPECTED_QUALITY[option.method]:.0f} % of full's score"
        )
        label = quality + ("" if option.fits else ", does not fit")
        style = "full" if option.fits else "none"
        axes.plot([option.hours], [memory], "o", color=shade, markersize=11, fillstyle=style, label=label)
    axes.axhline(limit, color="#8a8f98", linewidth=1, linestyle="--")
    axes.annotate(
        f"{plan.device.name}: {limit:.0f} GiB", (1, limit), xycoords=("axes fraction", "data"), ha="right", va="bottom"
    )
    hours = max(option.hours for option in plan.options.values())
    axes.set_xlim(0, 1.15 * max(hours, 1e-6))
    axes.set_ylim(0, 1.15 * highest)
    made.legend(loc="outside lower center", frameon=False, ncols=1)
    axes.set_xlabel("hours of training")
    axes.set_ylabel("peak memory (GiB)")
    return svg(made)
