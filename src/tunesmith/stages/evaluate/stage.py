"""The evaluate stage: scores any model folder on the run's task and on the loss over the held-out rows."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tunesmith.chat.template import ChatTemplate
from tunesmith.engine.attention.backends import use_tree_attention
from tunesmith.engine.modeling.gemm import use_onednn
from tunesmith.engine.modeling.loss import summed_loss
from tunesmith.engine.packing.batch import StepCollator, choose_collator, to_device
from tunesmith.engine.packing.tree import Limits
from tunesmith.errors import EvaluateError, Problem
from tunesmith.evaluation.metrics import Answer, schema_validator, score_json, score_text, summarise_json
from tunesmith.hardware import detect
from tunesmith.inference.generate import generate, without_stop
from tunesmith.io.atomic import read_json, sha256_file, sha256_json, write_json, write_jsonl
from tunesmith.io.terminal import make_console
from tunesmith.methods.settings import MAX_TOKENS
from tunesmith.models.load import load_model, load_tokenizer, locate, model_digest, stop_ids
from tunesmith.recipe import OBJECTIVES
from tunesmith.runs import EVAL_SUITE, Run, eval_folder, prepared_rows, read_jsonl
from tunesmith.stages.evaluate.documents import document_rows, score_documents
from tunesmith.stages.evaluate.mmlu import Subject, files_digest, read_subjects, score_mmlu

_AT_ONCE = 128  # held-out rows that are packed together


def evaluate(run: Run, model: Path | None = None, console: Console | None = None) -> dict[str, Any]:
    """Score `model` (default: the run's export) and return results.json; a no-op when no input has changed.

    Raises EvaluateError if there are no test rows, if a reference, the schema or MMLU's files cannot be used, or for a reward
    model; RunError if the export is missing.
    """
    recipe = run.recipe
    if model is None:
        run.outputs_digest(f"export/{recipe.export.name}")
        model = run.path / "export" / recipe.export.name
    if (model / "reward.json").is_file():
        why = "it scores answers and cannot generate any"
        fix = "evaluate the policy trained with it, or use it in reward_funcs"
        raise EvaluateError(Problem("TS503", "a reward model cannot be evaluated", str(model), why, fix))
    digest = model_digest(model)
    schema_path = recipe.evaluate.json_schema
    inputs = {
        "recipe": recipe.stage_digest("evaluate"),
        "data": run.outputs_digest("prepare"),
        "model": digest,
        "schema": _schema_digest(schema_path),
        "mmlu": files_digest(recipe.evaluate),
    }
    folder = eval_folder(digest)
    if not run.is_current(folder, inputs):
        with run.perform(folder, folder, inputs) as target:
            work = _evaluate_documents if OBJECTIVES[recipe.objective].rows == "document" else _evaluate
            work(run, model, digest, target, console or make_console(stderr=True))
    results: dict[str, Any] = read_json(run.path / folder / "results.json")
    return results


def evaluate_base(run: Run, console: Console | None = None) -> dict[str, Any]:
    """Score the run's base model, untouched."""
    return evaluate(run, locate(run.recipe.model, run.recipe.revision), console)


def _schema_digest(path: str | None) -> str:
    if path is None:
        return "none"
    if not Path(path).is_file():
        why = "answers are checked against it"
        raise EvaluateError(Problem("TS501", "the JSON Schema file does not exist", path, why, "check evaluate.json_schema"))
    return sha256_file(Path(path))


def _validator(path: str | None) -> Any | None:
    if path is None:
        return None
    try:
        schema = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluateError(
            Problem("TS501", f"not JSON: {error}", path, "answers are checked against it", "correct it")
        ) from error
    return schema_validator(schema, path)


def _test_rows(run: Run) -> list[dict[str, Any]]:
    recipe = run.recipe
    name = "test.jsonl" if recipe.data.test is not None else "heldout.jsonl"
    rows = [row for row in read_jsonl(run.path / "data" / name) if row["messages"][-1]["role"] == "assistant"]
    if not rows:
        why = "a score needs rows the model was not trained on"
        fix = "set data.test to a file, or raise data.heldout"
        raise EvaluateError(Problem("TS502", "no test rows", str(run.path / "data" / name), why, fix))
    return rows[: recipe.evaluate.max_rows]


def _evaluate(run: Run, model_folder: Path, digest: str, target: Path, console: Console) -> None:
    settings, rows = run.recipe.evaluate, _test_rows(run)
    validator = _validator(settings.json_schema)
    references = [Answer(row["where"], row["messages"][-1]["content"], "") for row in rows]
    _score(references, settings.task, validator)  # bad references, and below bad MMLU files, fail before the model loads
    subjects = read_subjects(settings) if settings.mmlu is not None else []
    tokenizer = load_tokenizer(model_folder)
    template = ChatTemplate(tokenizer, (run.path / "data" / "chat_template.jinja").read_text(encoding="utf-8"))
    prompts = _prompts(template, rows)
    model, dtype = _loaded(model_folder)
    stops = _stop_ids(model, tokenizer)
    begun = time.perf_counter()

    def report(done: int) -> None:
        console.print(f"evaluate {model_folder.name}: {done}/{len(rows)} answers")

    answers = generate(
        model,
        prompts,
        stop_ids=stops,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        on_batch=report,
    )
    seconds = time.perf_counter() - begun
    answers = [without_stop(ids, stops) for ids in answers]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    scored = [Answer(ref.where, ref.reference, text) for ref, text in zip(references, texts, strict=True)]
    scores = _score(scored, settings.task, validator)
    if settings.task == "json":
        summary = summarise_json(scores, settings.label, validator is not None)
    else:
        summary = {"task_score": sum(score["score"] for score in scores) / len(scores)}
    generated = sum(map(len, answers))
    samples = [
        {"where": a.where, "reference": a.reference, "answer": a.answer, "score": s["score"], "new_tokens": len(ids)}
        for a, s, ids in zip(scored, scores, answers, strict=True)
    ]
    write_jsonl(target / "samples.jsonl", samples)
    write_json(
        target / "results.json",
        {
            **_asked(model_folder, digest, rows, rows),
            **summary,
            "eval_loss": heldout_loss(run, model, tokenizer),
            "unfinished_answers": sum(len(ids) >= settings.max_new_tokens for ids in answers),
            "generated_tokens": generated,
            "generate_seconds": seconds,
            "generated_tokens_per_second": generated / seconds,
            "compute_dtype": dtype,
            **(_mmlu(run, model, tokenizer, subjects, target, console) if subjects else {}),
        },
    )


def _loaded(model_folder: Path) -> tuple[Any, str]:
    """The model in the dtype that is fast on this hardware, and that dtype."""
    dtype = detect().compute_dtype
    model = load_model(model_folder, dtype=dtype)
    use_onednn(model)
    return model, dtype


def _asked(model_folder: Path, digest: str, rows: Sequence[Any], content: Any) -> dict[str, Any]:
    """The entries of results.json about the request: which model and which rows; the rows' digest is over `content`."""
    return {
        "model": str(model_folder),
        "model_digest": digest,
        "suite": EVAL_SUITE,
        "rows": len(rows),
        "rows_digest": sha256_json(content),
    }


def _evaluate_documents(run: Run, model_folder: Path, digest: str, target: Path, console: Console) -> None:
    """Perplexity and next-token accuracy on raw text; nothing is generated."""
    settings, rows = run.recipe.evaluate, document_rows(run)
    subjects = read_subjects(settings) if settings.mmlu is not None else []
    tokenizer = load_tokenizer(model_folder)
    model, dtype = _loaded(model_folder)
    summary, samples = score_documents(model, rows)
    write_jsonl(target / "samples.jsonl", samples)
    write_json(
        target / "results.json",
        {
            **_asked(model_folder, digest, rows, [[row["where"], row["input_ids"]] for row in rows]),
            **summary,
            "eval_loss": heldout_loss(run, model, tokenizer),
            "compute_dtype": dtype,
            **(_mmlu(run, model, tokenizer, subjects, target, console) if subjects else {}),
        },
    )


def _mmlu(
    run: Run, model: Any, tokenizer: Any, subjects: Sequence[Subject], target: Path, console: Console
) -> dict[str, dict[str, Any]]:
    """Key `mmlu` of results.json. Writes each question to mmlu.jsonl, and deviations from the request to events.jsonl."""
    summary, samples = score_mmlu(model, tokenizer, subjects, console.print)
    write_jsonl(target / "mmlu.jsonl", samples)
    if summary["cut_prompts"]:
        count = summary["cut_prompts"]
        message = f"{count} MMLU prompts cut from the left: the model has {model.config.max_position_embeddings} positions"
        run.event(target, "mmlu-prompts-cut", message, count=count)
    if summary["padded_because"] is not None:
        reason = summary["padded_because"]
        run.event(target, "packing-off", f"MMLU prompts are padded: {reason}", reason=reason)
    return {"mmlu": summary}


def _score(answers: Sequence[Answer], task: str, validator: Any | None) -> list[dict[str, Any]]:
    return [score_json(answer, validator) if task == "json" else score_text(answer) for answer in answers]


def _prompts(template: ChatTemplate, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    prompts = []
    for row, encoded in zip(rows, template.encode_prompts([row["messages"][:-1] for row in rows]), strict=True):
        if isinstance(encoded, Problem):
            raise EvaluateError(replace(encoded, where=row["where"]))
        prompts.append(encoded.input_ids)
    return prompts


def _stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer: those of the model's generation config, and the tokenizer's eos."""
    known = stop_ids(model.generation_config)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in known:
        known.append(tokenizer.eos_token_id)
    if not known:
        why = "every answer would run to the maximum length"
        raise EvaluateError(
            Problem("TS503", "the model has no end-of-turn token", "generation_config", why, "set eos_token_id")
        )
    return known


def heldout_loss(run: Run, model: Any, tokenizer: Any) -> float | None:
    """Mean loss (nats per labelled token) over `data/heldout.arrow`; None if no rows are held out."""
    rows = sorted(prepared_rows(run, "heldout"), key=lambda row: row["length"])
    # A low loss on an undesirable answer is not a goal, and a prompt without a reference has no loss.
    rows = [row for row in rows if row.get("label", True) and any(row["loss_mask"])]
    if not rows:
        return None
    collate, reason = choose_collator(model.config, tokenizer.pad_token_id, max(row["length"] for row in rows))
    use_tree_attention(model, on=reason is None)
    total, count = 0.0, 0
    split = StepCollator(collate, Limits(MAX_TOKENS))
    model.eval()
    for start in range(0, len(rows), _AT_ONCE):
        for batch in split(rows[start : start + _AT_ONCE])["micro_batches"]:
            with torch.no_grad():
                total += float(summed_loss(model, to_device(batch, model.device)))
            count += batch["labelled"]
    use_tree_attention(model, on=False)
    return total / count
