"""Speed of DPO side by side with TRL: the same pairs, the same masks, the same global batch, the same start, in turns.

    python benchmarks/dpo_speed.py --json benchmarks/results/dpo_speed.json

SmolLM2-135M, LoRA, float32, pairs of hh-rlhf (helpful and harmless conversations). In each turn every side trains from the
start on the turn's pairs, its reference included: ours takes the reference's log-probabilities before the first step; TRL
takes part twice, with the adapter off in every step, and with precompute_ref_log_probs. What counts is the median over the
turns of the ratio of their times, against the faster TRL of the turn. Losses of all steps are compared too.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from common import claim, parser, report
from sides import Side

from tunesmith.chat.preference import to_pair
from tunesmith.errors import Problem
from tunesmith.io.rows import read_rows
from tunesmith.recipe import parse_recipe
from tunesmith.runs import create_run
from tunesmith.stages.prepare import prepare

HH = Path(__file__).resolve().parents[2] / "shared" / "data" / "hh_rlhf" / "test.jsonl.gz"
SIDES = ("tunesmith", "trl", "trl_precomputed")
R = 16
RATE = 1e-4  # ten times the default, so that the losses move within a few steps

Answers = Mapping[str, Mapping[str, Any]]


@contextmanager
def sides(micro: int) -> Iterator[list[Side]]:
    """One process for each side."""
    with ExitStack() as stack:
        made = []
        for name in SIDES:
            made.append(Side(name, "dpo_side.py", ["--micro", str(micro)]))
            stack.callback(made[-1].end)
        yield made


def drawn_rows(source: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """So many usable rows, drawn by the seed."""
    usable = [row.value for row in read_rows(source) if row.value and not isinstance(to_pair(row.value, row.where), Problem)]
    return random.Random(seed).sample(usable, count)


def prepared(rows: Sequence[Mapping[str, Any]], folder: Path, batch: int, seed: int) -> Path:
    """A run over the rows, prepared; one pass over them."""
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
  lr_scheduler_type: constant, compute_dtype: float32}}
"""
    run = create_run(parse_recipe(text, "dpo_speed", folder), folder / "run")
    ledger = prepare(run)
    if ledger["rows_train"] != len(rows):
        raise RuntimeError(f"{len(rows)} rows came in and {ledger['rows_train']} are trained: {ledger['reasons']}")
    return run.path


def row_of(turn: int, pairs: int, tokens: int, answers: Answers) -> dict[str, Any]:
    """What one turn measured."""
    values = {name: {**answer, "pairs_per_second": pairs / answer["seconds"]} for name, answer in answers.items()}
    return {"turn": turn, "pairs": pairs, "tokens": tokens, "sides": values}


def ratio(row: Mapping[str, Any], *others: str) -> float:
    """How many times as many pairs a second as the faster of the others."""
    seconds = {name: side["seconds"] for name, side in row["sides"].items()}
    return float(min(seconds[name] for name in others) / seconds["tunesmith"])


def claims_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the turns of ratios within a turn, and how far losses and margins are apart."""
    claims = [
        claim("dpo_pairs_per_second_ratio", statistics.median(ratio(row, *SIDES[1:]) for row in rows), "x"),
        *(claim(f"dpo_ratio_to_{name}", statistics.median(ratio(row, name) for row in rows), "x") for name in SIDES[1:]),
    ]
    for name in SIDES:
        speeds = [row["sides"][name]["pairs_per_second"] for row in rows]
        claims.append(claim(f"dpo_pairs_per_second_{name}", statistics.median(speeds), "pairs/s"))
        peak = max(row["sides"][name]["peak_memory_bytes"] for row in rows)
        claims.append(claim(f"dpo_peak_memory_{name}", peak / 2**30, "GiB"))
    apart_by = {key: max(apart(row, key) for row in rows) for key in ("losses", "margins")}
    return [*claims, *(claim(f"dpo_largest_difference_of_{key}", value, "nats") for key, value in apart_by.items())]


def apart(row: Mapping[str, Any], key: str) -> float:
    """The largest difference of a step's figure between us and either TRL."""
    ours = row["sides"]["tunesmith"][key]
    return max(abs(a - b) for name in SIDES[1:] for a, b in zip(ours, row["sides"][name][key], strict=True))


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--pairs", type=int, default=16, help="of an optimizer step")
    options.add_argument("--steps", type=int, default=4, help="of a turn")
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--micro", type=int, default=4, help="pairs at once for TRL")
    options.add_argument("--seed", type=int, default=42)
    asked = options.parse_args()
    each, results = asked.pairs * asked.steps, []
    # The first step of a process also allocates, so a step that does not count comes before.
    rows = drawn_rows(HH, asked.pairs + asked.turns * each, asked.seed)
    with tempfile.TemporaryDirectory() as scratch, sides(asked.micro) as processes:
        for turn in range(asked.turns + 1):
            begin = 0 if turn == 0 else asked.pairs + (turn - 1) * each
            mine = rows[begin : begin + (asked.pairs if turn == 0 else each)]
            run = prepared(mine, Path(scratch) / f"turn-{turn}", asked.pairs, asked.seed)
            tokens = json.loads((run / "data" / "ledger.json").read_text(encoding="utf-8"))["tokens_train"]
            answers = {side.name: side.ask(str(run)) for side in processes}
            if turn > 0:
                results.append(row_of(turn, len(mine), tokens, answers))
                print(f"turn {turn}: " + ", ".join(f"{name} {a['seconds']:.1f} s" for name, a in answers.items()), flush=True)
    report(asked.json, claims_of(results), results)


if __name__ == "__main__":
    main()
