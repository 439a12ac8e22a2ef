"""The plan as text for people, within 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from tunesmith.hardware.catalogue import GIB
from tunesmith.planner.options import Option
from tunesmith.planner.result import Plan

WIDTH = 80
HEADERS = ("method", "fits", "GiB", "at most", "at least", "s/step", "steps", "hours", "dollars", "tok/s")
_BAR = 34


def amount(value: float) -> str:
    """Three significant digits, in as few characters as possible."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.1g}"


def money(value: float) -> str:
    """Dollars and cents; a positive amount below one cent is `<0.01`."""
    return "0" if value == 0 else "<0.01" if value < 0.01 else f"{value:,.2f}"


def heading(plan: Plan) -> list[str]:
    """The inputs of the plan: the model, the device, the data."""
    a, device = plan.architecture, plan.device
    several = f"{device.count} x " if device.count > 1 else ""
    lines = [
        f"{plan.model}: {a.parameters / 1e9:.2f} B parameters ({a.model_type}), {2 * a.parameters / GIB:.1f} GiB in 16 bits",
        f"{several}{device.name}, {device.memory_bytes / GIB:.1f} GiB, matmuls in {device.compute_dtype}",
    ]
    if device.note:
        lines += textwrap.wrap(device.note, WIDTH, initial_indent="  ", subsequent_indent="  ")
    facts = plan.facts.as_dict()
    rows = "rows" if facts["sequences_per_row"] == 1 else "pairs, each side"
    lines.append(
        f"{facts['rows']:,} {rows} of {facts['mean_tokens']:.0f} tokens, the longest {facts['longest_tokens']:,} "
        f"({facts['counted']})"
    )
    return lines


def cells(plan: Plan) -> list[list[str]]:
    """The table, one row per method, with columns as in HEADERS."""
    return [
        [
            option.method,
            "yes" if option.fits else "no",
            f"{option.peak_memory_bytes / GIB:.1f}",
            f"{option.safe_memory_bytes / GIB:.1f}",
            f"{option.least_memory_bytes / GIB:.1f}",
            amount(option.seconds_per_step),
            f"{option.steps:,}",
            amount(option.hours),
            money(option.cost),
            amount(option.tokens_per_second),
        ]
        for option in plan.options.values()
    ]


def bars(plan: Plan) -> Iterator[str]:
    """A memory bar for each method, with a mark at the device's memory."""
    limit = plan.device.memory_bytes
    scale = max([limit, *(option.safe_memory_bytes for option in plan.options.values())])
    mark = min(_BAR - 1, round(_BAR * limit / scale))
    for option in plan.options.values():
        filled = max(1, round(_BAR * option.peak_memory_bytes / scale))
        bar = list("█" * filled + " " * (_BAR - filled))
        if bar[mark] == " ":
            bar[mark] = "│"
        yield f"{option.method:>6} {''.join(bar)} {parts(option)}"


def parts(option: Option) -> str:
    """The two largest parts of an option's memory."""
    largest = sorted(option.memory.breakdown.items(), key=lambda item: -item[1])[:2]
    return ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in largest)


def settings_line(option: Option) -> str:
    """The settings that define an option."""
    chosen = option.settings
    words = [f"{chosen.per_device_train_batch_size} x {chosen.gradient_accumulation_steps} rows per step"]
    if option.lever.gradient_checkpointing:
        kept = " except attention" if option.lever.gradient_checkpointing == "keep_attention" else ""
        words.append(f"checkpointing{kept}")
    if option.method == "full":
        words.append(option.lever.optim + (" in backward" if option.lever.optimizer_in_backward else ""))
    else:
        words.append(f"r {chosen.r}")
    return f"{option.method:>6}  {', '.join(words)}, lr {chosen.learning_rate:g}"


def verdict(plan: Plan) -> list[str]:
    """The recommendation, the rules behind it, and what would change it, wrapped."""
    lines = []
    if plan.recommended is not None:
        lines.append(f"recommended: {plan.recommended}")
    for reason in plan.reasons:
        lines += _wrapped(f"{reason.rule} ({reason.source}): {reason.text}")
    if plan.change:
        lines.append("what would change the answer:")
        for change in plan.change:
            lines += _wrapped(change)
    return lines


def confidence(plan: Plan) -> list[str]:
    """How reliable the times are."""
    known = min(option.time_measurements for option in plan.options.values())
    if known:
        return [f"times are based on {known} or more measurements of this device"]
    text = "times come from a roofline model, not from measurements: allow for 1.5 times that; --calibrate measures the device"
    return textwrap.wrap(text, WIDTH)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)
