"""The export stage: writes the trained model as one bf16 folder, reloads it and compares it before it is committed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets

from tunesmith.engine.modeling.loss import labelled_logits
from tunesmith.engine.optim.rounding import round_model
from tunesmith.engine.packing.batch import PaddedCollator, to_device
from tunesmith.errors import ExportError, Problem
from tunesmith.io.atomic import read_json, write_json
from tunesmith.methods import Method, make_method
from tunesmith.models.load import load_model, load_tokenizer, locate, stop_ids
from tunesmith.recipe import OBJECTIVES, export_problems
from tunesmith.runs import Run, prepared_rows
from tunesmith.stages.export.reward_model import export_reward_model

PROBE_ROWS = 16
#: Largest allowed mean KL divergence (nats per token) between trained and exported model. On SmolLM2-135M stochastic
#: rounding to bf16 measures 3e-5, round-to-nearest 2e-2.
MAX_KL = 0.01
#: Largest allowed difference of the mean loss (nats per labelled token).
MAX_LOSS_DIFFERENCE = 0.02


def export(run: Run) -> dict[str, Any]:
    """Write `export/<name>/` and return its proof; a no-op when the checkpoint is unchanged.

    Raises ExportError, and leaves nothing behind, when the written model does not compute what the trained one does.
    """
    recipe = run.recipe
    if problems := export_problems(recipe):
        raise ExportError(problems)
    inputs = {"recipe": recipe.stage_digest("export"), "train": run.outputs_digest("train")}
    folder = f"export/{recipe.export.name}"
    if not run.is_current(folder, inputs):
        with run.perform(folder, folder, inputs) as target:
            work = export_reward_model if OBJECTIVES[recipe.objective].reward_model else _export
            work(run, *trained_method(run), target)
    proof: dict[str, Any] = read_json(run.path / folder / "proof.json")
    return proof


def trained_method(run: Run) -> tuple[Method, Path]:
    """The method as `train` used it, and the checkpoint it saved."""
    recipe = run.recipe
    settings = read_json(run.path / "train" / "settings.json")
    summary = read_json(run.path / "train" / "summary.json")
    chosen = {name: settings[name] for name in ("compute_dtype", "r", "lora_alpha")}
    return make_method(recipe, locate(recipe.model, recipe.revision), **chosen), run.path / summary["checkpoint"]


def _export(run: Run, method: Method, checkpoint: Path, target: Path) -> None:
    tokenizer = load_tokenizer(method.folder)
    template = run.path / "data" / "chat_template.jinja"
    if template.is_file():  # raw text has no template
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    rows = concatenate_datasets([prepared_rows(run, name) for name in ("heldout", "train")])
    probe, taught = probe_rows(rows.select(range(min(PROBE_ROWS, len(rows)))))

    model = method.load_trained(checkpoint)
    expected = log_probabilities(model, probe)
    merged = round_model(method.merge(model), run.recipe.seed)
    stops = _learned_stops(probe) if taught else []
    if OBJECTIVES[run.recipe.objective].rows == "document":
        stops = [token for token in stops if token == tokenizer.eos_token_id]  # other rows continue in the next piece
    added = _teach_stops(merged.generation_config, tokenizer, stops)
    merged.save_pretrained(target, max_shard_size=run.recipe.export.max_shard_size)
    tokenizer.save_pretrained(target)
    del model, merged

    found = log_probabilities(load_model(target, dtype="float32"), probe)
    proof = compare_probabilities(expected, found)
    proof |= {"method": method.name, "rows": len(probe), "stop_tokens": stops, "stop_tokens_added": added}
    if not (proof["mean_kl"] <= MAX_KL and proof["loss_difference"] <= MAX_LOSS_DIFFERENCE):  # also if one is NaN
        what = f"KL {proof['mean_kl']:.4f} nats per token, loss differs by {proof['loss_difference']:.4f}"
        why = "the exported model is not the one that was trained and evaluated"
        fix = f"keep the checkpoint {checkpoint}, and report the model and versions in run.json"
        raise ExportError(Problem("TS401", what, str(run.path / "export"), why, fix))
    write_json(target / "proof.json", proof)
    if added:
        run.event(target, "stop-token-added", f"generation_config now also stops at {added}", tokens=added)


def probe_rows(rows: Any) -> tuple[Any, bool]:
    """The rows that the export is compared on, and whether training used their labels.

    Prompts without reference answers have no labels; all their tokens are compared.
    """
    if all(any(trained) for trained in rows["loss_mask"]):
        return rows, True
    return rows.map(lambda row: {"loss_mask": [False] + [True] * (len(row["input_ids"]) - 1)}), False


def _learned_stops(rows: Any) -> list[int]:
    """The ids that training taught to end a turn: the last labelled id of each row."""
    last = [[i for i, t in zip(r["input_ids"], r["loss_mask"], strict=True) if t][-1] for r in rows]
    return [token for token, _ in Counter(last).most_common()]


def _teach_stops(generation: Any, tokenizer: Any, stops: list[int]) -> list[int]:
    """Make generation stop at the special ids that training used to end a turn; returns those that were missing."""
    known = stop_ids(generation)
    special = set(tokenizer.added_tokens_decoder)
    added = [token for token in stops if token in special and token not in known]
    if added:
        generation.eos_token_id = known + added
    return added


def log_probabilities(model: Any, rows: Any) -> Any:
    """Log-probabilities (N, V) in float32 at the positions that predict a labelled token, and those tokens (N,)."""
    collate = PaddedCollator(pad_id=0)  # one row at a time, so nothing is padded
    model.eval()
    parts, tokens = [], []
    for row in rows:
        batch = to_device(collate([row]), model.device)
        with torch.no_grad():
            parts.append(torch.log_softmax(labelled_logits(model, batch).float(), dim=-1).cpu())
        tokens.append(batch["targets"].cpu())
    return torch.cat(parts), torch.cat(tokens)


def compare_probabilities(expected: Any, found: Any) -> dict[str, Any]:
    """How far two models' predictions differ: mean KL (nats), largest difference, loss of both, top-1 agreement."""
    (left, tokens), (right, _) = expected, found
    kl = (left.exp() * (left - right)).sum(dim=-1)
    losses = [float(-side.gather(1, tokens[:, None]).mean()) for side in (left, right)]
    return {
        "tokens": int(tokens.numel()),
        "mean_kl": float(kl.mean()),
        "max_log_probability_difference": float((left - right).abs().max()),
        "top1_agreement": float((left.argmax(-1) == right.argmax(-1)).float().mean()),
        "trained_loss": losses[0],
        "exported_loss": losses[1],
        "loss_difference": abs(losses[0] - losses[1]),
    }
