"""The score of a model on raw text: how well it tells each next token of documents that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from tunesmith.engine.modeling.loss import logits_in_chunks
from tunesmith.engine.packing.batch import PaddedCollator, to_device
from tunesmith.errors import EvaluateError, Problem
from tunesmith.runs import Run, prepared_rows


def document_rows(run: Run) -> list[dict[str, Any]]:
    """The test documents as rows of token ids, or the held-out ones; at most `evaluate.max_rows`.

    Raises EvaluateError where there are none.
    """
    name = "test" if run.recipe.data.test is not None else "heldout"
    rows = list(prepared_rows(run, name))
    if not rows:
        why = "a perplexity needs documents that were not trained on"
        fix = "name documents in data.test, or raise data.heldout"
        raise EvaluateError(Problem("TS502", "no test documents", f"data/{name}.arrow", why, fix))
    return rows[: run.recipe.evaluate.max_rows]


def score_documents(model: Any, rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What results.json says of the documents, and a sample for each row.

    `perplexity` is exp of the mean loss (nats) over all told tokens; `task_score` is the mean over rows of the share of tokens
    that were the model's first choice, so that models can be compared by a number that grows with how good they are.
    """
    collate = PaddedCollator(pad_id=0)  # one row at a time, so nothing is padded
    model.eval()
    samples = []
    for row in rows:
        batch = to_device(collate([row]), model.device)
        loss, right = 0.0, 0
        with torch.no_grad():
            for begin, logits in logits_in_chunks(model, batch):
                targets = batch["targets"][begin : begin + len(logits)]
                loss += float(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))
                right += int((logits.argmax(-1) == targets).sum())
        told = len(batch["targets"])
        samples.append({"where": row["where"], "score": right / told, "loss": loss / told, "tokens": told})
    tokens = sum(sample["tokens"] for sample in samples)
    mean = sum(sample["loss"] * sample["tokens"] for sample in samples) / tokens
    return {
        "task_score": sum(sample["score"] for sample in samples) / len(samples),
        "test_loss": mean,
        "perplexity": math.exp(mean),
        "told_tokens": tokens,
    }, samples
