"""DPO speed compared with TRL: same pairs, masks, starting weights and global batch, in turns, the peer at its best.

    python benchmarks/dpo_speed.py --json benchmarks/results/dpo_speed.json      # an hour on two cores

SmolLM2-135M, LoRA, pairs of hh-rlhf (helpful and harmless conversations). TRL's settings are searched: (adapter off in each
step, precompute_ref_log_probs) x (bfloat16, float32) x (micro-batches of 1, 2, 4, 8 pairs, up to the first size that is 1.25
times as slow as the fastest; the pairs of a step sorted by length), one step of each. Then, in each turn, every side trains
from the initial weights on the turn's pairs, including its reference. The result is the median over the turns of the ratio of
their times: each side in its fastest dtype, and both in float32. Losses and margins are compared too, and the seconds of every
turn are kept.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import claim, parser, report
from sides import Side, until_slower

from tunesmith.chat.preference import to_pair
from tunesmith.errors import Problem
from tunesmith.hardware import detect
from tunesmith.io.rows import read_rows
from tunesmith.recipe import parse_recipe
from tunesmith.runs import create_run
from tunesmith.stages.prepare import prepare

HH = Path(__file__).resolve().parents[2] / "shared" / "data" / "hh_rlhf" / "test.jsonl.gz"
TRL = ("trl", "trl_precomputed")
DTYPES = ("bfloat16", "float32")
SIZES = (1, 2, 4, 8)  # pairs per micro-batch to try
R = 16
RATE = 1e-4  # ten times the default, so that the losses move within a few steps


@dataclass(frozen=True)
class Setting:
    """One configuration: whose code, the dtype, and the pairs per micro-batch (TRL only)."""

    side: str
    dtype: str
    micro: int = 0


def drawn_rows(source: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` usable rows, drawn by the seed."""
    usable = [row.value for row in read_rows(source) if row.value and not isinstance(to_pair(row.value, row.where), Problem)]
    return random.Random(seed).sample(usable, count)


def prepared(rows: Sequence[Mapping[str, Any]], folder: Path, batch: int, seed: int, dtype: str) -> Path:
    """A prepared run of one epoch over the rows, in one dtype."""
    folder.mkdir(parents=True)
    raw = folder / "pairs.jsonl"
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = f"""\
model: smollm2-135m-instruct
objective: dpo
method: lora
seed: {seed}
data: {{train: {raw}, heldout: 0}}
lora: {{r: {R}, lora_alpha: {2 * R}}}
train: {{max_steps: {len(rows) // batch}, effective_batch_size: {batch}, learning_rate: {RATE}, warmup_ratio: 0,
  lr_scheduler_type: constant, compute_dtype: {dtype}}}
"""
    run = create_run(parse_recipe(text, "dpo_speed", folder), folder / "run")
    ledger = prepare(run)
    if ledger["rows_train"] != len(rows):
        raise RuntimeError(f"{len(rows)} rows came in and {ledger['rows_train']} are trained: {ledger['reasons']}")
    return run.path


class Sides:
    """A process for each side in use, and a prepared run for each dtype."""

    def __init__(self, stack: ExitStack, folder: Path, batch: int, seed: int) -> None:
        self._stack, self._folder, self._batch, self._seed = stack, folder, batch, seed
        self._processes: dict[Setting, Side] = {}

    def runs(self, rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Path]:
        return {dtype: prepared(rows, self._folder / f"{name}-{dtype}", self._batch, self._seed, dtype) for dtype in DTYPES}

    def ask(self, setting: Setting, runs: Mapping[str, Path]) -> dict[str, Any]:
        if setting not in self._processes:
            self._processes[setting] = Side(setting.side, "dpo_side.py", [])
            self._stack.callback(self._processes[setting].end)
        return self._processes[setting].ask(f"{setting.micro} {runs[setting.dtype]}")

    def end(self, setting: Setting) -> None:
        self._processes.pop(setting).end()


def one_step(sides: Sides, setting: Setting, runs: Mapping[str, Path]) -> dict[str, Any]:
    """The setting with the seconds of its first step; infinite, with the reason, if its process ends (out of memory)."""
    try:
        return {**asdict(setting), "seconds": sides.ask(setting, runs)["seconds"]}
    except RuntimeError as error:
        return {**asdict(setting), "seconds": math.inf, "failed": str(error)}
    finally:
        sides.end(setting)


def screened(sides: Sides, runs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Seconds of one step of TRL's settings, fastest first."""
    found = list[dict[str, Any]]()
    for side, dtype in itertools.product(TRL, DTYPES):
        tried = (one_step(sides, Setting(side, dtype, micro), runs) for micro in SIZES)
        found += until_slower(tried, operator.itemgetter("seconds"))
    return sorted((each for each in found if each["seconds"] < math.inf), key=operator.itemgetter("seconds"))


def settings_of(found: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Setting, Setting]]:
    """Our and TRL's fastest settings by claim suffix: each in its own dtype, and both in float32."""
    best = [Setting(each["side"], each["dtype"], each["micro"]) for each in found]
    single = next(each for each in best if each.dtype == "float32")
    return {"": (Setting("tunesmith", detect().compute_dtype), best[0]), "_float32": (Setting("tunesmith", "float32"), single)}


def claims_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the turns of the ratios within a turn, and the differences of losses and margins in float32."""
    claims = []
    for suffix in ("", "_float32"):
        pairs = [(row[f"ours{suffix}"], row[f"trl{suffix}"]) for row in rows]
        times = statistics.median(theirs["seconds"] / ours["seconds"] for ours, theirs in pairs)
        memory = max(ours["peak_memory_bytes"] for ours, _ in pairs) / max(theirs["peak_memory_bytes"] for _, theirs in pairs)
        claims.append(claim(f"dpo_pairs_per_second_ratio{suffix}", times, "x"))
        claims.append(claim(f"dpo_peak_memory_ratio{suffix}", memory, "x"))
    for key in ("losses", "margins"):
        apart = (abs(a - b) for row in rows for a, b in zip(row["ours_float32"][key], row["trl_float32"][key], strict=True))
        claims.append(claim(f"dpo_largest_difference_of_{key}", max(apart), "nats"))
    return claims


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--pairs", type=int, default=16, help="of an optimizer step")
    options.add_argument("--steps", type=int, default=2, help="of a turn")
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--seed", type=int, default=42)
    asked = options.parse_args()
    each, results = asked.pairs * asked.steps, []
    rows = drawn_rows(HH, asked.pairs + asked.turns * each, asked.seed)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        sides = Sides(stack, Path(scratch), asked.pairs, asked.seed)
        first = sides.runs(rows[: asked.pairs], "first")
        found = screened(sides, first)
        chosen = settings_of(found)
        for pair in chosen.values():
            for setting in pair:
                sides.ask(setting, first)  # the first step allocates
        for turn in range(asked.turns):
            begin = asked.pairs + turn * each
            runs = sides.runs(rows[begin : begin + each], f"turn-{turn}")
            row: dict[str, Any] = {"part": "turns", "turn": turn, "pairs": each}
            for suffix, (ours, theirs) in chosen.items():
                row |= {f"ours{suffix}": asdict(ours) | sides.ask(ours, runs)}
                row |= {f"trl{suffix}": asdict(theirs) | sides.ask(theirs, runs)}
            results.append(row)
            print(turn, {key: value["seconds"] for key, value in row.items() if isinstance(value, dict)}, flush=True)
    report(asked.json, claims_of(results), [{"part": "screened", "settings": found}, *results])


if __name__ == "__main__":
    main()
