"""Scores a model on raw text: how well it predicts each next token of documents it was not trained on."""

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
    """The test documents, or without `data.test` the held-out ones, as rows of token ids; at most `evaluate.max_rows`.

    Raises EvaluateError if there are none.
    """
    name = "test" if run.recipe.data.test is not None else "heldout"
    rows = list(prepared_rows(run, name))
    if not rows:
        why = "perplexity needs documents the model was not trained on"
        fix = "set data.test to documents, or raise data.heldout"
        raise EvaluateError(Problem("TS502", "no test documents", f"data/{name}.arrow", why, fix))
    return rows[: run.recipe.evaluate.max_rows]


def score_documents(model: Any, rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The entries of results.json about the documents, and a sample per row.

    `perplexity` is exp of the mean loss (nats) over all labelled tokens; `task_score` is the mean over rows of the fraction of
    tokens that were the model's top choice, so that a higher score means a better model.
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
        labelled = len(batch["targets"])
        samples.append({"where": row["where"], "score": right / labelled, "loss": loss / labelled, "tokens": labelled})
    tokens = sum(sample["tokens"] for sample in samples)
    mean = sum(sample["loss"] * sample["tokens"] for sample in samples) / tokens
    return {
        "task_score": sum(sample["score"] for sample in samples) / len(samples),
        "test_loss": mean,
        "perplexity": math.exp(mean),
        "told_tokens": tokens,
    }, samples
