"""Exports a reward model: base, adapter and head as one float32 folder for sequence classification, verified after writing."""

from __future__ import annotations

from pathlib import Path

from datasets import concatenate_datasets

from tunesmith.errors import ExportError, Problem
from tunesmith.inference.rewards import rewards_of
from tunesmith.io.atomic import write_json
from tunesmith.methods import Method
from tunesmith.methods.reward_model import load_trained_reward_model
from tunesmith.models.load import load_reward_model, load_tokenizer
from tunesmith.runs import Run, prepared_rows

_PROBE_PAIRS = 16
#: Largest allowed difference of a reward between the trained and the written model; both are float32.
_MAX_DIFFERENCE = 1e-3


def export_reward_model(run: Run, method: Method, checkpoint: Path, target: Path) -> None:
    """Write the reward model of a checkpoint and its proof into `target`.

    Raises ExportError if its rewards differ from the trained model's.
    """
    tokenizer = load_tokenizer(method.folder)
    tokenizer.chat_template = (run.path / "data" / "chat_template.jinja").read_text(encoding="utf-8")
    rows = concatenate_datasets([prepared_rows(run, name) for name in ("heldout", "train")])
    probe = rows.select(range(min(_PROBE_PAIRS, len(rows))))

    model = load_trained_reward_model(method, checkpoint)
    model.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sides = [rewards_of(model, probe[name]) for name in ("input_ids", "rejected_input_ids")]
    model.save_pretrained(target, max_shard_size=run.recipe.export.max_shard_size)
    tokenizer.save_pretrained(target)
    del model

    written = load_reward_model(target, dtype="float32")
    again = [rewards_of(written, probe[name]) for name in ("input_ids", "rejected_input_ids")]
    apart = max(abs(a - b) for old, new in zip(sides, again, strict=True) for a, b in zip(old, new, strict=True))
    if not apart <= _MAX_DIFFERENCE:
        why = "the exported reward model is not the one that was trained"
        what = f"rewards differ by up to {apart:.4f}"
        raise ExportError(Problem("TS401", what, str(target), why, "keep the checkpoint, and report the model"))
    right = sum(chosen > rejected for chosen, rejected in zip(*again, strict=True)) / len(probe)
    facts = {"method": method.name, "pairs": len(probe), "max_reward_difference": apart, "reward_accuracy": right}
    write_json(target / "reward.json", {"objective": "reward", "pad_token_id": written.config.pad_token_id})
    write_json(target / "proof.json", facts)
