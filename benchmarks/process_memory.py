"""Planned against measured memory of a CPU process, as a report shows them, without any calibration.

    python benchmarks/process_memory.py --json benchmarks/results/process_memory.json      # an hour on two cores

Thirty steps of each method (ten of the largest model) with micro-batches of one and sixteen rows, on the built-in model and on
random models of the same architecture with 20 and 360 million parameters, each in its own process. Resident memory grows over
the first steps, because malloc keeps freed memory that does not fit the next request.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import claim, parser, report
from transformers import LlamaConfig, LlamaForCausalLM

import tunesmith
from tunesmith.demo import write_input
from tunesmith.hardware.catalogue import read_gpus, this_device
from tunesmith.io.atomic import read_json
from tunesmith.models import builtin
from tunesmith.models.builtin import NAME
from tunesmith.models.load import load_tokenizer
from tunesmith.pipeline import with_method
from tunesmith.planner.datafacts import prepared_facts
from tunesmith.planner.plan import METHODS, plan_for
from tunesmith.recipe import Method, load_recipe

#: Shapes of the random models, by name.
SHAPES: Mapping[str, dict[str, int]] = {
    "random-20m": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "random-360m": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
}


#: Steps of the largest model, and of the others.
STEPS = {"random-360m": 10}
MOST_STEPS = 30


def model_folder(name: str, folder: Path) -> str:
    """The built-in model's name, or the folder of a random bfloat16 model with the same tokenizer."""
    if name == NAME:
        return NAME
    tokenizer = load_tokenizer(builtin.ensure())
    config = LlamaConfig(vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=2048, **SHAPES[name])
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return str(folder / name)


def measured(model: str, name: str, method: Method, rows: int, folder: Path) -> dict[str, Any]:
    """Planned and measured bytes of a training."""
    overrides = [
        f"model={model}",
        f"train.max_steps={STEPS.get(name, MOST_STEPS)}",
        "lora.r=16",
        f"train.per_device_train_batch_size={rows}",
    ]
    overrides += [f"train.effective_batch_size={rows}"]
    resolved = with_method(load_recipe(write_input(folder / "input", test_rows=4), overrides), method)
    run = tunesmith.create_run(resolved, folder / f"{name}-{method}-{rows}")
    tunesmith.prepare(run)
    facts, gpus = prepared_facts(run.path / "data"), read_gpus()
    made = plan_for(resolved.recipe, facts, this_device(gpus), gpus, methods=[method], free=False, entries=[])
    command = [sys.executable, "-P", "-m", "tunesmith", "train", str(run.path)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "TUNESMITH_CALIBRATION": os.devnull})
    promised = made.options[method].peak_memory_bytes
    used = read_json(run.path / "train" / "summary.json")["peak_memory_bytes"]
    row = {
        "part": "process-memory",
        "model": name,
        "method": method,
        "rows_at_once": rows,
        "breakdown": made.options[method].memory.breakdown,
        "promised_bytes": promised,
        "measured_bytes": used,
        "safe_bytes": made.options[method].safe_memory_bytes,
        "error_percent": 100 * (promised / used - 1),
    }
    print({key: value for key, value in row.items() if key != "breakdown"}, flush=True)
    return row


def main() -> None:
    """Measure all, and claim the extremes over the built-in model and the larger random one."""
    options = parser(__doc__ or "")
    asked = options.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in (NAME, *SHAPES):
            model = model_folder(name, Path(scratch))
            for size, method in itertools.product((1, 16), METHODS):
                rows.append(measured(model, name, method, size, Path(scratch)))
    errors = [row["error_percent"] for row in rows if row["model"] != "random-20m"]
    claims = [
        claim("process_memory_most_over_percent", max(errors), "%"),
        claim("process_memory_most_under_percent", max(0.0, -min(errors)), "%"),
        claim("process_memory_over_the_bound", float(sum(row["measured_bytes"] > row["safe_bytes"] for row in rows)), "runs"),
    ]
    report(asked.json, claims, rows)


if __name__ == "__main__":
    main()
